"""Costs of a model of another width, format or number of heads, of compiled steps, and of a reader without a cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from effkit.decoder.calibration import Calibration
from effkit.decoder.costs import PREFILL, Costs, StepCost
from effkit.decoder.memory import StepSize
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, SELF
from effkit.decoder.setting import DTYPES, Setting
from effkit.least_squares import Floats


def rows_ns(calibration: Calibration, setting: Setting) -> dict[str, float]:
    """Part -> time of one generation [ns] at any setting, before it is anchored to the base."""
    costs, size = _altered(calibration, setting)
    rows = costs.rows(setting, size.prompt_cells)
    if setting.cache == "off":
        rows = _without_cache(costs, setting, size, rows)
    if setting.num_beams > 1:  # the chosen beams' keys and values are copied at every step
        cells = size.prompt_cells + np.arange(1, setting.num_steps)
        per_cell = calibration.memory.cache(setting).self_attention / (size.prompt_cells + setting.num_steps - 1)
        rows[BETWEEN] = rows.get(BETWEEN, 0.0) + float(2 * per_cell * cells.sum() / calibration.read_bytes_per_s * 1e9)
    return rows


def _altered(calibration: Calibration, setting: Setting) -> tuple[Costs, StepSize]:
    """Weights more or fewer cost what this device takes for a weight in a product, of one row or of several."""
    base, costs = calibration.setting, calibration.costs
    now, then = calibration.memory.parameters(setting), calibration.memory.parameters(base)
    size = calibration.memory.step_size(setting)
    same = all(getattr(setting, name) == getattr(base, name) for name in ("width", "kv_heads", "bytes_per_weight"))
    if same and setting.compiled == "off":
        return costs, size
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
    changed = replace(
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
    return changed, size


def _products(calibration: Calibration, setting: Setting) -> Floats:
    """Time per weight at the lattice's rows [ns]. Of fewer bits than any type here has: reading them is all that a
    product costs beyond its arithmetic."""
    times = np.asarray(calibration.products[setting.dtype].times_ns)
    fewer = min(1.0, setting.bytes_per_weight / DTYPES[setting.dtype])
    return times - (1 - fewer) * times[0]


def _without_cache(costs: Costs, setting: Setting, size: StepSize, rows: dict[str, float]) -> dict[str, float]:
    """Every step computes all positions so far, and the keys and values of cross-attention once more."""
    times = {part: time_ns for part, time_ns in rows.items() if part not in costs.layer}
    for position in range(1 if PREFILL in rows else 0, setting.num_steps):
        cells = size.prompt_cells + position
        for part in costs.layer:
            reads = {SELF: cells / 2, CROSS: setting.input_length}.get(part, 0.0)
            times[part] = times.get(part, 0.0) + float(costs.part_ns(part, setting, reads, setting.rows * cells))
    if CROSS_KV in rows:
        times[CROSS_KV] = rows[CROSS_KV] * setting.num_steps
    return times
