"""LAMB's Table 1 (arXiv 1904.00962): where 3 days to 76 minutes comes from."""

from __future__ import annotations

import pandas as pd

# Table 1, BERT-Large: (solver, samples per batch) -> thousand steps, TPUv3 chips, minutes. The last row's batch is
# 65,536 for pieces of 128 tokens and 32,768 for those of 512.
_TABLE1 = {
    ("AdamW", "512"): (1_000.0, 16, 81.4 * 60),
    ("LAMB", "512"): (1_000.0, 16, 82.8 * 60),
    ("LAMB", "1k"): (500.0, 32, 43.2 * 60),
    ("LAMB", "2k"): (250.0, 64, 21.4 * 60),
    ("LAMB", "4k"): (125.0, 128, 693.6),
    ("LAMB", "8k"): (62.5, 256, 390.5),
    ("LAMB", "16k"): (31.25, 512, 200.0),
    ("LAMB", "32k"): (15.625, 1_024, 101.2),
    ("LAMB", "64k/32k"): (8.599, 1_024, 76.19),
}


def lamb_table() -> pd.DataFrame:
    """The published runs, and what their speed-up is made of.

    Returns
    -------
    DataFrame
        Indexed by ``solver`` and ``batch``: ``num_steps``, ``num_chips``, ``dur_min``; against the first row
        ``times_faster``, ``times_chips`` and ``efficiency_frac`` (times faster per times chips); ``chip_hours``.
    """
    rows = pd.DataFrame.from_dict(_TABLE1, orient="index", columns=["num_steps", "num_chips", "dur_min"])
    rows.index = pd.MultiIndex.from_tuples(list(_TABLE1), names=["solver", "batch"])
    rows["num_steps"] = (1_000 * rows["num_steps"]).round().astype("int64")
    rows["times_faster"] = rows["dur_min"].iloc[0] / rows["dur_min"]
    rows["times_chips"] = rows["num_chips"] / rows["num_chips"].iloc[0]
    rows["efficiency_frac"] = rows["times_faster"] / rows["times_chips"]
    rows["chip_hours"] = rows["num_chips"] * rows["dur_min"] / 60
    return rows
