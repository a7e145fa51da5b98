"""Dealing the batches of a plan to ranks, so that all take the same steps and draw from one bucket at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from effkit.least_squares import Floats
from effkit.padding.buckets import Ints

_ORDERED = ("sorted", "token_budget")  # neighbouring batches are alike: ranks that share them wait least
Step = list[Ints]  # one batch per rank
Batched = Any  # effkit.padding.plans.Plan, which uses this module


def deal(plan: Batched, world_size: int, rng: np.random.Generator) -> list[Step]:
    """Deal the batches of a plan to ranks: a shuffled list of steps, each with one batch per rank of one bucket.

    What a bucket has left over (fewer batches than ranks) is split until it goes round; too few examples even for that
    join the next bucket, one by one. ValueError when the examples cannot be dealt out evenly, each exactly once.
    """
    groups, leftovers = _dealt(plan, world_size, rng)
    batches = plan.batches
    steps = [[batches[i] for i in group] for group in groups] + leftovers
    return [steps[i] for i in rng.permutation(len(steps))]


def _dealt(plan: Batched, world_size: int, rng: np.random.Generator) -> tuple[list[Ints], list[Step]]:
    """Steps of whole batches, as batch numbers of shape [world_size], and steps of what was left over."""
    batches = plan.batches
    groups: list[Ints] = []
    leftovers: list[Step] = []
    carried: list[Ints] = []
    for bucket in np.unique(plan.bucket):
        members = np.flatnonzero(plan.bucket == bucket)
        if plan.strategy not in _ORDERED:
            members = rng.permutation(members)
        whole = len(members) // world_size * world_size
        groups += list(members[:whole].reshape(-1, world_size))
        carried += [batches[i] for i in members[whole:]]
        if (dealt := _shared_out(carried, world_size)) is None:
            carried = [example[None] for batch in carried for example in batch]
        else:
            leftovers, carried = leftovers + dealt, []
    while (dealt := _shared_out(carried, world_size)) is None:  # too few for a step: share out the last steps with them
        if not (groups or leftovers):
            raise ValueError(
                f"{len(plan.order):,} examples cannot be dealt to {world_size} ranks evenly, each exactly once: use "
                "fewer ranks, larger batches, or a number of examples that the ranks divide"
            )
        carried += [batches[i] for i in groups.pop()] if groups else leftovers.pop()
    return groups, leftovers + dealt


def _shared_out(batches: list[Ints], world_size: int) -> list[Step] | None:
    """These batches as whole steps, split where there are too few; None when there are not examples enough."""
    num_steps = -(-len(batches) // world_size)
    num_pieces = num_steps * world_size
    if sum(map(len, batches)) < num_pieces:
        return None
    pieces = sorted(batches, key=len)
    while len(pieces) < num_pieces:  # halves of the largest: a part of a batch within its limits is within them too
        largest = pieces.pop()
        half = len(largest) // 2
        pieces += [largest[:half], largest[half:]]
        pieces.sort(key=len)
    return [pieces[i * world_size : (i + 1) * world_size] for i in range(num_steps)]


def shares(plan: Batched, per_batch: Any, world_size: int, of_piece: Callable[[Ints], float]) -> Floats:
    """The cost of each rank at each step: shape [steps, world_size].

    ``per_batch`` is what each batch of the plan costs, ``of_piece`` what any other list of examples would.
    """
    costs = np.asarray(per_batch, dtype="float64")
    if world_size == 1:
        return costs[:, None]
    groups, leftovers = _dealt(plan, world_size, np.random.default_rng(0))
    whole = costs[np.array(groups)] if groups else np.empty((0, world_size))
    rest = np.array([[of_piece(piece) for piece in step] for step in leftovers]).reshape(-1, world_size)
    return np.concatenate([whole, rest])
