"""Forecasts of one model's step: replays, what they do not see, and surfaces through them, each made once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from effkit.activations import stepping, workspace
from effkit.activations.levers import Levers
from effkit.activations.observing import Observation, observe
from effkit.activations.replaying import Replayer
from effkit.activations.surface import Surface
from effkit.activations.timeline import Timeline
from effkit.activations.workspace import Workspace
from effkit.training import Loss, MakeOptimizer, own_loss, residents, still, unchanged

MakeBatch = Callable[[int, int | None], Any]
_FEWEST_ROWS = 2  # at 1, libraries take other ways than at any other size
_CALIBRATED_ROWS = (_FEWEST_ROWS, _FEWEST_ROWS + 1)


@dataclass(frozen=True)
class Size:
    """Rows of a batch, and the length of its sequences where it has any."""

    num_rows: int
    num_cells: int | None


class Forecaster:
    """Forecasts the steps of a model at any size and with any levers.

    Parameters
    ----------
    model
        The real model: copied, not kept.
    batch
        An example: the size to start from.
    make_batch
        ``(batch_size, length) -> batch``; unless given, the example is repeated and cut.
    """

    def __init__(
        self, model: torch.nn.Module, batch: Any, *, loss: Loss | None = None, optimizer: MakeOptimizer | None = None,
        make_batch: MakeBatch | None = None,
    ) -> None:  # fmt: skip
        self._replayer = Replayer(model, loss, optimizer)
        self._loss, self._optimizer = loss or own_loss, optimizer
        self._make = make_batch or (lambda num_rows, num_cells: stepping.resized(batch, num_rows, num_cells))
        self.size = Size(stepping.rows(batch), stepping.length(batch))
        self.workspace = Workspace({}, {})
        self._timelines: dict[tuple[Size, Levers], Timeline] = {}
        self._surfaces: dict[Levers, Surface] = {}

    def batch(self, size: Size) -> Any:
        """A batch of this size."""
        return self._make(size.num_rows, size.num_cells)

    def timeline(self, size: Size, levers: Levers) -> Timeline:
        """The replay at exactly this setting."""
        key = (size, levers)
        if key not in self._timelines:
            self._timelines[key] = self.workspace.applied(self._replayer.replay(self.batch(size), levers))
        return self._timelines[key]

    def surface(self, levers: Levers) -> Surface:
        """The timeline as a function of the size; takes two or six replays the first time.

        Raises
        ------
        ValueError
            When the step runs other operators at other sizes.
        """
        if levers not in self._surfaces:
            parts, rows, cells = levers.micro_batches, self.size.num_rows, self.size.num_cells
            span = [parts * max(_FEWEST_ROWS, rows // (4 * parts)), parts * max(2 * _FEWEST_ROWS, 4 * rows // parts)]
            lengths = [_thirds(cells // 4, 2 * cells), _thirds(cells // 4, cells)] if cells else [[None]]
            for attempt in lengths:
                sizes = [Size(r, c) for r in span for c in attempt]
                try:
                    timelines = [self.timeline(size, levers) for size in sizes]
                except (RuntimeError, IndexError, ValueError):
                    if attempt is lengths[-1]:
                        raise
                    continue  # longer than the model has positions for
                self._surfaces[levers] = Surface.fit([(s.num_rows, s.num_cells) for s in sizes], timelines)
                break
        return self._surfaces[levers]

    def calibrate(self, model: torch.nn.Module) -> None:
        """Run two small steps of the real model, to learn what its operators allocate inside themselves."""
        cells = self.size.num_cells
        sizes = [Size(rows, cells) for rows in _CALIBRATED_ROWS]
        if cells:
            sizes.append(Size(_FEWEST_ROWS, (cells + 1) // 2))
        observed = [self.observe(model, self.batch(size), Levers()).timeline for size in sizes]
        self.workspace = workspace.fit(observed, [self._replayer.replay(self.batch(size), Levers()) for size in sizes])
        self._timelines.clear()
        self._surfaces.clear()

    def observe(self, model: torch.nn.Module, batch: Any, levers: Levers) -> Observation:
        """A real step, followed."""
        with unchanged(model):
            update = still(model.parameters(), levers.optimizer(self._optimizer))
            stepping.run(model, batch, self._loss, update, levers)  # the optimizer's state exists from here on
            return observe(
                lambda enter: stepping.run(model, batch, self._loss, update, levers, enter), model,
                residents(model, update, batch),
            )  # fmt: skip


def _thirds(low: int, high: int) -> list[int]:
    """Three lengths between these, in multiples of 4: what strides and tiles divide evenly."""
    return [max(4, cells - cells % 4) for cells in (low, (low + high) // 2, high)]
