"""Allocator events become a tidy allocation frame: one row per allocation, addresses replaced by identities."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

ALLOCATION_COLUMNS = ("size_bytes", "alloc_ns", "free_ns", "device", "rank")


def from_events(memory: pd.DataFrame) -> pd.DataFrame:
    """Pair each allocation with the free of the same address.

    Parameters
    ----------
    memory
        The memory frame of :func:`effkit.trace.read`.

    Returns
    -------
    DataFrame
        Indexed by ``allocation`` (0, 1, … in order of birth). ``alloc_ns`` is ``<NA>`` for what was there before
        the recording began (only its free was seen); ``free_ns`` is ``<NA>`` for what was still alive at its end.
    """
    sizes = memory["size_bytes"].to_numpy()
    addresses = memory["address"].to_numpy()
    times = memory["time_ns"].to_numpy()
    devices = memory["device"].tolist()
    born: list[int] = []  # event of birth, or -1
    died: list[int] = []  # event of death, or -1
    alive: dict[tuple[str, int], int] = {}
    for event, (address, size) in enumerate(zip(addresses.tolist(), sizes.tolist(), strict=True)):
        key = (devices[event], address)
        if size > 0:
            alive[key] = len(born)
            born.append(event)
            died.append(-1)
        elif key in alive:
            died[alive.pop(key)] = event
        else:
            born.append(-1)
            died.append(event)
    birth, death = np.array(born, dtype="int64"), np.array(died, dtype="int64")
    seen = np.where(birth >= 0, birth, death)  # the event that tells size and place
    frame = pd.DataFrame(
        {
            "size_bytes": np.abs(sizes[seen]),
            "alloc_ns": _times(times, birth),
            "free_ns": _times(times, death),
            "device": memory["device"].iloc[seen].array,
            "rank": memory["rank"].to_numpy()[seen],
        }
    )
    return frame.rename_axis("allocation")


def _times(times: Any, events: Any) -> Any:
    """Times of events [ns], ``<NA>`` for event -1."""
    padded = np.append(times, 0)  # so that event -1 has something to point at
    return pd.arrays.IntegerArray(padded[events].astype("int64"), events < 0)
