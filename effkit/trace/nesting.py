"""Which event runs inside which: the call tree of every thread, from times alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effkit.trace.names import LAUNCHES, STEP

_DEEPEST = 12  # callers that a stack names: the innermost
_OF_A_TREE = ["rank", "process", "thread", "start_ns", "dur_ns"]


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
    around: list[tuple[int, int]] = []  # the rows around one, and when they end; last the innermost
    current = -1
    ordered = zip(order.tolist(), thread[order].tolist(), start[order].tolist(), end[order].tolist(), strict=True)
    for row, at, begins, finishes in ordered:
        if at != current:
            current, around = at, [(-1, 2**63)]
        while begins >= around[-1][1] or finishes > around[-1][1]:
            around.pop()
        parent[row] = around[-1][0]
        around.append((row, finishes))
    return parent


def nearest(parent: Any, wanted: Any) -> Any:
    """For each row the position of itself or its innermost ancestor that is wanted; -1 where there is none."""
    # each round looks twice as far as the one before; the last place stands for "none"
    place = np.append(np.where(wanted, np.arange(len(parent)), parent), -1)
    while ((further := place[place]) != place).any():
        place = further
    return place[:-1]


def with_inner(parent: Any, values: Any) -> Any:
    """For each row the sum of its value and those of all rows within it."""
    sums, above = np.append(values, 0), np.append(parent, -1)
    while (above >= 0).any():  # each round adds those that are up to twice as far within as the one before
        np.add.at(sums, above, sums.copy())
        sums[-1], above = 0, above[above]
    return sums[:-1]


def owners(tree: pd.DataFrame, nearest_row: Any, on_device: pd.DataFrame) -> Any:
    """For each event of the device the row that ``nearest_row`` gives for the host call that launched it.

    The call is found by its ``correlation``; -1 where that was not recorded.
    """
    calls = tree[tree["category"].str.endswith(LAUNCHES) & tree["correlation"].notna()]
    launch = pd.Series(calls.index, calls["correlation"].astype("int64")).groupby(level=0).first()
    row = launch.reindex(on_device["correlation"].fillna(-1).astype("int64"), fill_value=-1).to_numpy("int64")
    return np.where(row >= 0, nearest_row[row], -1) if len(nearest_row) else row


def callers(events: pd.DataFrame, memory: pd.DataFrame) -> pd.Series[str]:
    """For each allocator event the operators and annotations around it, the innermost first; absent where none is."""
    tree = host(events)
    tree = tree[~tree["category"].str.endswith(LAUNCHES) & ~tree["name"].str.startswith(STEP)]
    # a moment is an event without length, behind those that begin with it
    moments = memory.rename(columns={"time_ns": "start_ns"}).assign(dur_ns=0)[_OF_A_TREE]
    parent = parents(pd.concat([tree[_OF_A_TREE], moments], ignore_index=True)).tolist()
    names = tree["name"].tolist()
    rows, place = np.unique(np.array(parent[len(tree) :], "int64"), return_inverse=True)
    stacks: list[str | None] = []
    for row in rows.tolist():
        chain: list[str] = []
        while row >= 0 and len(chain) < _DEEPEST:
            chain.append(names[row])
            row = parent[row]
        stacks.append(" < ".join(chain) if chain else None)
    return pd.Series(pd.array(stacks, dtype="str").take(place), memory.index)
