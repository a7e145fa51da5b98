"""Traces written by hand, a line per event: times in microseconds, as a profiler writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import effkit as ek

HOST, DEVICE = {"pid": 1, "tid": 1}, {"pid": 0, "tid": 7}


def event(category: str, name: str, start: float, end: float, *, thread: int = 1, **args: Any) -> dict[str, Any]:
    """One complete event; ``args`` with underscores for the blanks in Kineto's names."""
    place = DEVICE if category in ("kernel", "gpu_memcpy", "gpu_memset") else HOST | {"tid": thread}
    if place is DEVICE:
        args.setdefault("stream", 7)
    named = {key.replace("_", " ") if key[0].isupper() else key: value for key, value in args.items()}
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": end - start, **place, "args": named}


def op(name: str, start: float, end: float, **args: Any) -> dict[str, Any]:
    return event("cpu_op", name, start, end, **args)


def note(name: str, start: float, end: float, **args: Any) -> dict[str, Any]:
    return event("user_annotation", name, start, end, **args)


def launched(kernel: str, call: float, start: float, end: float, correlation: int, **args: Any) -> list[dict[str, Any]]:
    """A kernel, and the host's call that launched it, which took one microsecond."""
    return [
        event("cuda_runtime", "cudaLaunchKernel", call, call + 1, correlation=correlation),
        event("kernel", kernel, start, end, correlation=correlation, **args),
    ]


def written(path: Path, events: list[dict[str, Any]], *, rank: int | None = None, world: int | None = None) -> Path:
    """A file with these events."""
    job = {} if rank is None else {"distributedInfo": {"backend": "nccl", "rank": rank, "world_size": world or 1}}
    path.write_text(json.dumps({"schemaVersion": 1, **job, "traceEvents": events}))
    return path


def capture_of(tmp_path: Path, *events: dict[str, Any] | list[dict[str, Any]]) -> ek.Capture:
    """The Capture of one rank with these events, lists of them flattened."""
    flat = [one for given in events for one in (given if isinstance(given, list) else [given])]
    return ek.load(written(tmp_path / "trace.json", flat))
