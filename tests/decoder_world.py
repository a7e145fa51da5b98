"""A world whose generations cost what we say: measurements of it are made up from known costs."""

from __future__ import annotations

import numpy as np
import pandas as pd

from effkit.decoder import accounting, memory
from effkit.decoder.calibration import calibrate, lattice, probes
from effkit.decoder.costs import BulkCost, Costs, Lattice, Run, StepCost
from effkit.decoder.memory import StepSize
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.module_timers import OF_STEP, Watched
from effkit.decoder.product_costs import ProductCost
from effkit.decoder.setting import DTYPES, Setting

NODES = Lattice(depths=(1, 6, 40), rows=(1, 2, 40))  # not those that any calibration here runs


def cost(alone, several, per_row, cold, per_cell=0.0):
    """One row has a cost of its own, several lie on a line; deep decoders pay for cold memory."""
    rows = [alone, several + 2 * per_row, several + 40 * per_row]
    return StepCost(tuple(time + share * cold for share in (0, 0.4, 1) for time in rows), per_cell, most=1e9)


def bulk(fixed, per_cell, per_pair=0.0):
    """A straight line over the cells."""
    return BulkCost((0.0, 1e6), (fixed, fixed + 1e6 * per_cell), per_pair)


COSTS = Costs(
    lattice=NODES,
    layer={
        SELF: cost(150e3, 200e3, 5e3, 30e3, 20),
        CROSS: cost(100e3, 130e3, 4e3, 20e3, 10),
        FFN: cost(120e3, 170e3, 8e3, 60e3),
        NORMS: cost(60e3, 60e3, 1e3, 0),
    },
    step={
        EMBEDDING: cost(200e3, 200e3, 3e3, 300e3),
        OUTPUT: cost(80e3, 100e3, 4e3, 0),
        BETWEEN: cost(150e3, 150e3, 2e3, 100e3),
    },
    keys_values=bulk(50e3, 400),
    front=bulk(500e3, 4000),
    encoder_layer=bulk(200e3, 3000, 0.4),
    prefill={SELF: bulk(100e3, 3000, 5), CROSS: BulkCost(), FFN: bulk(90e3, 9000), NORMS: bulk(50e3, 300)},
    start=(2e6, 100),
)
READ_BYTES_PER_S, PRODUCTS = 20e9, ProductCost((1, 2, 8, 32), (0.2, 0.32, 0.38, 0.62))  # ns per weight


def run(setting: Setting, size: StepSize, costs: Costs = COSTS) -> Run:
    """The generation that these costs give, timed part by part."""
    coded, rows, depth = setting.encoder_layers > 0, setting.rows, setting.depth
    cells = size.prompt_cells + np.arange(setting.num_steps)
    ones = np.ones(setting.num_steps)
    frame = pd.DataFrame(0.0, index=range(setting.num_steps), columns=list(OF_STEP))
    for part in (*costs.layer, *costs.step):
        if part != CROSS or coded:
            reads = {SELF: cells, CROSS: setting.input_length}.get(part, 0)
            frame[part] = costs.part_ns(part, setting, reads) * ones
    frame.loc[0, BETWEEN] = 0.0
    encoder = layers = 0.0
    if coded:
        frame.loc[0, CROSS_KV] = depth * costs.keys_values.ns(rows, setting.input_length)
        layers = setting.encoder_layers * costs.encoder_layer.ns(setting.batch, setting.input_length)
        encoder = layers + costs.front.ns(setting.batch, setting.input_length)
    else:
        for part, bulk in costs.prefill.items():
            frame.loc[0, part] = depth * bulk.ns(rows, size.prompt_cells)
    steps = frame.round().astype("int64")
    start = costs.start[0] + costs.start[1] * rows * depth * setting.input_length
    wall = int(round(encoder) + steps.to_numpy().sum() + round(start))
    return Run(setting, (Watched(steps, round(encoder), round(layers), wall),) * 2, (wall, wall), size)


def measured(model, setting: Setting, costs: Costs = COSTS):
    """The account of a setting in this world, with a calibration through the usual probes."""
    counted = memory.Memory(type(model), model.config, 1, 2 if setting.encoder_layers else None)

    runs = [run(one, counted.step_size(one), costs) for one in (setting, *probes(model, setting))]
    known = calibrate(
        runs, lattice(model, setting), memory=counted, seconds_per_cell=0.01, launches={}, apart={},
        read_bytes_per_s=READ_BYTES_PER_S, products=dict.fromkeys(DTYPES, PRODUCTS),
    )  # fmt: skip
    rows, phases = accounting.measured_rows(runs[0])
    account = accounting.generation_account(
        rows, phases, setting, total_ns=runs[0].total_ns, weight_bytes=counted.weight_bytes(setting),
        cache=counted.cache(setting), seconds_per_cell=0.01, source="this world", calibration=known,
    )  # fmt: skip
    return account, lambda one: run(one, counted.step_size(one), costs).total_ns
