"""A profiler trace (Kineto's Chrome JSON) becomes tidy event frames. Needs no torch.

Times are integer nanoseconds, since 1970 where the trace says from when it counts and in its own clock otherwise.
``category`` keeps Kineto's words; those of torch before 1.13 (``Operator``, ``Kernel``, …) become today's.
"""

from effkit.trace.decoding import Unpacked, head
from effkit.trace.tidying import DETAIL_COLUMNS, EVENT_COLUMNS, MEMORY_COLUMNS, Trace, read

__all__ = ["DETAIL_COLUMNS", "EVENT_COLUMNS", "MEMORY_COLUMNS", "Trace", "Unpacked", "head", "read"]
