"""Length lists rebuilt from published bucket tables, where the data themselves were not published."""

from __future__ import annotations

import numpy as np
import pandas as pd


def lengths_from_buckets(profile: pd.DataFrame, num_examples: int, *, seed: int = 0) -> pd.DataFrame:
    """A list of lengths that would give these buckets.

    Bucket edges are placed so that each input bucket holds the same summed length (the rule by which Lhotse and NeMo
    estimate them). So a bucket between ``lo`` and ``hi`` holds examples in proportion to ``1 / mean length``; inside,
    inputs are uniform. Output buckets inside an input bucket follow the same rule: the published table says no more.

    Parameters
    ----------
    profile
        One row per bucket: upper edges ``input_length`` and ``output_length`` [cells]; rows of one input edge are its
        output buckets.
    num_examples
        How many to draw.
    seed
        Of the draw.

    Returns
    -------
    DataFrame
        Integer ``input_length`` and ``output_length`` [cells].
    """
    missing = {"input_length", "output_length"} - set(profile.columns)
    if missing:
        raise ValueError(f"a bucket profile has the columns input_length and output_length; missing: {sorted(missing)}")
    rng = np.random.default_rng(seed)
    edges = np.unique(profile["input_length"].to_numpy())
    lower = np.concatenate([[0], edges[:-1]])
    weight = 2 / (lower + edges)
    bucket = rng.choice(len(edges), size=num_examples, p=weight / weight.sum())
    inputs = lower[bucket] + rng.random(num_examples) * (edges - lower)[bucket]
    outputs = np.empty(num_examples)
    for i, edge in enumerate(edges):
        members = np.flatnonzero(bucket == i)
        second = np.sort(profile.loc[profile["input_length"] == edge, "output_length"].to_numpy())
        floor = np.concatenate([[0], second[:-1]])
        share = 2 / (floor + second)
        column = rng.choice(len(second), size=len(members), p=share / share.sum())
        outputs[members] = floor[column] + rng.random(len(members)) * (second - floor)[column]
    return pd.DataFrame(
        {"input_length": np.maximum(1, np.ceil(inputs)), "output_length": np.maximum(1, np.ceil(outputs))}
    ).astype("int64")
