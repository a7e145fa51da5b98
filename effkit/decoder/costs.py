"""What each part of a generation costs, fitted on a few runs whose parts were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from effkit.decoder.memory import StepSize
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, ENCODER, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.module_timers import Watched
from effkit.decoder.setting import Setting
from effkit.least_squares import Floats, nonnegative

START, PREFILL = "before and after the steps", "prefill"
PER_LAYER = (SELF, CROSS, FFN, NORMS)
PER_STEP = (EMBEDDING, OUTPUT, BETWEEN)
_BINS = 6  # of a run's steps: each counts with its median
_STRAIGHT = 1e-3  # weight of a bend between nodes beside a relative error: it decides only where no run does


@dataclass(frozen=True, eq=False)
class Run:
    """One setting that was run: timed part by part (``watched``) and, in turn, with no clock inside (``plain_ns``)."""

    setting: Setting
    watched: tuple[Watched, ...]
    plain_ns: tuple[int, ...]
    step: StepSize

    @property
    def total_ns(self) -> int:
        """Of the middle generation: each was told relative to one that was run beside it."""
        return round(np.median(self.plain_ns))

    @cached_property
    def step_ns(self) -> dict[str, Floats]:
        """Part -> its time in each step [ns], undisturbed."""
        return {str(part): self.undisturbed(lambda w, part=part: w.steps[part].to_numpy())
                for part in self.watched[0].steps}  # fmt: skip

    def undisturbed(self, time_ns: Any) -> Any:
        """What ``time_ns`` gives for a watched generation: the middle one of its shares of the whole, over repetitions;
        without what the clocks inside cost."""
        shares = [np.asarray(time_ns(watched), dtype=np.float64) / watched.wall_ns for watched in self.watched]
        return np.median(shares, axis=0) * self.total_ns


@dataclass(frozen=True)
class Lattice:
    """The depths and numbers of rows at which the costs of a step are known; between two of them they are a straight
    line, in the rows and in the logarithm of the depth.

    One row is a product of a matrix and a vector, several are another kernel, and deep decoders do not fit into caches:
    where the cost bends differs from processor to processor, so it is measured at both ends and between.
    """

    depths: tuple[int, ...]
    rows: tuple[int, ...]

    def weights(self, depth: int, rows: float) -> Floats:
        """What each node counts at a place, depth by depth; beyond the outermost depths they count, beyond the rows the
        last line goes on."""
        within = min(max(depth, self.depths[0]), self.depths[-1])
        of_depth = _between(np.log2(self.depths), float(np.log2(within)))
        return np.outer(of_depth, _between(np.asarray(self.rows, dtype=np.float64), rows)).ravel()

    def bends(self) -> Floats:
        """Shape [num_bends, num_nodes]: how far each node lies from the line between its neighbours, and how much the
        line along the rows differs from one depth to the next."""
        deep, wide = (_bends(axis) for axis in (np.log2(self.depths), np.asarray(self.rows, dtype=np.float64)))
        each, step = np.eye(len(self.depths)), np.diff(np.eye(len(self.rows)), axis=0)
        return np.vstack([
            np.kron(deep, np.eye(len(self.rows))), np.kron(each, wide), np.kron(np.diff(each, axis=0), step),
        ])  # fmt: skip


@dataclass(frozen=True)
class StepCost:
    """Time of a part in one step [ns].

    ``nodes`` on the lattice; attention adds ``(per_cell + rising·min(x, most))·x`` for the ``x = rows·cells`` keys and
    values that it reads: many are copied more slowly than few. ``most`` is the largest x of the fitted runs.
    """

    nodes: tuple[float, ...]
    per_cell: float = 0.0
    rising: float = 0.0
    most: float = 0.0

    def ns(self, weights: Floats, read: float | Floats = 0.0) -> Any:
        """At these weights of the nodes, reading so many keys and values."""
        x = np.asarray(read, dtype=np.float64)
        fixed = max(0.0, float(weights @ np.asarray(self.nodes)))
        return fixed + (self.per_cell + self.rising * np.minimum(x, self.most)) * x


@dataclass(frozen=True)
class BulkCost:
    """Time of all positions of an input at once [ns]: on lines between ``nodes`` at so many ``cells = B·T``, plus
    ``per_pair·B·T²``. Many positions cost more each than few where caches no longer hold what lies between operators.
    """

    cells: tuple[float, ...] = (0.0,)
    nodes: tuple[float, ...] = (0.0,)
    per_pair: float = 0.0

    def ns(self, batch: float, length: float) -> float:
        on_lines = _between(np.asarray(self.cells), batch * length) @ np.asarray(self.nodes)
        return max(0.0, float(on_lines)) + self.per_pair * batch * length * length

    def times(self, per_cell: float, per_pair: float) -> BulkCost:
        """With more to do for each cell and each pair of cells; what no cell at all costs stays."""
        none = max(0.0, float(_between(np.asarray(self.cells), 0.0) @ np.asarray(self.nodes)))
        nodes = tuple(max(0.0, none + per_cell * (node - none)) for node in self.nodes)
        return BulkCost(self.cells, nodes, self.per_pair * per_pair)


@dataclass(frozen=True)
class Costs:
    """Costs of all parts [ns]."""

    lattice: Lattice  # where the costs of a step are known
    layer: Mapping[str, StepCost]  # part -> its cost per decoder layer of a step
    step: Mapping[str, StepCost]  # part -> its cost per step
    keys_values: BulkCost  # of cross-attention, per decoder layer
    front: BulkCost  # the encoder but for its layers
    encoder_layer: BulkCost  # one of them
    prefill: Mapping[str, BulkCost]  # of a decoder-only model: the first forward, per layer and part, over the prompt
    # before and after the steps, and so much per cell and decoder layer: a cache is laid out and freed
    start: tuple[float, float] = (0.0, 0.0)

    def part_ns(self, part: str, setting: Setting, cells: float | Floats = 0.0, rows: int = 0) -> Any:
        """One part of one step [ns], all its layers together; of ``rows`` sequences, or the setting's."""
        rows = rows or setting.rows
        deep, cost = (setting.depth, self.layer[part]) if part in self.layer else (1, self.step[part])
        return deep * cost.ns(self.lattice.weights(setting.depth, rows), rows * np.asarray(cells))

    def rows(self, setting: Setting, prompt_cells: int) -> dict[str, float]:
        """Part -> time of a whole generation [ns], with a cache, greedy, after so many cells of prompt."""
        rows, depth, cells = setting.rows, setting.depth, setting.input_length
        crossed = cells if setting.encoder_layers else 0
        times: dict[str, float] = {}
        if setting.encoder_layers:
            layers_ns = setting.encoder_layers * self.encoder_layer.ns(setting.batch, cells)
            times[ENCODER] = self.front.ns(setting.batch, cells) + layers_ns
            times[CROSS_KV] = depth * self.keys_values.ns(rows, cells)
        first = 0 if setting.encoder_layers else 1  # the first forward of a decoder-only model is its prefill
        kv = prompt_cells + np.arange(first, setting.num_steps, dtype=np.float64)
        if first:
            times[PREFILL] = depth * sum(cost.ns(rows, prompt_cells) for cost in self.prefill.values())
            times[PREFILL] += float(sum(self.part_ns(part, setting) for part in (EMBEDDING, OUTPUT)))
        for part in self.layer:
            read = kv if part == SELF else crossed if part == CROSS else 0.0
            times[part] = float(np.sum(self.part_ns(part, setting, read) * np.ones_like(kv)))
        for part in self.step:
            num_times = setting.num_steps - 1 if part == BETWEEN else len(kv)
            times[part] = num_times * float(self.part_ns(part, setting))
        times[START] = self.start[0] + self.start[1] * rows * depth * max(crossed, prompt_cells)
        return {part: time_ns for part, time_ns in times.items() if time_ns > 0}


def fit(runs: Sequence[Run], lattice: Lattice) -> Costs:
    """Costs through these runs, by least squares of relative errors with no cost below 0."""
    layer = {part: _step_cost(runs, part, lattice) for part in PER_LAYER}
    step = {part: _step_cost(runs, part, lattice) for part in PER_STEP}
    coded = [run for run in runs if run.setting.encoder_layers]
    keys_values = front = encoder_layer = BulkCost()
    prefill: dict[str, BulkCost] = {}
    if coded:
        keys_values = _bulk(coded, lambda w, s: w.steps[CROSS_KV].iloc[0] / s.depth, pairs=False)
        front = _bulk(coded, lambda w, s: w.encoder_ns - w.encoder_layers_ns, pairs=False)
        encoder_layer = _bulk(coded, lambda w, s: w.encoder_layers_ns / s.encoder_layers)
    else:
        prefill = {part: _bulk(runs, lambda w, s, part=part: w.steps[part].iloc[0] / s.depth) for part in PER_LAYER}
    costs = Costs(lattice, layer, step, keys_values, front, encoder_layer, prefill)
    return replace(costs, start=_start(runs, costs))


def _step_cost(runs: Sequence[Run], part: str, lattice: Lattice) -> StepCost:
    rows, target = [], []
    for run in runs:
        setting = run.setting
        times = run.step_ns[part] / (setting.depth if part in PER_LAYER else 1)
        cells, nodes = run.step.prompt_cells + np.arange(len(times)), lattice.weights(setting.depth, setting.rows)
        for chunk in np.array_split(np.arange(1, len(times)), min(_BINS, max(1, len(times) - 1))):
            if len(chunk):
                read = setting.rows * {SELF: cells[chunk].mean(), CROSS: setting.input_length}.get(part, 0.0)
                rows.append([*nodes, read, (part == SELF) * read**2])
                target.append(np.median(times[chunk]))
    if not any(target):
        return StepCost((0.0,) * len(lattice.bends().T))
    found = _straightest(rows, target, lattice.bends())
    return StepCost(tuple(found[:-2]), found[-2], found[-1], most=max(float(row[-2]) for row in rows))


def _bulk(runs: Sequence[Run], time_ns: Any, pairs: bool = True) -> BulkCost:
    """Nodes lie at the runs of the base's length: at all its numbers of rows."""
    length = runs[0].setting.input_length
    cells = np.unique([run.setting.rows * length for run in runs if run.setting.input_length == length]).astype(float)
    rows, target = [], []
    for run in runs:
        setting = run.setting
        of_run = setting.rows * setting.input_length
        rows.append([*_between(cells, of_run), of_run * setting.input_length * pairs, 0.0])
        target.append(run.undisturbed(lambda w, setting=setting: time_ns(w, setting)))
    if not any(target):
        return BulkCost()
    *nodes, per_pair, _ = _straightest(rows, target, _bends(cells))
    return BulkCost(tuple(cells.tolist()), tuple(nodes), per_pair)


def _straightest(rows: Sequence[Any], target: Sequence[Any], bends: Floats) -> list[float]:
    """Nodes, and two costs that are not below 0, by least squares of relative errors; where the runs leave a choice,
    those whose lines bend least."""
    times = np.asarray(target, dtype=np.float64)
    weight = _relative(times)
    bends = np.pad(bends, ((0, 0), (0, 2))) * _STRAIGHT / np.median(times[times > 0])
    design = np.vstack([np.asarray(rows, dtype=np.float64) * weight[:, None], bends])
    wanted, scale = np.append(times * weight, np.zeros(len(bends))), np.abs(design).max(axis=0)
    used = np.flatnonzero(scale)
    while True:
        found = np.zeros(design.shape[1])
        found[used] = np.linalg.lstsq(design[:, used] / scale[used], wanted, rcond=None)[0] / scale[used]
        if (found[-2:] >= 0).all():
            return [float(value) for value in found]
        least = len(found) - 2 + int(np.argmin(found[-2:] * scale[-2:]))
        used = used[used != least]


def _start(runs: Sequence[Run], costs: Costs) -> tuple[float, float]:
    """What a generation does around its steps, and what its first step takes beyond a later one."""
    rows, target = [], []
    for run in runs:
        setting, prompt = run.setting, run.step.prompt_cells
        cells, usual = prompt, 0.0
        taken = run.undisturbed(lambda w: w.start_ns)
        if setting.encoder_layers:
            cells = setting.input_length
            reads = {SELF: prompt, CROSS: cells}
            usual = sum(float(costs.part_ns(part, setting, reads.get(part, 0)))
                        for part in (*PER_LAYER, EMBEDDING, OUTPUT))  # fmt: skip
            first = run.undisturbed(lambda w: w.steps.iloc[0].sum() - w.steps[CROSS_KV].iloc[0])
            taken += max(0.0, float(first) - usual)
        rows.append([1.0, setting.rows * setting.depth * cells])
        target.append(max(0.0, float(taken)))
    times = np.asarray(target)
    if not times.any():
        return 0.0, 0.0
    weight = _relative(times)
    fixed, per_cell = nonnegative(np.asarray(rows) * weight[:, None], times * weight)
    return float(fixed), float(per_cell)


def _relative(times: Floats) -> Floats:
    """Weights that make errors relative; times near nothing do not count for more than a thousandth of the longest."""
    return np.asarray(1.0 / np.maximum(times, 1e-3 * times.max()))


def _between(nodes: Floats, place: float) -> Floats:
    """What each node counts on the line between two of them; past the last, the last line goes on."""
    if len(nodes) == 1:
        return np.ones(1)
    weights = np.zeros(len(nodes))
    left = int(np.clip(np.searchsorted(nodes, place) - 1, 0, len(nodes) - 2))
    share = (place - nodes[left]) / (nodes[left + 1] - nodes[left])
    weights[left : left + 2] = 1 - share, share
    return weights


def _bends(nodes: Floats) -> Floats:
    """Shape [max(0, num_nodes - 2), num_nodes]: each inner node minus the line between its neighbours."""
    rows = np.zeros((max(0, len(nodes) - 2), len(nodes)))
    for inner, row in enumerate(rows):
        share = (nodes[inner + 1] - nodes[inner]) / (nodes[inner + 2] - nodes[inner])
        row[inner : inner + 3] = share - 1, 1, -share
    return rows
