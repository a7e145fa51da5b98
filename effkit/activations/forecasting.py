"""Forecasts of one model's step: replays, what they do not see, and surfaces through them, each made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from effkit.activations import stepping
from effkit.activations.caching_allocator import in_blocks
from effkit.activations.fake_step import Replayer
from effkit.activations.gpu_assumptions import ASSUMED, workspace_bytes
from effkit.activations.levers import Levers, Size
from effkit.activations.memory_model import Surface
from effkit.activations.op_workspace import Workspace
from effkit.activations.real_step import Observation, observe
from effkit.activations.storage_tracker import Follower
from effkit.activations.time_model import Clock
from effkit.activations.timeline import Ints, Timeline, rows_at
from effkit.arguments import shapes
from effkit.restoring import random_numbers_kept, unchanged
from effkit.training import Loss, MakeOptimizer, own_loss, residents, still

MakeBatch = Callable[[int, int | None], Any]
_SMOOTH_FRAC = 0.01
_DOUBT_ELSEWHERE_FRAC = 0.08
_FEWEST_ROWS = 2  # at 1, libraries take other ways than at any other size


class Peak(NamedTuple):
    """Bytes by category at the peak, the operator and the phase it is in; by how many doublings the size lies beyond
    those that were replayed; and whether all operators that may hide memory could be run."""

    rows: dict[str, int]
    op: str
    phase: str
    doublings: float
    seen: bool

    @property
    def covered(self) -> bool:
        """Whether it is in range."""
        return self.seen and not self.doublings


class Forecaster:
    """Forecasts the steps of a model at any size and with any levers.

    The real ``model`` is copied, not kept; ``batch`` is an example, the size to start from, and is repeated and cut
    unless ``make_batch`` is given, ``(batch_size, length) -> batch``. With ``device="cuda"``, or a GPU's name: as on a
    GPU, wherever the model is. Unless it ``trains``, a step is a forward pass without gradients.

    It forecasts around ``size``, and exactly at it: the example's, unless another is set. Operators that hide memory
    are run alone where ``runs_operators`` is set. ``basis``, ``assumptions``
    and ``doubt_frac`` say how its forecasts are known, what they assume, and how far that may be off.
    """

    def __init__(
        self, model: torch.nn.Module, batch: Any, *, loss: Loss | None = None, optimizer: MakeOptimizer | None = None,
        make_batch: MakeBatch | None = None, device: str | None = None, trains: bool = True,
        plan: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        here, named = next(model.parameters()).is_cuda, device not in (None, "cpu")
        elsewhere, self.on_gpu, self.trains = named and not here, named or here, trains
        # a thread of its own runs backward; cuBLAS holds one for each
        self._workspaces = (workspace_bytes(device if named else "cuda"),) * (1 + trains) if self.on_gpu else ()
        self.replayer = Replayer(model, loss, optimizer, as_on_gpu=elsewhere, trains=trains, plan=plan)
        self.basis = "assumed" if elsewhere else "derived"
        self.assumptions = ASSUMED if elsewhere else ""
        self.doubt_frac = _DOUBT_ELSEWHERE_FRAC if elsewhere else 0.0
        self.loss, self.make_optimizer, self.plan = loss or own_loss, optimizer, plan
        self._batch = batch = dict(batch) if isinstance(batch, Mapping) else batch  # whatever kind of mapping it is
        self._make = make_batch
        self._length: stepping.Length | None = None  # while each is tried
        num_rows, found = stepping.rows(batch), stepping.lengths(batch)
        self._length = next((one for one in found if self._varies(num_rows, one)), None)
        self.size = self._example = Size(num_rows, self._length.num_cells if self._length else None)
        self.workspace, self.shapes = Workspace(), shapes(model)
        self.runs_operators = not elsewhere and not any(parameter.is_meta for parameter in model.parameters())
        self._requested: dict[tuple[Size, Levers], Timeline] = {}
        self._placed: dict[tuple[Size, Levers], tuple[Timeline, int]] = {}
        self._surfaces: dict[Levers, Surface | str] = {}  # or why there is none
        self._times: dict[Levers, Any] = {}

    def _varies(self, num_rows: int, length: stepping.Length) -> bool:
        """Whether the model takes a batch whose sequences are half as long, or twice."""
        for num_cells in (length.num_cells // 2, 2 * length.num_cells):
            with suppress(Exception):  # of a make_batch(), which may not know such a length
                batch = self.batch(Size(num_rows, num_cells), length)
                if length._replace(num_cells=num_cells) in stepping.lengths(batch):
                    self.replayer.forward(batch)
                    return True
        return False

    def rest(self) -> dict[str, Any]:
        """The setting of the example, with a plain step."""
        length = {"length": self._example.num_cells, "keep_frac": 1.0} if self._example.num_cells else {}
        return {"batch_size": self._example.num_rows, **length, **asdict(Levers())}

    def batch(self, size: Size, length: stepping.Length | None = None) -> Any:
        """A batch of this size; ``length`` says where its sequences are, if not where they are usually."""
        if self._make is None:
            return stepping.resized(self._batch, size.num_rows, size.num_cells, length or self._length)
        with random_numbers_kept():
            return self._make(size.num_rows, size.num_cells)

    def timeline(self, size: Size, levers: Levers) -> Timeline:
        """The replay at exactly this setting; on a GPU, in the blocks of its allocator."""
        return self.placed(size, levers)[0]

    def placed(self, size: Size, levers: Levers) -> tuple[Timeline, int]:
        """The same, and what the allocator holds for it, in use or not [bytes]."""
        key = (size, levers)
        if key not in self._placed:
            requested = self.requested(size, levers)
            self._placed[key] = in_blocks(requested, self._workspaces) if self.on_gpu else (requested, 0)
        return self._placed[key]

    def requested(self, size: Size, levers: Levers) -> Timeline:
        """The same in the bytes that tensors ask for."""
        key = (size, levers)
        if key in self._requested:
            return self._requested[key]
        plain = replace(levers, optimizer_states="float32")
        states = Levers(optimizer_states=levers.optimizer_states, **levers.sharding)
        if levers not in (plain, states):  # what the optimizer does is the same with any other levers
            self._requested[key] = self.requested(size, plain).with_optimizer_of(self.requested(size, states))
        else:
            self._requested[key] = self._taught(self.replayer.replay(self.batch(size), levers))
        return self._requested[key]

    def _taught(self, replayed: Timeline) -> Timeline:
        """A replay with what its operators allocate inside themselves; on a GPU, with what cuBLAS holds, and without
        what is on the host."""
        if self.runs_operators:
            self.workspace.learn(replayed, self.replayer.calls)
        taught = self.workspace.applied(replayed)
        if not self.on_gpu:
            return taught
        frame = taught.allocations
        sizes = frame["size_bytes"].where(frame["category"] != "offloaded activation", 0)
        inside = taught.inside_bytes + sum(self._workspaces)
        return replace(taught, allocations=frame.assign(size_bytes=sizes), inside_bytes=inside)

    def watch(self, observed: Timeline, size: Size, levers: Levers) -> Timeline:
        """Learn from a real step which operators hide memory; its replay, which knows no more of the step."""
        replayed = self.replayer.replay(self.batch(size), levers)
        self.workspace.watch(observed, replayed)
        self._requested[size, levers] = self._taught(replayed)
        self._placed.pop((size, levers), None)
        return self.timeline(size, levers)

    def surface(self, levers: Levers) -> Surface:
        """The timeline as a function of the size; takes two or six replays the first time.

        ValueError when the step runs other operators at other sizes.
        """
        if levers not in self._surfaces:
            try:
                self._surfaces[levers] = self._checked(self._fitted(levers), levers)
            except ValueError as error:  # kept as well: the next move of a slider need not find it out again
                self._surfaces[levers] = str(error)
        surface = self._surfaces[levers]
        if isinstance(surface, str):
            raise ValueError(surface)
        return surface

    def _fitted(self, levers: Levers) -> Surface:
        parts, rows, cells = levers.micro_batches, self.size.num_rows, self.size.num_cells
        span = [parts * max(_FEWEST_ROWS, rows // (4 * parts)), parts * max(2 * _FEWEST_ROWS, 4 * rows // parts)]
        lengths = _thirds(cells // 4, 2 * cells) if cells else [None]
        sizes = [Size(num_rows, num_cells) for num_rows in span for num_cells in lengths]
        try:
            timelines = [self.requested(size, levers) for size in sizes]
        except ValueError:
            if not cells:
                raise
            # longer than the model has positions for
            sizes = [Size(num_rows, num_cells) for num_rows in span for num_cells in _thirds(cells // 4, cells)]
            timelines = [self.requested(size, levers) for size in sizes]
        return Surface.fit([astuple(size) for size in sizes], timelines)

    def _checked(self, surface: Surface, levers: Levers) -> Surface:
        """Small tensors are not compressed: where that decides the peak, it is no smooth function of the size."""
        exact = self.requested(self.size, levers).peak_bytes
        if abs(surface.peak(*astuple(self.size))[0].sum() / exact - 1) > _SMOOTH_FRAC:
            raise ValueError("the step is no smooth function of its size")
        return surface

    def peak(self, size: Size, levers: Levers, *, exact: bool = False) -> Peak:
        """Bytes by category at the peak, and where in the step it is.

        At the size of the example, where the step is not one function of the size, and when it is to be ``exact``: by a
        replay of just that. Else from the surface.
        """
        if size != self.size and not exact and levers.world_size == 1:
            with suppress(ValueError):
                return self._from_surface(size, levers)
        timeline = self.timeline(size, levers)
        levels = timeline.levels()
        op = int(levels.sum(axis=0).argmax())
        return Peak(rows_at(levels[:, op]), timeline.ops[op], timeline.phases[op], 0.0, self._seen(levers, timeline))

    def _seen(self, levers: Levers, *timelines: Timeline) -> bool:
        # what an operator returns beyond what a replay knows is offloaded too, and no replay says when
        unknown = self.workspace.unknown | (self.workspace.larger if levers.offload_frac else set())
        return not unknown or all(unknown.isdisjoint(timeline.signatures) for timeline in timelines)

    def _from_surface(self, size: Size, levers: Levers) -> Peak:
        surface, count = self.surface(levers), levers.micro_batches
        timeline = surface.timelines[0]
        main = np.flatnonzero(~timeline.aside)
        # a surface is of micro-batches that are all alike; of others the first is larger, and maybe more of them
        fewer, more = divmod(size.num_rows, count)
        second = int(np.searchsorted(main, timeline.segments[2].first)) if count > 1 else len(main)
        spans = [(0, second, fewer + (more > 0)), (second, len(main), fewer + (more > 1))]
        peaks = [surface.peak(rows * count, size.num_cells, first, last) for first, last, rows in spans if last > first]
        levels, op = max(peaks, key=lambda peak: peak[0].sum())
        # blocks are no smooth function of the size: they are as much larger than what they hold as at the exact one
        levels = levels * (self.timeline(self.size, levers).peak_bytes / self.requested(self.size, levers).peak_bytes)
        return Peak(rows_at(levels.round()), timeline.ops[main[op]], timeline.phases[main[op]], surface.doublings(
            size.num_rows, size.num_cells), self._seen(levers, *surface.timelines))  # fmt: skip

    def step_ns(self, size: Size, levers: Levers, clock: Clock) -> float:
        """The time of a step by the clock."""
        if size != self.size:
            with suppress(ValueError):
                surface = self.surface(levers)
                if levers not in self._times:
                    times = [self._by_clock(Size(*setting), levers, clock) for setting in surface.settings]
                    self._times[levers] = np.array(times)
                return surface.amount(self._times[levers], size.num_rows, size.num_cells)
        return self._by_clock(size, levers, clock)

    def _by_clock(self, size: Size, levers: Levers, clock: Clock) -> float:
        if more := size.num_rows % levers.micro_batches:  # between steps whose parts are of one size
            even = (size.num_rows - more, size.num_rows - more + levers.micro_batches)
            times = [self._by_clock(replace(size, num_rows=rows), levers, clock) for rows in even]
            return float(np.interp(size.num_rows, even, times))
        return clock.step_ns(self.timeline(size, levers), levers, self.growth(size))

    def growth(self, size: Size) -> float:
        """How many times as much a batch of this size holds as that of the base."""
        return (size.num_cells or 1) * size.num_rows / ((self.size.num_cells or 1) * self.size.num_rows)

    def observe(
        self, model: torch.nn.Module, batch: Any, levers: Levers, update: torch.optim.Optimizer | None = None
    ) -> Observation:
        """A real step, followed and recorded; ``update`` is the optimizer that these levers ask for."""
        with unchanged(model):
            update = update or still(model.parameters(), levers.optimizer(self.make_optimizer))
            step = partial(stepping.run, model, batch, self.loss, update, levers)
            step()  # the optimizer's state exists from here on
            return observe(step, model, lambda: residents(model, update, batch))

    def follow(
        self, model: torch.nn.Module, batch: Any, levers: Levers, update: torch.optim.Optimizer
    ) -> tuple[Timeline, Ints]:
        """A real step, operator by operator, and how long each took [ns]: not what it allocates inside itself."""
        step = partial(stepping.run, model, batch, self.loss, update, levers)
        if not update.state:
            step()
        follower = Follower(residents(model, update, batch), nullcontext)
        with follower.following(model):
            step(follower.enter)
        return follower.timeline(), follower.durations_ns


def _thirds(low: int, high: int) -> list[int]:
    """Three lengths between these, in multiples of 4: what strides and tiles divide evenly."""
    return [max(4, cells - cells % 4) for cells in (low, (low + high) // 2, high)]
