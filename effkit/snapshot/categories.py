"""What allocations are for, where stacks and lifetimes tell; otherwise unknown, never a guess.

Stacks divide the events into *parts* of a step: runs of events that are all in a backward, all in an optimizer's
step, and so on. What lives only inside one part was workspace; what outlives a backward or an optimizer's step is what
that made; what a backward frees though it was made before it, the graph had kept. What an optimizer puts into the place
of a parameter is one. What a module's forward asked for is an activation, also without a backward.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np

from effkit.snapshot.stacks import BACKWARD, FORWARD, INPUT, LIBRARY, NOTHING, OPTIMIZER, OTHER, PARAMETER

CATEGORIES = (
    "unknown", "parameter", "gradient", "optimizer state", "saved activation", "workspace", "input", "activation",
)  # fmt: skip
KNOWN_BY = ("not recorded", "stack", "lifetime", "stack and lifetime")


def categorise(sizes: Any, roles: Any, birth: Any, death: Any, parts: Any, *, step_ended: bool) -> tuple[Any, Any]:
    """Places in ``CATEGORIES`` and in ``KNOWN_BY``, one of each per allocation.

    ``sizes`` are in bytes. ``roles`` is what the stack of each allocation tells, ``NOTHING`` where it was not recorded.
    ``birth`` and ``death`` are events: -1 for a birth before the first, ``len(parts)`` or more for a death after the
    last. ``parts`` is the part of the step that was running at each event, ``NOTHING`` where the event does not tell.
    ``step_ended``: it is recorded that the last optimizer's step came to its end.
    """
    never = len(parts) + 1 + (death.max() if len(death) else 0)
    events = np.flatnonzero(parts != NOTHING)
    edges = np.flatnonzero(np.diff(parts[events], prepend=-1, append=-1))
    first, last, kind = events[edges[:-1]], events[edges[1:] - 1], parts[events[edges[:-1]]]

    def next_that(ends: Any) -> Any:
        """For runs counted from each one on: the first event of the first run for which ``ends``; never if none."""
        starts = np.append(np.where(ends, first, never), never)
        return np.minimum.accumulate(starts[::-1])[::-1]

    after_backward = next_that(kind != BACKWARD)
    after_step = next_that((kind != BACKWARD) & (kind != OPTIMIZER))  # a step may call backward, and the reverse
    if step_ended and len(kind) and kind[-1] == OPTIMIZER:
        after_step[after_step == never] = len(parts)

    born_in = np.searchsorted(first, birth, "right") - 1  # -1: before all of them
    died_in = np.searchsorted(first, death, "right") - 1
    inside = (born_in >= 0) & (death <= np.append(last, -1)[born_in])
    freed_by_backward = (death <= np.append(last, -1)[died_in]) & (np.append(kind, NOTHING)[died_in] == BACKWARD)

    rules = [
        ("parameter", roles == PARAMETER, "stack"),
        ("input", roles == INPUT, "stack"),
        ("workspace", roles == LIBRARY, "stack"),
        ("workspace", inside & np.isin(roles, (FORWARD, BACKWARD, OPTIMIZER)), "stack and lifetime"),
        ("gradient", (roles == BACKWARD) & (death >= after_backward[born_in + 1]), "stack and lifetime"),
        ("optimizer state", (roles == OPTIMIZER) & (death >= after_step[born_in + 1]), "stack and lifetime"),
        ("saved activation", np.isin(roles, (FORWARD, OTHER)) & freed_by_backward, "stack and lifetime"),
        ("activation", roles == FORWARD, "stack"),
    ]
    conditions = [condition for _, condition, _ in rules]
    category = np.select(conditions, [CATEGORIES.index(category) for category, *_ in rules], 0)
    known_by = np.select(conditions, [KNOWN_BY.index(how) for *_, how in rules], 0)
    # what an optimizer made to stay takes the place of what it then frees: of equal sizes the last that was made
    parameter, made = CATEGORIES.index("parameter"), category == CATEGORIES.index("optimizer state")
    freed = (np.append(kind, NOTHING)[died_in] == OPTIMIZER) & (born_in < died_in)
    freed &= category != CATEGORIES.index("gradient")
    waiting: dict[tuple[int, int], list[int]] = defaultdict(list)
    when, rows = np.append(birth[made], death[freed]), np.append(np.flatnonzero(made), np.flatnonzero(freed))
    part, num_made = np.append(born_in[made], died_in[freed]), made.sum()
    for turn in np.lexsort((rows, when)).tolist():
        row, same = rows[turn], waiting[part[turn], sizes[rows[turn]]]
        if turn < num_made:
            same.append(row)
        elif same and category[row] == parameter:
            category[same.pop()] = parameter
        elif same:
            same.pop()
    return category, known_by
