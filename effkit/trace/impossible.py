"""Events that no pane counts: those whose times cannot be, under a category that says why, and those unknown to all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effkit.operators import COMMUNICATES
from effkit.trace.names import DEVICE, IMPOSSIBLE, LAUNCHES, UNDERSTOOD
from effkit.units import readable

_YEAR_NS = 365.0 * 86_400 * 10**9  # no profiler runs so long
_CLOCKS_NS = 10**9  # the clocks of a host and its device are set to each other far better than this
_TOGETHER_NS = 10**6  # a kernel may begin on the last blocks of the one before it: that takes far less


def set_apart(events: pd.DataFrame) -> pd.DataFrame:
    """The events, those whose times cannot be under a category that begins with ``IMPOSSIBLE``."""
    category = events["category"]
    start, dur = events["start_ns"].to_numpy("float64"), events["dur_ns"].to_numpy("float64")
    reasons = {
        "the end is before the begin": dur < 0,
        "it lasts longer than a year": dur > _YEAR_NS,
        "it is a year apart from the others": np.abs(start - (start[len(start) // 2] if len(start) else 0)) > _YEAR_NS,
    }
    possible = ~np.logical_or.reduce(list(reasons.values()))
    on_device = events[category.isin(DEVICE).to_numpy() & possible]
    kinds = [kind for kind in category.unique() if kind.endswith(LAUNCHES)]
    early = _early(on_device, events[category.isin(kinds).to_numpy() & possible])
    reasons["it begins before it was launched"] = events.index.isin(early)
    if not any(kind.startswith("hip") for kind in kinds):  # a queue of ROCm may run several kernels at once
        reasons["others run on its stream meanwhile"] = events.index.isin(_shared(on_device))
    for reason, holds in reasons.items():
        if holds.any():
            category = category.mask(holds & ~category.str.startswith(IMPOSSIBLE), IMPOSSIBLE + reason)
    return events.assign(category=category)


def understood(events: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """The events that panes know, those of categories that none knows, and what has to be said of these and of others
    whose times cannot be."""
    took = events.groupby("category", sort=False)["dur_ns"].agg(["size", "sum"])
    known = took.index.isin(UNDERSTOOD) | took.index.str.endswith(LAUNCHES)
    if known.all():
        return events, events.iloc[:0], []
    apart = took.index.str.startswith(IMPOSSIBLE)
    notes = [f"set apart, in no sum: {number:,} events ({kind})" for kind, number in took.loc[apart, "size"].items()]
    strange = took[~known & ~apart]
    for kind, number, dur_ns in strange.itertuples():
        words = f"{number:,} events of {f'category “{kind}”' if kind else 'no category'}"
        notes.append(f"not understood: {words}, {readable(int(dur_ns), 'ns')}, which are in no pane")
    category = events["category"]
    return events[category.isin(took.index[known])], events[category.isin(strange.index)], notes


def _early(on_device: pd.DataFrame, calls: pd.DataFrame) -> Any:
    """What begins long before its launch, unless most does: then the two clocks are not one, and durations hold."""
    launched_ns = on_device["correlation"].map(calls.groupby("correlation")["start_ns"].min()).astype("Int64")
    early = (on_device["start_ns"] < launched_ns - _CLOCKS_NS).fillna(False).to_numpy(bool)
    return on_device.index[early & (early.sum() <= max(1, launched_ns.notna().sum() // 2))]


def _shared(on_device: pd.DataFrame) -> Any:
    """What ends long after the next on its stream has ended, and so cannot have run before it. But branches of a graph
    run side by side and are written on one stream, and kernels that move data wait for other ranks."""
    shown = on_device.assign(
        end=on_device["start_ns"] + on_device["dur_ns"], correlation=on_device["correlation"].fillna(-1)
    )[on_device["stream"].notna()]
    after = shown.groupby(["process", "stream"], sort=False)[["end", "correlation"]].shift(-1)
    outlives = (shown["end"] > after["end"] + _TOGETHER_NS) & (shown["correlation"] != after["correlation"])
    return shown.index[outlives][~shown["name"][outlives].str.contains(COMMUNICATES)]
