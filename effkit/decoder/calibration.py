"""The few short runs that a prediction rests on, what they cover, and what they say of any other setting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.decoder import configurations
from effkit.decoder.costs import PREFILL, Costs, Lattice, Run, StepCost, fit
from effkit.decoder.memory import Memory, in_weights
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, SELF
from effkit.decoder.product_costs import ProductCost
from effkit.decoder.setting import DTYPES, Setting
from effkit.lab import Hull, Trust, noise, rms
from effkit.least_squares import Floats

_ROWS = (1, 2, 8, 32)  # one row and several are different kernels; what lies between bends with the processor
_FEW_STEPS, _SHARE_OF_STEPS = 8, 6  # steps of a probe, and the base's steps over them
_DEEP = 12  # from so many layers on, the other depths are smaller ones
_TOO_LARGE_BYTES = 2**31  # of weights: no deeper model is built then
# Knobs whose effect no probe has shown
_UNSEEN: Mapping[str, Any] = {"cache": "on", "num_beams": 1, "compiled": "off", "weight_bits": 0}
_SAME = ("width", "kv_heads", "dtype")
_SIZES = ("depth", "encoder_layers", "batch", "num_steps", "input_length")


@dataclass(frozen=True, eq=False)
class Observed:
    """The generation that an account was measured from."""

    observed: Run


@dataclass(frozen=True, eq=False)
class Calibration(Observed):
    """What a measurement found, and all that :func:`effkit.decoder.predict` needs. ``observed`` is the first of
    ``runs``, unless it was measured with a base."""

    runs: tuple[Run, ...]  # those that the costs were fitted on: the base first, then the probes
    costs: Costs  # of all parts, through these runs
    memory: Memory  # bytes at any setting
    seconds_per_cell: float | None  # of sound, per cell of the input; None where the input is no sound
    anchor: float  # measured over modelled time of what was observed
    error_frac: float  # root mean square error of runs between the nodes, each left out of the fit in turn
    noise_frac: float  # how far repetitions of one run lay apart
    launches: Mapping[str, int]  # part -> operators that one step launches, views not counted
    apart: Mapping[str, Mapping[str, float]]  # operators, framework -> part -> time alone, of that of a whole step
    read_bytes_per_s: float  # highest rate at which this device reads weights of this size
    products: Mapping[str, ProductCost]  # data type -> what a weight costs in products on this device

    @property
    def setting(self) -> Setting:
        """The calibrated setting, which the costs belong to."""
        return self.runs[0].setting

    @property
    def trust(self) -> Trust:
        """How far a prediction is off."""
        return Trust(self.error_frac, self.noise_frac, len(self.runs[-1].plain_ns))

    def resolved(self, setting: Setting) -> Setting:
        """With parameters held, the setting with the encoder layers that keep the base's number of them."""
        if setting.hold_parameters == "off":
            return setting
        if not setting.encoder_layers:
            raise ValueError("hold_parameters moves layers to an encoder; this model has none")
        rest = self.observed.setting
        base, now = self.memory.parameters(rest), self.memory.parameters(setting)
        total = base.total(rest.encoder_layers, rest.decoder_layers)
        return replace(setting, encoder_layers=now.encoder_layers_for(total, setting.decoder_layers))

    def seen(self, setting: Setting) -> bool:
        """Whether the probes generated this way: greedy, with a cache, in these formats and widths."""
        return all(getattr(setting, name) == value for name, value in _UNSEEN.items()) and all(
            getattr(setting, name) == getattr(self.setting, name) for name in _SAME
        )

    def doublings(self, setting: Setting) -> float:
        """By how many doublings its sizes lie beyond those of the probes; 0 between them."""
        asked, *sizes = ({name: getattr(one, name) for name in _SIZES}
                         for one in (setting, *(run.setting for run in self.runs)))  # fmt: skip
        # fewer steps, or fewer layers of the encoder, are parts of a run
        return Hull.of([*sizes, sizes[0] | {"num_steps": 1, "encoder_layers": min(1, sizes[0]["encoder_layers"])}]
                       ).doublings(asked)  # fmt: skip


def calibrate(runs: Sequence[Run], nodes: Lattice, **known: Any) -> Calibration:
    """Fit the costs; the first run is the base. ``known`` are the fields that no fit gives."""
    costs = fit(runs, nodes)
    return Calibration(runs[0], tuple(runs), costs, anchor=_ratio(runs[0], costs), **_doubts(runs, nodes), **known)


def helps(runs: Sequence[Run], nodes: Lattice) -> bool:
    """Whether one more repeat of each run helps: the band would be clearly narrower."""
    num = len(runs[-1].plain_ns)
    return Trust(**_doubts(runs, nodes), num_repeats=num).shrinks(num + 1)


def _doubts(runs: Sequence[Run], nodes: Lattice) -> dict[str, Any]:
    """The error of the runs between the nodes, each left out of the fit in turn, and the noise of the repeats."""
    errors = []
    for place, run in enumerate(runs):
        if run.setting.depth not in nodes.depths or run.setting.rows not in nodes.rows:
            without = fit([*runs[:place], *runs[place + 1 :]], nodes)
            errors.append(_ratio(runs[0], without) / _ratio(run, without) - 1)
    return {"error_frac": rms(errors), "noise_frac": noise(run.plain_ns for run in runs)}


def _ratio(run: Run, costs: Costs) -> float:
    return run.total_ns / sum(costs.rows(run.setting, run.step.prompt_cells).values())


def overhead_frac(run: Run) -> float:
    """What the clocks inside cost, as a fraction of the time."""
    return float(np.median([watched.wall_ns for watched in run.watched])) / run.total_ns - 1


def lattice(model: Any, base: Setting) -> Lattice:
    """The base's depth and batch among a few others: a shallow decoder whose weights caches hold, and a deep one; one
    row, two, several and many."""
    depth = base.depth
    depths = {max(1, depth // 4), depth, 3 * depth}
    if depth >= _DEEP or 3 * in_weights(model) > _TOO_LARGE_BYTES:
        depths = {max(1, depth // 8), max(1, depth // 3), depth}
    rows = _ROWS if base.batch <= _ROWS[1] else (*_ROWS[:2], base.batch, 4 * base.batch)
    return Lattice(tuple(sorted(depths)), rows)


def probes(model: Any, base: Setting) -> list[Setting]:
    """Short runs at the other nodes of the lattice, and four between them with other lengths and numbers of steps. How
    wrong the fit is on each of those four without it is the predictions' error.
    """
    nodes, coded, length = lattice(model, base), base.encoder_layers, base.input_length
    few, many = min(coded, max(1, coded // 4)), 9 * coded // 4  # as parameters held would have it
    steps = max(_FEW_STEPS, base.num_steps // _SHARE_OF_STEPS)
    (first, *_, last), rows = nodes.depths, nodes.rows
    inner = nodes.depths[len(nodes.depths) // 2]
    below, above = (round((first * inner) ** 0.5), round((inner * last) ** 0.5))
    several, lots = (round((rows[place] * rows[place + 1]) ** 0.5) for place in (1, 2))
    between: list[dict[str, int]] = [
        {"decoder_layers": below, "batch": several, "num_steps": 2 * steps, "input_length": max(1, length // 2)},
        {"decoder_layers": above, "batch": several, "num_steps": steps, "input_length": 2 * length},
        {"decoder_layers": below, "batch": lots, "num_steps": 2 * base.num_steps},
        {"decoder_layers": above, "batch": 1, "num_steps": steps, "encoder_layers": many},
    ]
    return [
        *(_possible(model, base, decoder_layers=layers, batch=batch, encoder_layers=few, num_steps=steps)
          for layers in nodes.depths for batch in rows if (layers, batch) != (base.depth, base.batch)),
        *(_possible(model, base, **{"encoder_layers": few, **changes}) for changes in between),
    ]  # fmt: skip


def _possible(model: Any, base: Setting, **changes: Any) -> Setting:
    """The changed setting, with steps and input within the model's positions."""
    setting = replace(base, exit_layer=0, **changes)
    sizes = configurations.sizes(model.config)
    if hasattr(model.config, "num_mel_bins"):  # Whisper: one length of input only
        setting = replace(setting, input_length=base.input_length)
    if (longest := getattr(model.config, "max_source_positions", None)) and base.encoder_layers:
        setting = replace(setting, input_length=min(setting.input_length, max(longest, base.input_length)))
    if sizes.positions is not None:
        if not base.encoder_layers:
            room = max(base.input_length, sizes.positions - base.num_steps)
            setting = replace(setting, input_length=min(setting.input_length, room))
        prompt = 1 if base.encoder_layers else setting.input_length
        setting = replace(setting, num_steps=min(setting.num_steps, sizes.positions - prompt))
    return setting


def rows_ns(calibration: Calibration, setting: Setting) -> dict[str, float]:
    """Part -> time of one generation [ns] at any setting, before it is anchored to the base."""
    costs, prompt = _altered(calibration, setting), calibration.memory.prompt(setting)
    rows = costs.rows(setting, prompt)
    if setting.cache == "off":  # every step computes all positions so far, and what cross-attention reads once more
        rows = {part: time_ns for part, time_ns in rows.items() if part not in costs.layer}
        for position in range(1 if PREFILL in rows else 0, setting.num_steps):
            so_far = prompt + position
            for part in costs.layer:
                reads = {SELF: so_far / 2, CROSS: setting.input_length}.get(part, 0.0)
                rows[part] = rows.get(part, 0.0) + float(costs.part_ns(part, setting, reads, setting.rows * so_far))
        if CROSS_KV in rows:
            rows[CROSS_KV] *= setting.num_steps
    if setting.num_beams > 1:  # the chosen beams' keys and values are copied at every step
        cells = prompt + np.arange(1, setting.num_steps)
        per_cell = calibration.memory.cache(setting).self_attention / (prompt + setting.num_steps - 1)
        rows[BETWEEN] = rows.get(BETWEEN, 0.0) + float(2 * per_cell * cells.sum() / calibration.read_bytes_per_s * 1e9)
    return rows


def _altered(calibration: Calibration, setting: Setting) -> Costs:
    """Weights more or fewer cost what this device takes for a weight in a product, of one row or of several."""
    base, costs = calibration.setting, calibration.costs
    now, then = calibration.memory.parameters(setting), calibration.memory.parameters(base)
    same = all(getattr(setting, name) == getattr(base, name) for name in ("width", "kv_heads", "bytes_per_weight"))
    if same and setting.compiled == "off":
        return costs
    old, new = _products(calibration, base), _products(calibration, setting)
    wide = (setting.width or 1) / (base.width or 1)
    sizes, before_sizes = calibration.memory.sizes(setting), calibration.memory.sizes(base)
    heads = sizes.kv_heads / before_sizes.kv_heads * DTYPES[setting.dtype] / DTYPES[base.dtype]

    def row(part: str, cost: StepCost) -> StepCost:
        before, after = then.of_part.get(part, 0), now.of_part.get(part, 0)
        nodes = np.reshape(cost.nodes, (-1, len(new)))  # [num_depths, num_rows]
        if not before and part != BETWEEN:  # what several rows take more grows with their width
            nodes = nodes[:, :1] + wide * (nodes - nodes[:, :1])
        nodes = new * after if setting.compiled == "on" and part != BETWEEN else nodes + new * after - old * before
        nodes = np.broadcast_to(np.maximum(0.0, nodes), (len(costs.lattice.depths), len(new)))
        per_cell = cost.per_cell * (heads if part == SELF else wide * DTYPES[setting.dtype] / DTYPES[base.dtype])
        return StepCost(tuple(nodes.ravel().tolist()), per_cell, cost.rising * heads, cost.most)

    per_encoder = now.per_encoder_layer / then.per_encoder_layer if then.per_encoder_layer else 1.0
    return replace(
        costs,
        layer={part: row(part, cost) for part, cost in costs.layer.items()},
        step={part: row(part, cost) for part, cost in costs.step.items()},
        keys_values=costs.keys_values.times(wide**2, wide),
        front=costs.front.times(wide, wide),
        encoder_layer=costs.encoder_layer.times(per_encoder, wide),
        prefill={
            part: cost.times(now.of_part[part] / then.of_part[part] if then.of_part.get(part) else wide, wide)
            for part, cost in costs.prefill.items()
        },
    )  # fmt: skip


def _products(calibration: Calibration, setting: Setting) -> Floats:
    """Time per weight at the lattice's rows [ns]. Of fewer bits than any type here has: reading them is all that a
    product costs beyond its arithmetic."""
    times = np.asarray(calibration.products[setting.dtype].times_ns)
    fewer = min(1.0, setting.bytes_per_weight / DTYPES[setting.dtype])
    return times - (1 - fewer) * times[0]
