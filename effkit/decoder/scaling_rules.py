"""Costs of a model of another width, format or number of heads, of compiled steps, and of a reader without a cache."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from effkit.decoder.calibration import Calibration
from effkit.decoder.costs import PREFILL, START, Costs, RowCost
from effkit.decoder.memory import StepSize
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, ENCODER, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.product_costs import ProductCost
from effkit.decoder.setting import DTYPES, Setting
from effkit.decoder.speculating import expected_tokens


def rows_ns(known: Calibration, setting: Setting) -> dict[str, float]:
    """Part -> time of one generation [ns] at any setting, before it is anchored to the base."""
    costs, size = _altered(known, setting)
    rows = costs.rows(setting, size)
    if setting.cache == "off":
        rows = _without_cache(costs, setting, size, rows)
    if setting.num_beams > 1:  # the chosen beams' keys and values are copied at every step
        cells = size.prompt_cells + np.arange(1, setting.num_steps)
        per_cell = known.memory.cache(setting).self_attention / (size.prompt_cells + setting.num_steps - 1)
        rows[BETWEEN] = rows.get(BETWEEN, 0.0) + float(2 * per_cell * cells.sum() / known.read_bytes_per_s * 1e9)
    if setting.num_draft:
        rows = _speculated(costs, setting, size, rows)
    return rows


def _altered(known: Calibration, setting: Setting) -> tuple[Costs, StepSize]:
    """Weights more or fewer cost what this device takes for a weight in a product, of one row or of several."""
    base, costs = known.setting, known.costs
    now, then = known.memory.parameters(setting), known.memory.parameters(base)
    value_bytes, bytes_before = _value_bytes(setting), _value_bytes(base)
    size = known.memory.step_size(setting)
    same = (setting.width, setting.kv_heads, value_bytes) == (base.width, base.kv_heads, bytes_before)
    if same and setting.compiled == "off":
        return costs, size
    old, new = (_product(known, one) for one in (base, setting))
    wide = (setting.width or 1) / (base.width or 1)
    sizes, before_sizes = known.memory.sizes(setting), known.memory.sizes(base)
    heads = sizes.kv_heads / before_sizes.kv_heads * _cell_bytes(setting) / _cell_bytes(base)

    def row(part: str, cost: RowCost) -> RowCost:
        before, after = then.of_part.get(part, 0), now.of_part.get(part, 0)
        ratio = after / before * (new.per_row / old.per_row if old.per_row else 1) if before else wide
        alone = max(0.0, cost.alone + new.alone * after - old.alone * before)
        several = max(0.0, cost.several + new.several * after - old.several * before)
        if setting.compiled == "on" and part != BETWEEN:  # nothing is launched: what is left is the products
            alone, several = new.alone * after, new.several * after
        per_cell = cost.per_cell * (heads if part == SELF else wide * _cell_bytes(setting) / _cell_bytes(base))
        per_row = cost.per_row * (1.0 if part == BETWEEN else ratio)
        return replace(
            cost, alone=alone, several=several, per_row=per_row, per_cell=per_cell, rising=cost.rising * heads
        )

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


def _product(known: Calibration, setting: Setting) -> ProductCost:
    """Of fewer bits than any type here has: reading them is all that a single row costs."""
    cost = known.products[setting.dtype]
    fewer = min(1.0, _value_bytes(setting) / DTYPES[setting.dtype])
    return ProductCost(cost.alone * fewer, cost.several * fewer, cost.per_row)


def _value_bytes(setting: Setting) -> float:
    return (setting.weight_bits or 8 * DTYPES[setting.dtype]) / 8


def _cell_bytes(setting: Setting) -> int:
    return DTYPES[setting.dtype]


def _without_cache(costs: Costs, setting: Setting, size: StepSize, rows: dict[str, float]) -> dict[str, float]:
    """Every step computes all positions so far, and the keys and values of cross-attention once more."""
    found = {part: value for part, value in rows.items() if part not in costs.layer}
    for position in range(1 if PREFILL in rows else 0, setting.num_steps):
        cells = size.prompt_cells + position
        for part in costs.layer:
            reads = {SELF: cells / 2, CROSS: setting.input_length}.get(part, 0.0)
            found[part] = found.get(part, 0.0) + float(costs.part_ns(part, setting, size, reads, setting.rows * cells))
    if CROSS_KV in rows:
        found[CROSS_KV] = rows[CROSS_KV] * setting.num_steps
    return found


def _speculated(costs: Costs, setting: Setting, size: StepSize, rows: dict[str, float]) -> dict[str, float]:
    """Cycles of ``num_draft`` steps of a draft, and one step of the model over one token more than that."""
    steps = (SELF, CROSS, FFN, NORMS, EMBEDDING, OUTPUT)
    plain = {part: rows[part] for part in steps if part in rows}

    def step_ns(num_rows: int) -> float:
        reads = {SELF: size.prompt_cells + setting.num_steps / 2, CROSS: float(setting.input_length)}
        return sum(float(costs.part_ns(part, setting, size, reads.get(part, 0.0), num_rows)) for part in steps)

    num_cycles = setting.num_steps / expected_tokens(setting.num_draft, setting.acceptance)
    decode = sum(plain.values())
    one = decode / setting.num_steps
    found = {part: value for part, value in rows.items() if part in (ENCODER, CROSS_KV, PREFILL, START)}
    if PREFILL in found:
        found[PREFILL] *= 1 + setting.draft_frac  # the draft reads the prompt too
    found["draft"] = num_cycles * setting.num_draft * setting.draft_frac * one
    found["verify"] = num_cycles * one * step_ns(setting.rows * (setting.num_draft + 1)) / step_ns(setting.rows)
    return found
