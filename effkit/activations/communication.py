"""What the ranks of a step send each other: the collectives of a timeline, and their bytes."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import torch

from effkit.account import Account
from effkit.activations.levers import Levers
from effkit.activations.timeline import Signature, Timeline

SENT_BYTES = "Communication of one step"
ALL_REDUCE, ALL_GATHER, REDUCE_SCATTER, BROADCAST = "all-reduce", "all-gather", "reduce-scatter", "broadcast"
_COLLECTIVES = {  # which of the operator's tensors is whole: the one that no rank has only a part of
    "c10d::_allgather_base_": (ALL_GATHER, 0), "c10d::_reduce_scatter_base_": (REDUCE_SCATTER, 1),
    "c10d::allreduce_": (ALL_REDUCE, 0), "c10d::broadcast_": (BROADCAST, 0),
    "_c10d_functional::all_reduce": (ALL_REDUCE, 0), "_c10d_functional::all_reduce_": (ALL_REDUCE, 0),
    "_c10d_functional::reduce_scatter_tensor": (REDUCE_SCATTER, 0), "_c10d_functional::broadcast": (BROADCAST, 0),
}  # fmt: skip


def sent_account(timeline: Timeline, levers: Levers, **more: Any) -> Account:
    """What :func:`collective_bytes` says of a step with these levers."""
    rows = collective_bytes(timeline, levers.micro_batches)
    return Account.of(SENT_BYTES, "bytes", rows, total=sum(rows.values()), source="the collectives of the step", **more)


def collective_bytes(timeline: Timeline, micro_batches: int = 1) -> dict[str, int]:
    """Bytes of the whole tensors of all collectives in a step, by kind, the largest first.

    On a ring of n ranks each sends (n - 1) / n of that in an all-gather and in a reduce-scatter, twice as much in an
    all-reduce.
    """
    amounts: Counter[str] = Counter()
    for signature, count in zip(timeline.signatures, timeline.times_run(micro_batches), strict=True):
        if signature.name in _COLLECTIVES:
            kind, whole = _COLLECTIVES[signature.name]
            amounts[kind] += int(count) * _bytes(signature, whole)
    return dict(amounts.most_common())


def _bytes(signature: Signature, number: int) -> int:
    shape, _, dtype = signature.given[number]
    size: int = getattr(torch, dtype.removeprefix("torch.")).itemsize
    return math.prod(shape) * size
