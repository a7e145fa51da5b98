"""Allocator events, live or from a CUDA memory snapshot, become tidy allocation frames; questions about moments."""

from effkit.snapshot.alloc_free_pairs import ALLOCATION_COLUMNS
from effkit.snapshot.mapping import SEGMENT_COLUMNS
from effkit.snapshot.queries import account, at, peak_ns, timeline
from effkit.snapshot.replaying import Snapshot, read
from effkit.snapshot.trace_counters import from_events, from_trace, reserved
from effkit.snapshot.unpickling import unpickle

__all__ = [
    "ALLOCATION_COLUMNS", "SEGMENT_COLUMNS", "Snapshot", "account", "at", "from_events", "from_trace",
    "peak_ns", "read", "reserved", "timeline", "unpickle",
]  # fmt: skip
