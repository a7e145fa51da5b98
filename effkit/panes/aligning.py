"""The ranks' clocks, put together by the collectives that they share."""

from __future__ import annotations

from typing import Any

import pandas as pd

# collectives that nobody leaves before all have come; DeepEP's ranks wait for one another in the notifying kernels
SYNCHRONISE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier", "notify_dispatch",
                "cached_notify_dispatch", "cached_notify_combine", "cached_notify")  # fmt: skip
_TIGHT_NS = 10_000  # a spread that needs no better


def clocks(calls: pd.DataFrame) -> pd.DataFrame:
    """How far each rank's clock is ahead of the first one's: ``offset_ns``, ``spread_ns``, ``num_matched`` by rank.

    A collective ends for all at nearly the same moment. The offset is the median difference of ends over the matched
    ones, the spread the median distance from it that remains; absent for a rank that shares no collective. All-to-alls,
    in which ranks may receive unequally and leave one after another, are left out where the others agree far better.
    """
    ranks = sorted(calls["rank"].unique())
    usable = calls[calls["call"].notna() & calls["dur_ns"].notna() & calls["collective"].isin(SYNCHRONISE)]
    columns = ["offset_ns", "spread_ns", "num_matched"]
    clock = pd.DataFrame(0, index=pd.Index(ranks, name="rank"), columns=columns, dtype="Int64")
    ends = usable.assign(end=usable["start_ns"] + usable["dur_ns"])
    ends = ends.pivot_table(index="call", columns="rank", values="end", aggfunc="first")
    uneven = ends.index.isin(usable.loc[usable["collective"] == "all_to_all", "call"])
    for rank in ranks[1:]:
        apart = ends[rank] - ends[ranks[0]] if {rank, ranks[0]} <= set(ends.columns) else pd.Series(dtype="Float64")
        every, even = (_middle(part.dropna()) for part in (apart, apart[~uneven[: len(apart)]]))
        clock.loc[rank] = even if even[2] > 1 and every[1] > 10 * even[1] + _TIGHT_NS else every
    return clock


def _middle(apart: pd.Series[float]) -> list[Any]:
    if apart.empty:
        return [pd.NA, pd.NA, 0]
    return [round(float(apart.median())), round(float((apart - apart.median()).abs().median())), len(apart)]
