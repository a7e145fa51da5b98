"""watch(loader): what a DataLoader really delivers, seen without changing it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.arguments import checked_loader, checked_whole
from effkit.padding.plans import padded
from effkit.padding.real_cells import input_lengths, output_lengths

_NO_BETTER_FRAC = 0.95  # of the padding that shuffled batches of the same sizes would have
_DRAINED_FRAC = 0.8  # of the usual fill


class Watch:
    """Iterate it in place of the loader, or call :meth:`run`; then read the account and the findings."""

    def __init__(self, loader: Iterable[Any], budget_cells: int | None = None, num_batches: int | None = None) -> None:
        checked_loader(loader)
        if num_batches is not None:
            num_batches = checked_whole("num_batches", num_batches, 1)
        self.loader, self.budget_cells, self.num_batches = loader, budget_cells, num_batches
        self._seen: list[dict[str, Any]] = []
        self._inputs: list[Any] = []
        self._outputs: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        self._seen, self._inputs, self._outputs = [], [], []
        for batch in islice(self.loader, self.num_batches):
            lengths, width = input_lengths(batch)
            row = {"num_rows": len(lengths), "input_length": width, "input_real": int(lengths.sum())}
            self._inputs.append(lengths)
            if (outputs := output_lengths(batch)) is not None and len(outputs[0]) == len(lengths):
                row |= {"output_length": outputs[1], "output_real": int(outputs[0].sum())}
                self._outputs.append(outputs[0])
            self._seen.append(row)
            yield batch

    def __len__(self) -> int:
        whole = len(self.loader)  # type: ignore[arg-type]
        return whole if self.num_batches is None else min(whole, self.num_batches)

    def run(self) -> Watch:
        """Draw the batches now."""
        for _ in self:
            pass
        return self

    @property
    def frame(self) -> pd.DataFrame:
        """One row per batch: ``num_rows``, padded ``input_length`` [cells], sum of real cells ``input_real``."""
        if not self._seen:
            raise ValueError("nothing watched yet: iterate the watch in place of the loader, or call .run()")
        return pd.DataFrame(self._seen).rename_axis("batch")

    @property
    def lengths(self) -> pd.DataFrame:
        """The real length of every example that came by: what :func:`effkit.padding.plan` takes."""
        self.frame  # noqa: B018  (raises when nothing was seen)
        columns = {"input_length": np.concatenate(self._inputs)}
        if len(self._outputs) == len(self._inputs):
            columns["output_length"] = np.concatenate(self._outputs)
        return pd.DataFrame(columns).astype("int64")

    @property
    def account(self) -> Account:
        """Input cells: real ones counted in masks or lengths; padding is what they leave of the tensors' shapes."""
        frame = self.frame
        real, padded = int(frame["input_real"].sum()), int((frame["num_rows"] * frame["input_length"]).sum())
        return Account.of(
            "Input cells watched", "cells", {"real": real, "padding": padded - real},
            total=padded, source="the shapes of the tensors delivered", setting={"num_batches": len(frame)},
        )  # fmt: skip

    @property
    def findings(self) -> list[str]:
        """What deserves a look, in sentences; empty when nothing does."""
        found = self.fixed_width or self._grouping(), self._budget(), self._draining()
        return [sentence for sentence in found if sentence]

    @property
    def padded_to(self) -> dict[str, int] | None:
        """The limit ``pad_to_multiple_of`` of a plan of these batches: {} where rows are padded to the longest, None
        where it is no multiple. One width for all batches is a multiple of itself."""
        widths, longest = self.frame["input_length"].to_numpy(), self._longest
        if (widths == longest).all():
            return {}
        largest = int(np.gcd.reduce(widths))
        divisors = (multiple for multiple in range(largest, 1, -1) if largest % multiple == 0)
        fits = (limit for limit in ({"pad_to_multiple_of": multiple} for multiple in divisors)
                if (padded(longest, limit) == widths).all())  # fmt: skip
        return next(fits, None)

    @property
    def fixed_width(self) -> str | None:
        """The finding that every batch has one width, beyond its longest row; None where it is not so."""
        widths, longest = self.frame["input_length"], self._longest
        if len(widths) < 2 or np.ptp(widths) or min(longest) == widths[0]:
            return None
        words = f"{max(longest)}" if max(longest) < widths[0] else f"{np.median(longest):.0f} on average"
        return f"every batch is {widths[0]} wide, its longest row {words}: pad to the longest row"

    @property
    def _longest(self) -> Any:
        return np.array([rows.max() for rows in self._inputs])

    def _grouping(self) -> str | None:
        frame = self.frame
        padding = float(self.account.share["padding"])
        lengths = np.concatenate(self._inputs)
        sizes = frame["num_rows"].to_numpy()
        if len(frame) < 4 or np.ptp(lengths) == 0 or sizes.max() == 1:
            return None
        starts = np.cumsum(sizes) - sizes
        rng, limits = np.random.default_rng(0), self.padded_to or {}
        draws = [np.maximum.reduceat(rng.permutation(lengths), starts) for _ in range(8)]
        shuffled = np.mean([1 - lengths.sum() / (padded(longest, limits) * sizes).sum() for longest in draws])
        if padding < _NO_BETTER_FRAC * shuffled:
            return None
        return (
            f"length grouping does nothing here: {padding:.1%} of the cells are padding, and shuffled batches of the "
            f"same sizes would have {shuffled:.1%}"
        )

    def _budget(self) -> str | None:
        if self.budget_cells is None:
            return None
        cells = self.frame["num_rows"] * self.frame["input_length"]
        over = cells > self.budget_cells
        if not over.any():
            return None
        return (
            f"{over.sum():,} of {len(cells):,} batches exceed their own budget of {self.budget_cells:,} cells, the "
            f"worst by {cells.max() / self.budget_cells:.2f}x: peak memory follows the worst"
        )

    def _draining(self) -> str | None:
        frame = self.frame
        if len(frame) < 20:
            return None
        fill = (frame["input_real"] / (frame["num_rows"] * frame["input_length"]).max()).to_numpy()
        tail = max(2, len(fill) // 20)
        usual, last = float(np.median(fill[:-tail])), float(np.mean(fill[-tail:]))
        # a shuffled loader may end on a short batch by chance, but not on several of the shortest
        if last >= _DRAINED_FRAC * usual or fill[-tail:].max() >= np.quantile(fill[:-tail], 0.05):
            return None
        return (
            f"the last {tail} batches hold {last / usual:.0%} of the usual cells: the packer or its buckets drain at "
            "the end of the epoch"
        )

    def __repr__(self) -> str:
        if not self._seen:
            return "Watch of a loader, nothing drawn yet"
        return "\n".join([repr(self.account), *(f"  ! {sentence}" for sentence in self.findings)])


def watch(loader: Iterable[Any], *, budget_cells: int | None = None, num_batches: int | None = None) -> Watch:
    """Audit any DataLoader without changing it: it may stay in the training loop.

    ValueError when a batch shows no mask and no lengths, or a mask that may be read both ways: nothing is guessed.

    Parameters
    ----------
    loader
        Yields dicts (objects with the same attributes, tuples) that hold ``attention_mask`` [B, T] (or another mask,
        added ones and those true at padding too), or lengths (``input_lengths``, ``lengths``, ``length``) beside a
        padded tensor; labels are counted where not -100.
    budget_cells
        What the loader believes to be its largest batch [cells].
    num_batches
        Stop after so many.

    Examples
    --------
    >>> for batch in (seen := watch(loader, budget_cells=36_000)):   # doctest: +SKIP
    ...     train(batch)
    >>> seen.account.share["padding"], seen.findings                 # doctest: +SKIP
    """
    return Watch(loader, budget_cells, num_batches)
