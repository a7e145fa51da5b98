"""Allocator events, live or from a CUDA memory snapshot, become tidy allocation frames; questions about moments."""

from effkit.snapshot.lifetimes import ALLOCATION_COLUMNS, SEGMENT_COLUMNS
from effkit.snapshot.queries import account, at, timeline
from effkit.snapshot.replaying import Snapshot, read
from effkit.snapshot.trace_counters import from_events, from_trace, reserved
from effkit.snapshot.unpickling import unpickle

__all__ = [
    "ALLOCATION_COLUMNS", "SEGMENT_COLUMNS", "Snapshot", "account", "at", "from_events", "from_trace",
    "read", "reserved", "timeline", "unpickle",
]  # fmt: skip
