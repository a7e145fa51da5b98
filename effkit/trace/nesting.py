"""Which event runs inside which: the call tree of every thread, from times alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effkit.trace.names import LAUNCHES, STEP

_DEEPEST = 12  # callers that a stack names: the innermost


def host(events: pd.DataFrame) -> pd.DataFrame:
    """What ran on the host and nests: operators, annotations, calls to the device; with a new index 0, 1, …"""
    category = events["category"]
    nests = category.isin(["cpu_op", "user_annotation"]) | category.str.endswith(LAUNCHES)
    return events[nests].reset_index(drop=True)


def parents(frame: pd.DataFrame) -> Any:
    """For each row the position of the innermost event around it on its thread; -1 where there is none.

    Two events that overlap without nesting (clocks of coarse traces) are beside one another, as torch has it.
    """
    thread = frame.groupby(["rank", "process", "thread"], sort=False).ngroup().to_numpy()
    start = frame["start_ns"].to_numpy()
    end = start + frame["dur_ns"].to_numpy()
    order = np.lexsort((-end, start, thread))
    parent = np.full(len(frame), -1, dtype="int64")
    around: list[int] = []
    ends: list[int] = []
    current = -1
    ordered = zip(order.tolist(), thread[order].tolist(), start[order].tolist(), end[order].tolist(), strict=True)
    for row, at, begins, finishes in ordered:
        if at != current:
            current, around, ends = at, [], []
        while ends and (begins >= ends[-1] or finishes > ends[-1]):
            around.pop()
            ends.pop()
        if around:
            parent[row] = around[-1]
        around.append(row)
        ends.append(finishes)
    return parent


def nearest(parent: Any, wanted: Any) -> Any:
    """For each row the position of itself or its innermost ancestor that is wanted; -1 where there is none."""
    place = np.arange(len(parent))
    while True:
        climbs = (place >= 0) & ~wanted[place]
        if not climbs.any():
            return place
        place = np.where(climbs, parent[place], place)


def owners(tree: pd.DataFrame, nearest_row: Any, on_device: pd.DataFrame) -> Any:
    """For each event of the device the row that ``nearest_row`` gives for the host call that launched it.

    The call is found by its ``correlation``; -1 where that was not recorded.
    """
    calls = tree[tree["category"].str.endswith(LAUNCHES) & tree["correlation"].notna()]
    launch = pd.Series(calls.index, calls["correlation"].astype("int64")).groupby(level=0).first()
    sought = on_device["correlation"].fillna(-1).astype("int64")
    row = launch.reindex(sought, fill_value=-1).to_numpy("int64")
    return np.where(row >= 0, nearest_row[row], -1) if len(nearest_row) else row


def callers(events: pd.DataFrame, memory: pd.DataFrame) -> pd.Series[str]:
    """For each allocator event the operators and annotations around it, the innermost first; absent where none is."""
    tree = host(events)
    tree = tree[~tree["category"].str.endswith(LAUNCHES) & ~tree["name"].str.startswith(STEP)].reset_index(drop=True)
    above = np.append(parents(tree), -1)
    innermost = _around(tree, above, memory)
    parent, names = above.tolist(), tree["name"].tolist()
    rows, place = np.unique(innermost, return_inverse=True)
    stacks: list[str | None] = []
    for row in rows.tolist():
        chain: list[str] = []
        while row >= 0 and len(chain) < _DEEPEST:
            chain.append(names[row])
            row = parent[row]
        stacks.append(" < ".join(chain) if chain else None)
    return pd.Series(pd.array(stacks, dtype="str").take(place), memory.index)


def _around(tree: pd.DataFrame, above: Any, moments: pd.DataFrame) -> Any:
    """For each moment the position of the innermost event around it on its thread; -1 where there is none."""
    place = ["rank", "process", "thread"]
    thread = pd.concat([tree[place], moments[place]]).groupby(place, sort=False).ngroup().to_numpy()
    at, thread = thread[len(tree) :], thread[: len(tree)]
    start = tree["start_ns"].to_numpy()
    end = np.append(start + tree["dur_ns"].to_numpy(), np.iinfo("int64").max)
    time = moments["time_ns"].to_numpy()
    innermost = np.full(len(moments), -1, dtype="int64")
    for number in np.unique(at):
        asked, rows = np.flatnonzero(at == number), np.flatnonzero(thread == number)
        rows = rows[np.lexsort((-end[rows], start[rows]))]
        # the last that had begun, or the nearest of those around it that had not ended
        row = np.append(rows, -1)[np.searchsorted(start[rows], time[asked], side="right") - 1]
        while (over := end[row] <= time[asked]).any():
            row = np.where(over, above[row], row)
        innermost[asked] = row
    return innermost
