"""Timeline: what each operator of a step does, what is alive during it, and the peak that follows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from effkit.activations.stepping import BACKWARD
from effkit.training import size_bytes

PEAK, FORWARD_PEAK = "Peak memory of one step", "Peak memory of a forward pass"
# on a GPU the peak counts whole blocks; beside it, what tensors ask for, and what the allocator holds, free or not
REQUESTED, RESERVED = "Requested memory at its peak", "Reserved memory"
# of a step on one of several ranks: whole parameters and gradients beside the rank's shards, and what is sent
GATHERED, WHOLE_GRADIENT, SENT = ON_RANKS = ("gathered parameter", "unsharded gradient", "communication buffer")
CATEGORIES = (
    "parameter", "buffer", "optimizer state", "input", "gradient", "saved activation", "offloaded activation",
    "recomputed activation", *ON_RANKS, "workspace",
)  # fmt: skip
RESIDENTS = CATEGORIES[:4]
HALF = (torch.bfloat16, torch.float16)
# what a step's time is made of; all of them add up over operators
FEATURES = ("num_operators", "flops", "half_flops", "moved_bytes")
FLOPS, HALF_FLOPS, MOVED = map(FEATURES.index, FEATURES[1:])
Ints = np.ndarray[Any, np.dtype[np.int64]]
# torch counts attention on GPUs only
_COUNTS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda query, key, value, *_, **more: sdpa_flop_count(query.shape, key.shape, value.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **more: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}  # fmt: skip


class Segment(NamedTuple):
    """A phase of a step, and the first of its operators."""

    phase: str
    first: int


class Signature(NamedTuple):
    """What an operator is called on: its name; shape, strides and data type of each tensor; all other arguments; and
    whether in half precision."""

    name: str
    given: tuple[tuple[tuple[int, ...], tuple[int, ...], str], ...] = ()
    others: str = ""
    half: bool = False

    @property
    def kind(self) -> tuple[str, ...]:
        """Name and data types: at other sizes it is the same operator."""
        return self.name, *(dtype for *_, dtype in self.given)


@dataclass(frozen=True, eq=False)
class Timeline:
    """One step, operator by operator.

    Attributes
    ----------
    ops
        Names of the operators below autograd, in order.
    allocations
        One row per storage: ``size_bytes``; ``birth`` and ``death``, the operators during which it is first, and no
        longer, alive; ``category`` of :data:`CATEGORIES`; ``module`` and ``operator`` that saved it (that made it,
        where nothing saved it).
    resident_bytes
        What is there from the beginning, by category.
    segments
        The phases, in order.
    work
        What each operator does: shape [num_ops, len(FEATURES)].
    signatures
        What each operator is called on.
    aside
        Which operators pack or unpack what is kept for backward, and are not the model's own.
    inside_bytes
        What each operator allocates and frees again inside itself, where that is known; else 0.
    let_go
        Of what was there from the beginning: category, first operator that no longer finds it, bytes. An optimizer that
        replaces its state lets go of the old one.
    residents
        Each storage that is there from the beginning: category, bytes.
    """

    ops: tuple[str, ...]
    allocations: pd.DataFrame
    resident_bytes: Mapping[str, int]
    segments: tuple[Segment, ...]
    work: Ints
    signatures: tuple[Signature, ...]
    aside: np.ndarray[Any, np.dtype[np.bool_]]
    inside_bytes: Ints
    let_go: tuple[tuple[str, int, int], ...] = ()
    residents: tuple[tuple[str, int], ...] = ()

    @property
    def phases(self) -> list[str]:
        """The phase that each operator is in."""
        lasts = [*(segment.first for segment in self.segments[1:]), len(self.ops)]
        return [s.phase for s, last in zip(self.segments, lasts, strict=True) for _ in range(s.first, last)]

    @property
    def backward(self) -> int:
        """The first operator of the backward pass; the number of operators where there is none."""
        return next((segment.first for segment in self.segments if segment.phase == BACKWARD), len(self.ops))

    def levels(self) -> Ints:
        """Bytes alive during each operator, by category: shape [num_categories, num_ops]."""
        change = np.zeros((len(CATEGORIES), len(self.ops) + 1), dtype="int64")
        category, size = self.allocations["category"].cat.codes.to_numpy(), self.allocations["size_bytes"].to_numpy()
        np.add.at(change, (category, self.allocations["birth"].to_numpy()), size)
        np.add.at(change, (category, self.allocations["death"].to_numpy()), -size)
        levels = change.cumsum(axis=1)[:, :-1]
        levels[-1] += self.inside_bytes
        for name, amount in self.resident_bytes.items():
            levels[CATEGORIES.index(name)] += amount
        for name, op, amount in self.let_go:
            levels[CATEGORIES.index(name), op:] -= amount
        return levels

    @property
    def peak_bytes(self) -> int:
        """The most that is alive during an operator."""
        return int(self.levels().sum(axis=0).max())

    def main_levels(self) -> Ints:
        """The same for the model's own operators, each at the fullest moment of it and of what follows it aside."""
        levels = self.levels()
        main = np.flatnonzero(~self.aside)
        totals = levels.sum(axis=0)
        ends = np.append(main[1:], len(self.ops))
        return levels[:, [a + int(totals[a:b].argmax()) for a, b in zip(main, ends, strict=True)]]

    @property
    def main_ops(self) -> tuple[str, ...]:
        """Names of the model's own operators."""
        return tuple(name for name, aside in zip(self.ops, self.aside, strict=True) if not aside)

    def with_optimizer_of(self, other: Timeline) -> Timeline:
        """Forward and backward of this step, then the optimizer's step of another of the same model."""
        end, start = self.segments[-1].first, other.segments[-1].first
        before = self.allocations[self.allocations["birth"] < end]
        # gradients and what else backward leaves live to the end of the other optimizer's step, as to that of this one
        death = before["death"]
        before = before.assign(death=death.where(death <= end, death + end + len(other.ops) - start - len(self.ops)))
        after = other.allocations[other.allocations["birth"] >= start]
        after = after.assign(birth=after["birth"] + end - start, death=after["death"] + end - start)
        joined: Any = {name: np.concatenate([getattr(self, name)[:end], getattr(other, name)[start:]])
                       for name in ("work", "aside", "inside_bytes")}  # fmt: skip
        return replace(
            self, ops=self.ops[:end] + other.ops[start:], signatures=self.signatures[:end] + other.signatures[start:],
            allocations=pd.concat([before, after], ignore_index=True), resident_bytes=other.resident_bytes,
            residents=other.residents,
            let_go=tuple((name, op + end - start, amount) for name, op, amount in other.let_go), **joined,
        )  # fmt: skip

    def times_run(self, micro_batches: int) -> Ints:
        """How often a real step runs each operator, of one in which two micro-batches may stand for all: shape
        [num_ops]."""
        count = np.ones(len(self.ops), dtype="int64")
        starts = [segment.first for segment in self.segments]
        if micro_batches > 2 and len(starts) == 5:  # two forwards, two backwards, and the update
            count[starts[2] : starts[4]] = micro_batches - 1  # forward and backward of the second
        return count

    @property
    def retained(self) -> pd.DataFrame:
        """The allocations that the first forward leaves for its backward."""
        kept = self.allocations["category"].isin(["saved activation", "offloaded activation"])
        return self.allocations[kept & (self.allocations["birth"] < self.backward)]


def rows_at(levels: Any) -> dict[str, int]:
    """Bytes by category, those that are there at all."""
    return {name: int(amount) for name, amount in zip(CATEGORIES, levels, strict=True) if amount}


def work_of(
    func: Any, args: Any, kwargs: Any, out: Any, given: list[torch.Tensor], made: list[torch.Tensor]
) -> tuple[int, int, int, int]:
    """One operator, its FLOPs in single and in half precision, and the bytes of what it reads and writes.

    FLOPs are torch's own count of matrix products, convolutions and attention; a view moves nothing.
    """
    sizes = (one.nbytes if one.layout == torch.strided else size_bytes([one]) for one in (*given, *made))
    moved = 0 if func.is_view else sum(sizes)
    count = _COUNTS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
    flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
    half = bool(flops) and given[0].dtype in HALF
    return 1, 0 if half else flops, flops if half else 0, moved
