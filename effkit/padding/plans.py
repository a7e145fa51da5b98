"""Plan: what plan() makes, every example in one batch."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.padding.buckets import Ints
from effkit.padding.rank_sharding import shares

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from effkit.padding.sampling import BatchSampler

CELLS = ("input", "output", "input_squared", "flops")


def padded(longest: Any, limits: Mapping[str, Any]) -> Any:
    """This length [cells], or the next multiple that ``limits`` ask for."""
    multiple = limits.get("pad_to_multiple_of") or 1
    return longest if multiple == 1 else -(-longest // multiple) * multiple


def taken(numbers: Any, order: Ints) -> Any:
    """``numbers[order]``, through as few bytes as hold them: a third of the time for a million in any order."""
    if numbers.dtype.kind not in "iu" or numbers.min() < 0:
        return numbers[order]
    return numbers.astype(np.min_scalar_type(numbers.max()))[order].astype(numbers.dtype)


@dataclass(frozen=True, eq=False)
class Plan:
    """Every example in one batch; every batch a list of rows; every row one example (several when packed).

    Attributes
    ----------
    lengths
        The frame that was planned: ``input_length`` and, where known, ``output_length`` [cells].
    strategy, limits
        What was asked for.
    order
        Shape ``[num_examples]``: example indices, batch after batch.
    row_starts
        Shape ``[num_rows]``: where each row begins in ``order``; ``None`` when every example is a row of its own.
    batch_starts
        Shape ``[num_batches]``: where each batch begins, counted in rows.
    bucket
        Shape ``[num_batches]``: the bucket that each batch was drawn from.
    edges
        Upper bounds of the buckets [cells]: columns ``input_length`` and, in 2D, ``output_length``.
    planner
        The function that made it of lengths, strategy and limits; None for batches that somebody else put together.
    """

    lengths: pd.DataFrame
    strategy: str
    limits: Mapping[str, Any]
    order: Ints
    row_starts: Ints | None
    batch_starts: Ints
    bucket: Ints
    edges: pd.DataFrame = field(default_factory=pd.DataFrame)
    planner: Callable[..., Plan] | None = None

    def replanned(self, seed: int) -> Plan:
        """The same strategy and limits once more; by this seed, where chance has a part.

        ValueError when nobody planned these batches.
        """
        if self.planner is None:
            raise ValueError(f"these batches are {self.strategy}: plan() makes a plan that can be followed again")
        limits = {**self.limits, "seed": seed} if "seed" in self.limits else self.limits
        return self.planner(self.lengths, self.strategy, **limits)

    @property
    def num_rows(self) -> int:
        """Rows of the epoch: as many as examples, unless packed."""
        return len(self.order) if self.row_starts is None else len(self.row_starts)

    @cached_property
    def batches(self) -> list[Ints]:
        """Example indices of each batch."""
        return [self.order[first:end] for first, end in pairwise(self._examples.tolist())]

    def rows(self, batch: int) -> list[Ints]:
        """Example indices of each row of one batch."""
        first = int(self.batch_starts[batch])
        last = int(self.batch_starts[batch + 1]) if batch + 1 < len(self.batch_starts) else self.num_rows
        if self.row_starts is None:
            return list(self.order[first:last, None])
        ends = np.append(self.row_starts, len(self.order))
        return [self.order[ends[row] : ends[row + 1]] for row in range(first, last)]

    @cached_property
    def frame(self) -> pd.DataFrame:
        """One row per batch: ``bucket, num_rows, num_examples``; the padded ``input_length`` [cells] and the sums of
        real cells ``input_real, input_squared_real``; where outputs are known, the same for ``output`` and the
        sum of input times output, ``cross_real``.
        """
        columns = {"bucket": self.bucket, "num_rows": self._num_rows, "num_examples": np.diff(self._examples)}
        names = ["input_length", "input_real", "input_squared_real"]
        if "output_length" in self.lengths:
            names += ["output_length", "output_real", "cross_real"]
        return pd.DataFrame(columns | {name: self._column(name) for name in names}).rename_axis("batch")

    @cached_property
    def _num_rows(self) -> Ints:
        return np.diff(self.batch_starts, append=self.num_rows)

    @cached_property
    def _examples(self) -> Ints:
        """Where each batch begins in ``order``, and its end."""
        starts = self.batch_starts if self.row_starts is None else self.row_starts[self.batch_starts]
        return np.append(starts, len(self.order))

    def padded(self, longest: Any) -> Any:
        """The width [cells] of rows, the longest of which is so long."""
        return padded(longest, self.limits)

    def _ordered(self, name: str) -> Ints:
        return taken(self.lengths[name].to_numpy(), self.order)

    def _row_lengths(self, name: str) -> Ints:
        rows = self._ordered(name)
        return rows if self.row_starts is None else np.add.reduceat(rows, self.row_starts)

    def _column(self, name: str) -> Ints:
        if name.endswith("_length"):
            longest = np.maximum.reduceat(self._row_lengths(name), self.batch_starts)
            return self.padded(longest) if name == "input_length" else longest
        factors = {"input_squared_real": ("input_length",) * 2, "cross_real": ("input_length", "output_length")}
        real, *others = (self._ordered(each) for each in factors.get(name, [name.replace("real", "length")]))
        return np.add.reduceat(real * others[0] if others else real, self._examples[:-1])

    def account(self, cells: str = "input", **model: int) -> Account:
        """The cells of one epoch: rows ``real`` and ``padding``, total from the shapes of the batches.

        Parameters
        ----------
        cells
            ``"input"`` or ``"output"`` cells; ``"input_squared"``, the cells of full self-attention; or ``"flops"``
            of a forward pass (see :func:`effkit.padding.plans.forward_flops`, which takes the ``model`` keywords).
        """
        if cells not in CELLS:
            raise ValueError(f"cells is one of {', '.join(CELLS)}; given: {cells!r}")
        if cells == "output" and "output_length" not in self.lengths:
            raise ValueError("these lengths have no outputs to count; ask for cells='input'")
        if cells == "flops":
            # a packed row is computed as one long example, which is what a dense mask does
            real, total = forward_flops(self.lengths, **model), forward_flops(self.frame, **model)
        else:
            name = "output_length" if cells == "output" else "input_length"
            shape, real = self._column(name), int(self._column(f"{cells}_real").sum())
            total = int((self._num_rows * (shape**2 if cells == "input_squared" else shape)).sum())
        padding = total - real
        if cells in ("input", "output"):  # counted row by row, so that the account can fail to close
            padding = int((np.repeat(shape, self._num_rows) - self._row_lengths(name)).sum())
        kind = {"flops": "Forward FLOPs", "input_squared": "Attention cells"}.get(cells, f"{cells.title()} cells")
        return Account.of(
            f"{kind} of one epoch", "FLOPs" if cells == "flops" else "cells", {"real": real, "padding": padding},
            total=total, source="the shapes of the batches", basis="derived",
            setting={"strategy": self.strategy, **self.limits},
        )  # fmt: skip

    def batch_sampler(self, rank: int | None = 0, world_size: int = 1, seed: int = 0) -> BatchSampler:
        """A ``torch.utils.data`` batch sampler that follows this plan's strategy and limits, to take home.

        Under accelerate (so under the Trainer), which shards it: ``rank=None``. Of packed plans, its ``blocks()`` gives
        the positions and boundaries that attention needs.
        """
        from effkit.padding.sampling import BatchSampler  # torch is only needed here

        return BatchSampler(self, rank=rank, world_size=world_size, seed=seed)

    def straggler(self, world_size: int, cells: str = "input") -> float:
        """E[max over ranks] / mean of the padded cells per step: 1.0 is no waiting at all.

        >>> from effkit.padding import plan
        >>> plan(pd.DataFrame({"input_length": [3, 3, 1, 1]}), "sorted", batch_size=1).straggler(2)
        1.0
        """
        if cells not in ("input", "input_squared"):
            raise ValueError(f"cells is input or input_squared; given: {cells!r}")
        power = 2 if cells == "input_squared" else 1
        lengths, cost = self.lengths["input_length"].to_numpy(), self._num_rows * self._column("input_length") ** power
        steps = shares(self, cost, world_size, lambda piece: len(piece) * self.padded(lengths[piece].max()) ** power)
        return float(steps.max(axis=1).sum() / steps.mean(axis=1).sum())

    def plot(self, ax: Axes | None = None, *, num_batches: int = 12) -> Axes:
        """Draw the first batches to scale: real cells filled, padded cells pale. Returns the axes."""
        from effkit import view

        return view.plan(self, ax, num_batches=num_batches)

    def _repr_html_(self) -> str:
        return f"<p>{html.escape(repr(self))}</p>{self.account()._repr_html_()}"

    def __repr__(self) -> str:
        padding = self.account().share["padding"]
        limits = ", ".join(f"{name}={value}" for name, value in self.limits.items() if value is not None)
        return (
            f"Plan {self.strategy}({limits}): {len(self.order):,} examples in {len(self.batch_starts):,} batches, "
            f"{padding:.1%} of the input cells are padding"
        )


def forward_flops(
    shapes: pd.DataFrame, *, hidden: int = 1024, encoder_layers: int = 24, decoder_layers: int = 24,
    subsampling: int = 8,
) -> int:  # fmt: skip
    """Forward FLOPs of an encoder-decoder transformer: of ``num_rows`` examples (one unless there) of each shape, all
    padded to its ``input_length`` and ``output_length``.

    Per layer and example 24·h²·T + 4·h·T² (Narayanan et al. 2021, arXiv 2104.04473, section 5.1, forward pass without
    recomputation: 24·B·s·h² + 4·B·s²·h); a decoder layer adds cross-attention 4·h²·(U + T) + 4·h·U·T. ``T`` is the
    input length after ``subsampling``. The defaults are Canary-1B's 24 + 24 layers of width 1024 with 8x subsampling
    (arXiv 2503.05931, section 3); embeddings and output layer are left out.
    """
    t, u, h = np.asarray(shapes["input_length"]) / subsampling, np.asarray(shapes.get("output_length", 0)), hidden
    encoder = encoder_layers * (24 * h * h * t + 4 * h * t * t)
    decoder = decoder_layers * (24 * h * h * u + 4 * h * u * u + 4 * h * h * (u + t) + 4 * h * u * t)
    return round(float((shapes.get("num_rows", 1) * (encoder + np.where(u > 0, decoder, 0))).sum()))
