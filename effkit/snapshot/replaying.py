"""A CUDA memory snapshot is replayed: what was allocated when, from where, and how much was reserved for it.

The trace in a snapshot is a ring: its beginning may be gone. Its end is known in full, from the segments, so the
replay hangs on the end: each block that is alive there closes an allocation, and whatever was freed or is alive
without having been born in the trace was there before it.

The ledger is in *requested* bytes, from the allocation until its free is *completed*. That is the one counter for
which the trace has both ends exactly (the allocator's ``requested_bytes``); the "allocated" bytes of
``torch.cuda.memory_allocated`` are rounded up to blocks whose size the trace does not tell.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from effkit.snapshot.categories import CATEGORIES, KNOWN_BY, categorise
from effkit.snapshot.ledger import ALLOC, FREE, OOM, RESERVE, RETURN, Ledger
from effkit.snapshot.lifetimes import ALLOCATION_COLUMNS, SEGMENT_COLUMNS, chosen, moments, segments_of
from effkit.snapshot.stacks import NOTHING, Stacks
from effkit.snapshot.unpickling import unpickle

_ADVICE = "expected what torch.cuda.memory._dump_snapshot() writes; record or copy it again"


class Snapshot(NamedTuple):
    """What a memory snapshot tells.

    ``allocations`` has the columns ``ALLOCATION_COLUMNS``, one row per allocation; ``segments`` the columns
    ``SEGMENT_COLUMNS``, one row per piece of reserved memory. ``facts`` is plain data: ``num_events`` and, under
    ``devices``, each device's peak, what its allocator held at the end, and its last request that found no memory.
    """

    allocations: pd.DataFrame
    segments: pd.DataFrame
    facts: dict[str, Any]


def read(source: bytes | Path, *, rank: int = 0) -> Snapshot:
    """Replay the file, or the content of one, that ``torch.cuda.memory._dump_snapshot()`` wrote.

    Times are ns since 1970, by the allocator's clock; events of one microsecond are set 1 ns apart, so that they
    keep their order. Where torch recorded no times (before 2.1) they count the events instead. ValueError when the
    content is no snapshot, or its trace does not lead to its final state byte for byte.
    """
    decoded = unpickle(source)
    stacks = Stacks()
    try:
        ledgers, steps = _ledgers(decoded if isinstance(decoded, dict) else {"segments": decoded}, stacks)
        del decoded  # a million events are hundreds of megabytes
        allocations = {name: _allocations(ledger, stacks, steps.get(name, -1)) for name, ledger in ledgers.items()}
        segments = {name: _segments(ledger) for name, ledger in ledgers.items()}
        devices = {name: _facts(ledger, stacks) for name, ledger in ledgers.items()}
    except Exception as error:  # damaged content may have anything in the place of anything
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise ValueError(f"not a memory snapshot that can be replayed: {reason}; {_ADVICE}") from error
    return Snapshot(
        _tidy(allocations, ALLOCATION_COLUMNS, rank).rename_axis("allocation"),
        _tidy(segments, SEGMENT_COLUMNS, rank).rename_axis("segment"),
        {"num_events": sum(facts["num_events"] for facts in devices.values()), "devices": devices},
    )


def _ledgers(decoded: dict[str, Any], stacks: Stacks) -> tuple[dict[str, Ledger], dict[str, int]]:
    """The ledger of each device, and when the last optimizer's step there came to its end [us]."""
    traces: list[list[dict[str, Any]]] = decoded.get("device_traces") or []
    segments: dict[int, list[dict[str, Any]]] = {device: [] for device, trace in enumerate(traces) if trace}
    for segment in decoded["segments"]:
        segments.setdefault(segment.get("device", 0), []).append(segment)
    if not segments:
        raise ValueError("it holds no segments and no events")
    ledgers = {
        f"device{device}": Ledger(traces[device] if device < len(traces) else [], segments[device], stacks)
        for device in sorted(segments)
    }
    steps = {
        f"device{note['device']}": note["time_us"]
        for note in decoded.get("external_annotations") or []
        if note["stage"] == "END" and note["name"].startswith("Optimizer.step")
    }
    return ledgers, steps


def _allocations(ledger: Ledger, stacks: Stacks, step_ended_us: int) -> pd.DataFrame:
    sizes, birth, death, stack, parts = ledger.lives()
    roles = np.append(stacks.roles, NOTHING).astype("int64")[stack]
    ended = step_ended_us >= ledger.times.max(initial=0) // 1000
    category, known_by = categorise(sizes, roles, birth, death, parts, step_ended=ended)
    columns = {
        "size_bytes": sizes, "alloc_ns": moments(ledger.times, birth), "free_ns": moments(ledger.times, death),
        "stack": chosen(stacks.texts, stack), "category": chosen(CATEGORIES, category),
        "known_by": chosen(KNOWN_BY, known_by),
    }  # fmt: skip
    return pd.DataFrame(columns)


def _segments(ledger: Ledger) -> pd.DataFrame:
    changes = np.flatnonzero((ledger.kinds == RESERVE) | (ledger.kinds == RETURN))
    starts = ledger.addresses[changes].tolist()
    ends = (ledger.addresses + ledger.sizes)[changes].tolist()
    ranges = zip(starts, ends, strict=True)
    return segments_of(ledger.ranges, ledger.kinds[changes] == RESERVE, ranges, ledger.times[changes])


def _facts(ledger: Ledger, stacks: Stacks) -> dict[str, Any]:
    """Plain data about one device; all sizes in bytes, times in ns."""
    peak, num_events = int(ledger.levels.argmax()), len(ledger.kinds)
    changes = bool(np.isin(ledger.kinds, (ALLOC, FREE)).any())
    facts: dict[str, Any] = {
        "num_events": num_events,
        "peak_bytes": int(ledger.levels[peak]),
        # a peak that is there from the start is dated just before the first event
        "peak_ns": int(ledger.times[peak - 1] if peak else ledger.times[0] - 1) if num_events else None,
        "peak_source": "running total of the allocator's alloc and free_completed events, requested bytes"
        if changes
        else "the final state alone: nothing came or went in what was recorded, an earlier peak is not visible",
        "peak": "its peak" if changes else "its end",
        "clock": "ns" if ledger.times_are_recorded else "events",
        "before_bytes": int(ledger.levels[0]),  # there when the trace begins: its start is missing unless this is 0
        "peak_reserved_bytes": int(ledger.reserved_levels.max()),
        **ledger.final_bytes,
        "oom": None,
    }
    if (refused := np.flatnonzero(ledger.kinds == OOM)).size:
        last = int(refused[-1])
        stack = int(ledger.stacks[last])
        facts["oom"] = {
            "asked_bytes": int(ledger.sizes[last]),
            "device_free_bytes": int(ledger.addresses[last]),
            "time_ns": int(ledger.times[last]),
            "stack": stacks.texts[stack] if stack >= 0 else None,
        }
    return facts


def _tidy(frames: dict[str, pd.DataFrame], columns: tuple[str, ...], rank: int) -> pd.DataFrame:
    """One frame of all devices: what was there before the recording first, then in order of birth."""
    frame = pd.concat([frame.assign(device=name, rank=rank) for name, frame in frames.items()])
    if len(frames) > 1:
        frame = frame.sort_values("alloc_ns", kind="stable", na_position="first")
    return frame[list(columns)].astype({"device": "str", "rank": "int64"}).reset_index(drop=True)
