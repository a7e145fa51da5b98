"""Time that is covered by events, however these overlap."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd


class Covered(NamedTuple):
    """Disjoint stretches of time in order: ``starts`` and ``ends`` [ns]."""

    starts: Any
    ends: Any

    def before(self, time_ns: Any) -> Any:
        """How much is covered up to each time [ns]."""
        sums = np.append(0, np.cumsum(self.ends - self.starts))
        place = np.searchsorted(self.starts, time_ns, side="right")
        # the last stretch that has begun may reach beyond the time
        return sums[place] - np.maximum(0, np.append(0, self.ends)[place] - time_ns) * (place > 0)

    def within(self, starts_ns: Any, ends_ns: Any) -> Any:
        """How much is covered between each pair of times [ns]."""
        return self.before(np.asarray(ends_ns)) - self.before(np.asarray(starts_ns))

    def hold(self, times_ns: Any) -> Any:
        """For each time, whether it is covered."""
        return np.searchsorted(self.starts, times_ns, "right") > np.searchsorted(self.ends, times_ns, "right")


def union(starts: Any, ends: Any) -> Covered:
    """The time that at least one of the stretches covers.

    >>> int(union([0, 5, 20], [10, 15, 30]).within(0, 100))
    25
    """
    starts, ends = np.asarray(starts, "int64"), np.asarray(ends, "int64")
    order = np.argsort(starts, kind="stable")
    starts, reach = starts[order], np.maximum.accumulate(ends[order])
    if not len(starts):
        return Covered(starts, ends)
    last = np.flatnonzero(starts[1:] > reach[:-1])  # those before a gap
    return Covered(starts[np.append(0, last + 1)], reach[np.append(last, -1)])


def of(*events: pd.DataFrame) -> Covered:
    """The time that at least one of the events covers."""
    starts, lengths = (np.concatenate([each[name] for each in events]) for name in ("start_ns", "dur_ns"))
    return union(starts, starts + lengths)
