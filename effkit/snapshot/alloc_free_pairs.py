"""Which allocation and which free of an address belong together, and the columns that tell of such pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

ALLOCATION_COLUMNS = ("size_bytes", "alloc_ns", "free_ns", "device", "rank", "stack", "category", "known_by")


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
