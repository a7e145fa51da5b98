"""Best-fit-decreasing packing on a histogram: the same rows as one item at a time, thousands of items per step."""

from __future__ import annotations

from collections import deque

import numpy as np

from effkit.padding.buckets import Ints


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The row of each item, numbered from 0 without gaps, in the best-fit-decreasing order (Johnson 1974).

    ``lengths`` [num_items] are each in ``1..capacity``, the cells per row.

    Items are taken from long to short; each goes to the row with the least room that still holds it. All items of
    one length, and all rows with one amount of room, are alike: so they move together. A row with room ``r`` takes
    ``r // length`` items in succession, because after each item it is again the fullest row that fits.

    >>> best_fit_decreasing(np.array([3, 5, 2, 4]), capacity=7).tolist()
    [1, 0, 0, 1]
    """
    # counting sort by key: stable, so that equal inputs give equal rows
    order = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    open_rows: list[deque[np.ndarray] | None] = [None] * (capacity + 1)  # room -> chunks of rows with that room
    rooms = 0  # bit r is set when some row has room r: the best fit is then one shift and one lowest bit
    rows = np.empty(len(lengths), dtype="int64")
    num_rows, done = 0, 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                waiting = open_rows[room]
                assert waiting is not None
                chunk = waiting.popleft()
                if not waiting:
                    rooms &= ~(1 << room)
            else:
                room = capacity
                chunk = np.arange(num_rows, num_rows + -(-left // (capacity // length)))
                num_rows += len(chunk)
            each = room // length
            whole = min(len(chunk), left // each)  # rows that take their fill
            changed = [(chunk[:whole], room - each * length), (chunk[whole:], room)]
            rows[order[done : done + whole * each]] = np.repeat(chunk[:whole], each)
            done, left = done + whole * each, left - whole * each
            if left and whole < len(chunk):  # the last few items only part-fill one row
                rows[order[done : done + left]] = chunk[whole]
                changed[1:] = [(chunk[whole : whole + 1], room - left * length), (chunk[whole + 1 :], room)]
                done, left = done + left, 0
            for part, room_left in changed:
                if len(part) and room_left:
                    if (queue := open_rows[room_left]) is None:
                        queue = open_rows[room_left] = deque()
                    queue.append(part) if room_left != room else queue.appendleft(part)
                    rooms |= 1 << room_left
    return rows
