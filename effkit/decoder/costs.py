"""What each part of a generation costs, fitted on a few runs whose parts were timed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.decoder.memory import StepSize
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, ENCODER, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.module_timers import Watched
from effkit.decoder.product_costs import Caches
from effkit.decoder.setting import Setting
from effkit.least_squares import Floats, nonnegative

START, PREFILL = "before and after the steps", "prefill"
PER_LAYER = (SELF, CROSS, FFN, NORMS)
PER_STEP = (EMBEDDING, OUTPUT, BETWEEN)
_CROSS_COLD = 0.7  # cost of cold memory in cross-attention over its cost in self-attention
_HINT_WEIGHT = 0.1  # of that ratio, among the rows of the fit
_BINS = 6  # of a run's steps: each counts with its median


@dataclass(frozen=True, eq=False)
class Run:
    """One setting that was run: timed part by part (``watched``) and, in turn, with no clock inside (``plain_ns``)."""

    setting: Setting
    watched: tuple[Watched, ...]
    plain_ns: tuple[int, ...]
    step: StepSize

    @property
    def total_ns(self) -> int:
        """Of the fastest generation: other work on the machine makes one slower, and never faster."""
        return min(self.plain_ns)

    @property
    def fastest(self) -> Watched:
        """The fastest of those with clocks inside."""
        return min(self.watched, key=lambda watched: watched.wall_ns)


@dataclass(frozen=True)
class RowCost:
    """Time of a part in one step [ns]: of one sequence alone, whose products are matrix times vector, and of several.

    One row costs ``alone``, more rows ``several + per_row·rows``. Attention adds ``(per_cell + rising·min(x, most))·x``
    for the ``x = rows·cells`` keys and values that it reads: many are copied more slowly than few. Memory that the
    caches no longer hold adds ``cold``. ``most`` is the largest x of the fitted runs.
    """

    alone: float
    several: float
    per_row: float
    per_cell: float
    cold: float
    rising: float = 0.0
    most: float = 0.0

    def ns(self, rows: int, cold_frac: float, cells: float | Floats = 0.0) -> Any:
        fixed = self.alone if rows <= 1 else self.several + self.per_row * rows
        read = rows * np.asarray(cells)
        return fixed + self.cold * cold_frac + (self.per_cell + self.rising * np.minimum(read, self.most)) * read


@dataclass(frozen=True)
class BulkCost:
    """Time of all positions of an input at once [ns]: ``fixed + per_cell·B·T + per_pair·B·T²``."""

    fixed: float
    per_cell: float
    per_pair: float = 0.0

    def ns(self, batch: float, cells: float) -> float:
        return self.fixed + self.per_cell * batch * cells + self.per_pair * batch * cells * cells

    def times(self, per_cell: float, per_pair: float) -> BulkCost:
        """With more to do for each cell and each pair of cells."""
        return BulkCost(self.fixed, self.per_cell * per_cell, self.per_pair * per_pair)


@dataclass(frozen=True)
class Costs:
    """Costs of all parts [ns].

    Attributes
    ----------
    layer, step
        Part -> its cost per decoder layer of a step, and per step.
    keys_values
        Cross-attention keys and values, per decoder layer.
    front, encoder_layer
        The encoder but for its layers, and one of them.
    prefill
        Of a decoder-only model: the first forward, per layer and part, over the prompt.
    caches
        What cold memory costs depends on.
    start
        Before and after the steps; ``per_cell`` is per cell and decoder layer: a cache is laid out and freed.
    """

    layer: Mapping[str, RowCost]
    step: Mapping[str, RowCost]
    keys_values: BulkCost
    front: BulkCost
    encoder_layer: BulkCost
    prefill: Mapping[str, BulkCost]
    start: BulkCost
    caches: Caches

    def part_ns(self, part: str, setting: Setting, size: StepSize, cells: float | Floats = 0.0, rows: int = 0) -> Any:
        """One part of one step [ns], all its layers together; of ``rows`` sequences, or the setting's."""
        deep, cost = (setting.depth, self.layer[part]) if part in self.layer else (1, self.step[part])
        return deep * cost.ns(rows or setting.rows, self.caches.cold_frac(part, size.read_bytes), cells)

    def rows(self, setting: Setting, size: StepSize) -> dict[str, float]:
        """Part -> time of a whole generation [ns], with a cache, greedy."""
        prompt_cells = size.prompt_cells
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
            times[PREFILL] += float(sum(self.part_ns(part, setting, size) for part in (EMBEDDING, OUTPUT)))
        for part in self.layer:
            read = kv if part == SELF else crossed if part == CROSS else 0.0
            times[part] = float(np.sum(self.part_ns(part, setting, size, read) * np.ones_like(kv)))
        for part in self.step:
            num_times = setting.num_steps - 1 if part == BETWEEN else len(kv)
            times[part] = num_times * float(self.part_ns(part, setting, size))
        times[START] = self.start.fixed + self.start.per_cell * rows * depth * max(crossed, prompt_cells)
        return {part: time_ns for part, time_ns in times.items() if time_ns > 0}


def fit(runs: Sequence[Run], caches: Caches) -> Costs:
    """Costs through these runs, by least squares of relative errors with no cost below 0."""
    layer = {part: _row_cost(runs, part, caches) for part in (SELF, FFN, NORMS)}
    layer[CROSS] = _row_cost(runs, CROSS, caches, hinted_cold=_CROSS_COLD * layer[SELF].cold)
    layer = {part: layer[part] for part in PER_LAYER}
    step = {part: _row_cost(runs, part, caches) for part in PER_STEP}
    coded = [run for run in runs if run.setting.encoder_layers]
    keys_values = front = encoder_layer = BulkCost(0.0, 0.0)
    prefill: dict[str, BulkCost] = {}
    if coded:
        keys_values = _bulk(coded, lambda w, s: w.steps[CROSS_KV].iloc[0] / s.depth, pairs=False)
        front = _bulk(coded, lambda w, s: w.encoder_ns - w.encoder_layers_ns, pairs=False)
        encoder_layer = _bulk(coded, lambda w, s: w.encoder_layers_ns / s.encoder_layers)
    else:
        prefill = {part: _bulk(runs, lambda w, s, part=part: w.steps[part].iloc[0] / s.depth) for part in PER_LAYER}
    costs = Costs(layer, step, keys_values, front, encoder_layer, prefill, BulkCost(0.0, 0.0), caches)
    return replace(costs, start=_start(runs, costs))


def _row_cost(runs: Sequence[Run], part: str, caches: Caches, hinted_cold: float = 0.0) -> RowCost:
    rows, target = [], []
    for run in runs:
        setting = run.setting
        times = _undisturbed([w.steps[part].to_numpy() for w in run.watched])
        times = times / setting.depth if part in PER_LAYER else times
        cells = run.step.prompt_cells + np.arange(len(times))
        for chunk in np.array_split(np.arange(1, len(times)), min(_BINS, max(1, len(times) - 1))):
            if len(chunk):
                reads = {SELF: cells[chunk].mean(), CROSS: setting.input_length}.get(part, 0.0)
                several = setting.rows > 1
                cold = caches.cold_frac(part, run.step.read_bytes)
                rows.append([not several, several, several * setting.rows, setting.rows * reads, cold,
                             (part == SELF) * (setting.rows * reads) ** 2])  # fmt: skip
                target.append(np.median(times[chunk]))
    # of cross-attention: with a cost per cell of the input beside, four runs do not tell all five
    hint = (np.asarray([0, 0, 0, 0, 1.0, 0]), hinted_cold) if hinted_cold else None
    return replace(RowCost(*_fitted(rows, target, hint)), most=max(float(row[3]) for row in rows))


def _bulk(runs: Sequence[Run], time_ns: Any, pairs: bool = True) -> BulkCost:
    rows, target = [], []
    for run in runs:
        setting = run.setting
        cells = setting.rows * setting.input_length
        rows.append([1.0, cells, cells * setting.input_length * pairs])
        target.append(_undisturbed([time_ns(w, setting) for w in run.watched]))
    return BulkCost(*_fitted(rows, target))


def _start(runs: Sequence[Run], costs: Costs) -> BulkCost:
    """What a generation does around its steps, and what its first step takes beyond a later one."""
    rows, target = [], []
    for run in runs:
        setting = run.setting
        cells = setting.input_length if setting.encoder_layers else run.step.prompt_cells
        taken = [w.start_ns for w in run.watched]
        if setting.encoder_layers:
            reads = {SELF: run.step.prompt_cells, CROSS: cells}
            usual = sum(float(costs.part_ns(part, setting, run.step, reads.get(part, 0)))
                        for part in (*PER_LAYER, EMBEDDING, OUTPUT))  # fmt: skip
            taken = [w.start_ns + max(0.0, w.steps.iloc[0].sum() - w.steps[CROSS_KV].iloc[0] - usual)
                     for w in run.watched]  # fmt: skip
        rows.append([1.0, setting.rows * setting.depth * cells])
        target.append(_undisturbed(taken))
    return BulkCost(*_fitted(rows, target))


def _undisturbed(times: Sequence[Any]) -> Any:
    """The lower quartile over repetitions: other work makes a part slower, and never faster."""
    return np.percentile(np.asarray(times, dtype=np.float64), 25, axis=0)


def _fitted(rows: Sequence[Any], target: Sequence[Any], hint: tuple[Floats, float] | None = None) -> list[float]:
    """Relative errors count; a target of nothing costs nothing. A hint, ``row @ x = value``, decides where the rows
    leave a choice."""
    design, times = np.asarray(rows, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if not (times > 0).any():
        return [0.0] * design.shape[1]
    weight = 1.0 / np.maximum(times, 1e-3 * times.max())
    design, times = design * weight[:, None], times * weight
    if hint is not None:
        design, times = np.vstack([design, _HINT_WEIGHT * hint[0] / hint[1]]), np.append(times, _HINT_WEIGHT)
    return [float(value) for value in nonnegative(design, times)]
