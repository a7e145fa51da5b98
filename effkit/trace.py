"""A profiler trace (Kineto's Chrome JSON) becomes tidy event frames. Needs no torch.

Times are integer nanoseconds in the trace's own clock. ``category`` keeps Kineto's words.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import numpy as np
import pandas as pd

EVENT_COLUMNS = (
    "name", "category", "start_ns", "dur_ns", "rank", "process", "thread", "stream", "correlation",
)  # fmt: skip
MEMORY_COLUMNS = ("time_ns", "address", "size_bytes", "total_bytes", "device", "rank")

_LATEST_US = 2**63 / 1000
_CPU_DEVICE = 0  # c10::DeviceType, as the profiler writes it into "Device Type"


class _Args(msgspec.Struct, gc=False):
    stream: int | str | None = None
    correlation: int | None = None
    address: int | None = msgspec.field(name="Addr", default=None)
    size_bytes: int | None = msgspec.field(name="Bytes", default=None)
    total_bytes: int | None = msgspec.field(name="Total Allocated", default=None)
    device_type: int | None = msgspec.field(name="Device Type", default=None)
    device_id: int | None = msgspec.field(name="Device Id", default=None)


class _Event(msgspec.Struct, gc=False):
    ph: str = ""
    name: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    pid: int | str = 0
    tid: int | str = 0
    args: _Args | None = None


class _Trace(msgspec.Struct, gc=False):
    traceEvents: list[_Event]


def read(content: bytes, *, rank: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Decode one trace.

    Returns
    -------
    events
        One row per complete event, columns ``EVENT_COLUMNS``, sorted by ``start_ns``.
    memory
        One row per allocator event, columns ``MEMORY_COLUMNS``: signed ``size_bytes``, and the allocator's own
        running total after it. Empty when memory was not recorded.

    Raises
    ------
    ValueError
        When the content is not a Chrome trace.
    """
    try:
        with _no_garbage_collection():
            decoded = msgspec.json.decode(content, type=_Trace).traceEvents
        complete = [event for event in decoded if event.ph == "X" and event.cat != "Trace"]
        instants = [event for event in decoded if event.name == "[memory]" and event.args is not None]
        return _event_frame(complete, rank), _memory_frame(instants, rank)
    except (msgspec.DecodeError, ValueError, OverflowError, TypeError, RecursionError) as error:
        raise ValueError(f"not a profiler trace: {error}. Expected Chrome JSON with traceEvents") from error


def _event_frame(events: list[_Event], rank: int) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "name": [event.name for event in events],
            "category": [event.cat for event in events],
            "start_ns": _nanoseconds([event.ts for event in events]),
            "dur_ns": _nanoseconds([event.dur for event in events]),
            "rank": np.full(len(events), rank, dtype="int64"),
            "process": [str(event.pid) for event in events],
            "thread": [str(event.tid) for event in events],
            "stream": pd.array([_stream(event) for event in events], dtype="Int64"),
            "correlation": pd.array([event.args and event.args.correlation for event in events], dtype="Int64"),
        }
    ).astype({"name": "str", "category": "str", "process": "str", "thread": "str"})
    return frame.sort_values("start_ns", kind="stable", ignore_index=True)


def _memory_frame(events: list[_Event], rank: int) -> pd.DataFrame:
    args = [event.args for event in events if event.args is not None]
    devices = ["cpu" if a.device_type == _CPU_DEVICE else f"device{a.device_id}" for a in args]
    frame = pd.DataFrame(
        {
            "time_ns": _nanoseconds([event.ts for event in events]),
            "address": np.array([a.address or 0 for a in args], dtype="uint64"),
            "size_bytes": np.array([a.size_bytes or 0 for a in args], dtype="int64"),
            "total_bytes": np.array([a.total_bytes or 0 for a in args], dtype="int64"),
            "device": pd.Series(devices, dtype="str"),
            "rank": np.full(len(args), rank, dtype="int64"),
        }
    )
    return frame.sort_values("time_ns", kind="stable", ignore_index=True)


def _nanoseconds(microseconds: list[float]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Current traces count from a base near the run, so that microseconds with three decimals fit a float exactly."""
    exact = np.array(microseconds, dtype="float64")
    whole = np.floor(exact)
    if not (np.abs(whole) < _LATEST_US).all():
        raise ValueError("a time beyond the range of 64-bit nanoseconds")
    return whole.astype("int64") * 1000 + np.rint((exact - whole) * 1e3).astype("int64")


def _stream(event: _Event) -> int | None:
    stream = event.args.stream if event.args else None
    return stream if isinstance(stream, int) else None


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Millions of fresh objects make the collector run over and over; none of them is garbage yet."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
