"""One file that somebody recorded becomes a Capture, whatever kind of file it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from effkit import snapshot, storage, trace
from effkit.captured import Capture
from effkit.progress_bar import quiet, working
from effkit.trace import nesting

_LARGEST_SNAPSHOT = 4 * 2**30
_SINCE_1970_NS = 10**18  # times beyond count from 1970 (this one is of 2001), others from a machine's start


class Options(NamedTuple):
    """What to keep of a trace beside the columns that every event has."""

    columns: Sequence[str] = trace.DETAIL_COLUMNS
    stacks: bool = False
    in_steps: tuple[str | None] | None = None  # leave out what is in no step, by the annotation that marks one


def load_file(path: Path, rank: int | None, options: Options) -> Capture:
    """The Capture of one file; ``rank`` None for what the file says."""
    kind = kind_of(path)
    if kind == "saved":
        return _saved(path, rank)
    try:
        return _snapshot(path, rank or 0) if kind == "snapshot" else _trace(path, rank, options)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def kind_of(path: Path) -> str:
    """``saved``, ``snapshot`` or ``trace``, by its first bytes; only where these say nothing by its name."""
    with path.open("rb") as file:
        start = file.read(32).lstrip()
    signs = {"saved": (b"PK",), "snapshot": (b"\x80",), "trace": (b"\x1f\x8b", b"{", b"[")}
    by_name = {".zip": "saved", ".pickle": "snapshot", ".pkl": "snapshot"}.get(path.suffix, "trace")
    return next((kind for kind, begins in signs.items() if start.startswith(begins)), by_name)


def _saved(path: Path, rank: int | None) -> Capture:
    frames, provenance = storage.read(path)
    if rank is not None:
        if any(frame["rank"].nunique() > 1 for frame in frames.values()):
            raise ValueError(f"{path} holds several ranks already: load it alone, or give one file per rank")
        frames = {name: frame.assign(rank=rank) for name, frame in frames.items()}
        provenance["memory"] = [{**memory, "rank": rank} for memory in provenance.get("memory", ())]
    return Capture(frames["events"], frames.get("allocations"), provenance, frames.get("segments"))


def _snapshot(path: Path, rank: int) -> Capture:
    if path.stat().st_size > _LARGEST_SNAPSHOT:
        raise ValueError(f"larger than {_LARGEST_SNAPSHOT:,} bytes: record fewer events (max_entries=)")
    recorded = snapshot.read(path, rank=rank)
    devices = [{"rank": rank, "device": device, **facts} for device, facts in recorded.facts["devices"].items()]
    seen = {"what": path.name, "device": "a CUDA device", "num_events": recorded.facts["num_events"], "memory": devices}
    return Capture(trace.read(b'{"traceEvents": []}').events, recorded.allocations, seen, recorded.segments)


def _trace(path: Path, rank: int | None, options: Options) -> Capture:
    watched = working(f"Reading {path.name}") if rank is None else quiet()  # a rank of many is counted, not watched
    with path.open("rb") as file, watched:
        read = trace.read(trace.Unpacked(file), rank=rank, details=options.columns, stacks=options.stacks)
    seen: dict[str, Any] = {"what": path.name, **described(read.metadata)}
    # the first of all may be impossible, of 1970 say
    if len(read.events) and (start_ns := int(read.events["start_ns"].iloc[len(read.events) // 2])) > _SINCE_1970_NS:
        seen["date"] = datetime.fromtimestamp(start_ns // 10**9, UTC).date().isoformat()
    left_out = {
        "events of Python functions (load with stacks=True)": read.num_left_out,
        "begins or ends of events of which the other is not there (phases B and E)": read.num_halves,
    }
    if words := [f"left out: {number:,} {what}" for what, number in left_out.items() if number]:
        seen["left_out"] = words
    allocations, seen["memory"] = snapshot.from_trace(read.memory, stacks=nesting.callers(read.events, read.memory))
    return Capture(read.events, allocations, seen, snapshot.reserved(read.memory))


def described(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a trace's metadata says that a Capture's provenance keeps."""
    devices, job = metadata.get("deviceProperties") or [{}], metadata.get("distributedInfo") or {}
    world = job.get("world_size")
    world = world if isinstance(world, int) and 0 < world < 2**20 else None
    facts = {"device": devices[0].get("name"), "backend": job.get("backend"), "world_size": world}
    return {key: value for key, value in facts.items() if value is not None}
