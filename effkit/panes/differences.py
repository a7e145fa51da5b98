"""What changed between two captures."""

from __future__ import annotations

import pandas as pd

Tables = tuple[pd.DataFrame, pd.DataFrame, int]
_NOTICEABLE = 0.05  # a smaller change of time per step is no change


def diff(one: Tables, other: Tables) -> pd.DataFrame:
    """Self time of operators on the host, and time of kernels, per step, in both captures.

    Each of ``one`` and ``other`` is an operator table, a kernel table and a number of steps. Rows are indexed by
    ``kind`` and ``name``; ``calls`` and ``time_ns`` and their ``other_`` twins are per step; ``change`` is ``grew``,
    ``shrank``, ``appeared``, ``went`` or ``same`` (within 5%). The largest difference comes first.
    """
    frame = _per_step(*one).join(_per_step(*other).add_prefix("other_"), how="outer")
    before, after = frame["time_ns"], frame["other_time_ns"]
    frame["difference_ns"] = after.fillna(0) - before.fillna(0)
    frame["ratio"] = after / before.replace(0, pd.NA)
    frame["change"] = "same"
    frame.loc[(frame["ratio"] > 1 + _NOTICEABLE).fillna(False), "change"] = "grew"
    frame.loc[(frame["ratio"] < 1 - _NOTICEABLE).fillna(False), "change"] = "shrank"
    frame.loc[before.isna(), "change"] = "appeared"
    frame.loc[after.isna(), "change"] = "went"
    order = frame["difference_ns"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order]


def _per_step(operators: pd.DataFrame, kernels: pd.DataFrame, num_steps: int) -> pd.DataFrame:
    parts = {
        "operator": operators.drop(index="not visible", errors="ignore")[["calls", "host_self_ns"]],
        "kernel": kernels[["calls", "total_ns"]],
    }
    frames = [part.set_axis(["calls", "time_ns"], axis=1).rename_axis("name") for part in parts.values()]
    return (pd.concat(frames, keys=parts, names=["kind"]) / num_steps).astype("Float64")
