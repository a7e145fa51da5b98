"""Allocator events, live or from a CUDA memory snapshot, become tidy allocation frames; questions about moments."""

from effkit.snapshot.counting import from_trace
from effkit.snapshot.moments import account, at, peak_ns, timeline
from effkit.snapshot.pairing import ALLOCATION_COLUMNS, from_events
from effkit.snapshot.replaying import SEGMENT_COLUMNS, Snapshot, read
from effkit.snapshot.unpickling import unpickle

__all__ = [
    "ALLOCATION_COLUMNS",
    "SEGMENT_COLUMNS",
    "Snapshot",
    "account",
    "at",
    "from_events",
    "from_trace",
    "peak_ns",
    "read",
    "timeline",
    "unpickle",
]
