"""Events of an allocator become lifetimes: each allocation with its free, and each piece of reserved memory."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

ALLOCATION_COLUMNS = ("size_bytes", "alloc_ns", "free_ns", "device", "rank", "stack", "category", "known_by")
SEGMENT_COLUMNS = ("size_bytes", "alloc_ns", "free_ns", "device", "rank")
Range = tuple[int, int]  # from, to (exclusive) [addresses]


def pair(born: Any, *place: Any) -> tuple[Any, Any]:
    """Events of birth and of death, one of each per allocation, in order of birth; -1 where it was not seen.

    ``born`` tells births from deaths; ``place`` are arrays that together say where. A death belongs to the birth
    that comes just before it at the same place.
    """
    order = np.lexsort(place)  # stable: within one place, events stay in order
    before, after = order[:-1], order[1:]
    same = np.logical_and.reduce([key[before] == key[after] for key in place])
    meets = same & born[before] & ~born[after]
    death = np.full(len(born), -1, dtype="int64")
    death[before[meets]] = after[meets]
    unborn = ~born
    unborn[after[meets]] = False
    births, orphans = np.flatnonzero(born), np.flatnonzero(unborn)
    return np.append(np.full(len(orphans), -1), births), np.append(orphans, death[births])


def distinct(times: Any) -> Any:
    """Times [ns] that keep their order and never coincide, each moved later by as little as that takes.

    >>> distinct(np.array([10, 10, 10, 12, 20])).tolist()
    [10, 11, 12, 13, 20]
    """
    steps = np.arange(len(times))
    return np.maximum.accumulate(times - steps) + steps


def moments(times: Any, events: Any) -> Any:
    """Times of events [ns], ``<NA>`` for events that there are not."""
    absent = (events < 0) | (events >= len(times))
    return pd.arrays.IntegerArray(np.append(times, 0)[np.where(absent, -1, events)].astype("int64"), absent)


def chosen(texts: Any, codes: Any) -> Any:
    """A column of texts by number, ``<NA>`` for -1."""
    return pd.array(texts, dtype="str").take(codes, allow_fill=True)


def pieces(final: Iterable[Range], events: Iterable[tuple[bool, Range]], ended: int) -> list[tuple[int, int, int]]:
    """(size [bytes], event that reserved it, event that gave it back) of each piece, in order of birth.

    Undoes the events from the last one on, since only the end is known in full: an expandable segment is mapped
    piece by piece, and given back in other pieces. ``final`` are the ranges reserved at the end, whose pieces are given
    back at ``ended``; ``events`` say whether they reserve (else they give back), and which range. -1 stands for
    "before the first". ValueError when an event reserves what is not there afterwards, or gives back what is.

    >>> pieces([(0, 8)], [(True, (0, 16)), (False, (8, 16))], ended=2)  # 16 bytes reserved, the upper 8 given back
    [(8, 0, 1), (8, 0, 2)]
    """
    rows: list[tuple[int, int, int]] = []
    alive = sorted((start, end, ended) for start, end in final)
    for event, (reserves, (start, end)) in reversed(list(enumerate(events))):
        low = bisect_left(alive, (start,))
        low -= low > 0 and alive[low - 1][1] > start
        high = bisect_left(alive, (end,), low)
        touched, kept, covered = alive[low:high], [], 0
        for from_, to, freed in touched:
            cut = min(to, end) - max(from_, start)
            covered += cut
            rows.append((cut, event, freed))
            kept += [piece for piece in ((from_, start, freed), (end, to, freed)) if piece[0] < piece[1]]
        if covered != (end - start if reserves else 0):
            raise ValueError("its segment events do not lead to its final segments")
        if reserves:
            alive[low:high] = kept
        else:
            insort(alive, (start, end, event))
    before = [(end - start, -1, freed) for start, end, freed in alive]
    return before + rows[::-1]


def segments_of(final: Iterable[Range], grows: Any, ranges: Iterable[Range], times: Any) -> pd.DataFrame:
    """``size_bytes, alloc_ns, free_ns`` of each piece; events at ``times`` reserve the ``ranges`` where ``grows``, else
    give them back."""
    rows = np.array(pieces(final, zip(grows.tolist(), ranges, strict=True), len(times)), "int64").reshape(-1, 3)
    alloc_ns, free_ns = (moments(times, rows[:, column]) for column in (1, 2))
    return pd.DataFrame({"size_bytes": rows[:, 0], "alloc_ns": alloc_ns, "free_ns": free_ns})
