"""A profiler's memory events with their running total become allocations and the peaks that these must explain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effkit.snapshot.categories import CATEGORIES, KNOWN_BY, categorise
from effkit.snapshot.lifetimes import SEGMENT_COLUMNS, chosen, distinct, moments, pair, segments_of
from effkit.snapshot.stacks import BACKWARD, NOTHING, OPTIMIZER, OTHER


def from_trace(memory: pd.DataFrame, *, stacks: pd.Series[str]) -> tuple[pd.DataFrame | None, list[dict[str, Any]]]:
    """Allocations, and per rank and device ``peak_bytes`` and ``peak_source``; ``stacks`` as of :func:`from_events`.

    An accelerator's running total is its allocator's own: what was there before the recording and stayed is one row.
    The host's counts from anywhere: its peak is above what the recording shows to have been there at its beginning.

    ``(None, [])`` where the events have no addresses or no total, as torch before 1.13 wrote them.
    """
    if memory.empty or memory["total_bytes"].isna().any() or not memory["address"].any():
        return None, []
    frames, facts = [], []
    for (rank, device), events in memory.groupby(["rank", "device"], sort=True):
        allocations = from_events(events, stacks=stacks.loc[events.index])
        seen_before = int(allocations.loc[allocations["alloc_ns"].isna(), "size_bytes"].sum())
        start = int(events["total_bytes"].iloc[0] - events["size_bytes"].iloc[0])
        above = max(0, int(events["total_bytes"].max()) - start)
        if device == "cpu":
            source = "the profiler's Total Allocated, above what was there when the recording began"
            begin = seen_before
        else:
            source, begin = "the allocator's own Total Allocated", start
            if (stayed := start - seen_before) > 0:
                untold = {"alloc_ns": pd.NA, "free_ns": pd.NA, "stack": pd.NA, "category": CATEGORIES[0]}
                row = allocations.head(1).assign(size_bytes=stayed, known_by=KNOWN_BY[0], **untold)
                allocations = pd.concat([row.astype(allocations.dtypes), allocations])
        frames.append(allocations)
        facts.append({"rank": int(rank), "device": str(device), "peak_bytes": begin + above, "peak_source": source})
    frame = pd.concat(frames).sort_values("alloc_ns", kind="stable", na_position="first", ignore_index=True)
    return frame.rename_axis("allocation"), facts


def reserved(memory: pd.DataFrame) -> pd.DataFrame | None:
    """What the allocators had reserved, by their running totals: columns ``SEGMENT_COLUMNS``; None where none is.

    Which piece is given back a total does not tell: the last that was reserved stands for it.
    """
    frames = []
    for (rank, device), events in memory.groupby(["rank", "device"], sort=True):
        levels = events["reserved_bytes"].to_numpy("int64", na_value=-1)
        if levels.min() < 0 or not levels.any():
            continue
        change = np.flatnonzero(np.diff(levels))
        ranges = np.sort(np.stack([levels[change], levels[change + 1]], axis=1)).tolist()
        times = distinct(events["time_ns"].to_numpy())[change + 1]
        final = [(0, int(levels[-1]))] if levels[-1] else []
        segments = segments_of(final, np.diff(levels)[change] > 0, ranges, times)
        frames.append(segments.assign(device=str(device), rank=int(rank)))
    if not frames:
        return None
    return pd.concat(frames, ignore_index=True)[list(SEGMENT_COLUMNS)].astype({"device": "str"}).rename_axis("segment")


def from_events(memory: pd.DataFrame, *, stacks: pd.Series[str]) -> pd.DataFrame:
    """Pair each allocation with the free of the same address: columns ``ALLOCATION_COLUMNS``, in order of birth.

    ``memory`` is the memory frame of :func:`effkit.trace.read`; ``stacks`` says of each of its events where it came
    from. ``alloc_ns`` is ``<NA>`` for what was there before the recording began (only its free was seen; these come
    first), ``free_ns`` for what was still alive at its end. Events of one moment are set 1 ns apart. ``category`` and
    ``known_by`` are told by the stacks: autograd's engine and torch's optimizers bear their names among the callers.
    """
    changes = memory["size_bytes"].to_numpy()
    times = distinct(memory["time_ns"].to_numpy())
    birth, death = pair(changes > 0, memory["address"].to_numpy(), pd.factorize(memory["device"])[0])
    event = np.where(birth >= 0, birth, death)  # which tells size and place
    sizes = np.abs(changes[event])
    codes, texts = pd.factorize(stacks)
    backward = np.array(["autograd::engine::evaluate_function" in text for text in texts], bool)
    stepping = np.array(["Optimizer.step#" in text for text in texts], bool)
    parts = np.append(np.select([backward, stepping], [BACKWARD, OPTIMIZER], OTHER), NOTHING)[codes]
    roles, end = np.append(parts, NOTHING)[birth], np.where(death < 0, len(memory), death)
    # an annotation is recorded when it ends, so a step that is there has ended
    category, known_by = categorise(sizes, roles, birth, end, parts, step_ended=True)
    columns = {
        "size_bytes": sizes, "alloc_ns": moments(times, birth), "free_ns": moments(times, death),
        "device": memory["device"].iloc[event].array, "rank": memory["rank"].to_numpy()[event],
        "stack": chosen(stacks, birth), "category": chosen(CATEGORIES, category),
        "known_by": chosen(KNOWN_BY, known_by),
    }  # fmt: skip
    return pd.DataFrame(columns).rename_axis("allocation")
