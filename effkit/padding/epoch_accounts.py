"""The totals of one epoch of a plan: time, cells, steps, peak memory. Measured and predicted accounts share them."""

from __future__ import annotations

from typing import Any

import numpy as np

from effkit.account import Account
from effkit.padding.buckets import Ints
from effkit.padding.cost import CostModel
from effkit.padding.plans import Plan
from effkit.padding.rank_sharding import shares

EPOCH_TIME = "Time of one epoch"
EPOCH_CELLS = "Input cells of one epoch"
PEAK = "Peak memory"
LIMIT_KNOBS = ("batch_size", "max_input_cells", "num_buckets", "num_output_buckets", "quadratic",
               "pad_to_multiple_of", "seed")  # fmt: skip


def epoch_rows(plan: Plan, cost: CostModel, world_size: int = 1) -> tuple[dict[str, int], float, int]:
    """What the cost model says an epoch spends its time on, per rank [ns]: the rows, their sum unrounded, the steps.

    ``step overhead`` is the fixed cost of the steps; ``real`` what the real cells alone would take; ``padding`` the
    rest of the computing; ``waiting`` for the slowest rank of each step.
    """
    frame = plan.frame
    lengths = {name: plan.lengths[name].to_numpy() for name in plan.lengths}
    times = cost.step_ns(frame["num_rows"], frame["input_length"], frame.get("output_length", 0))

    def of_piece(piece: Ints) -> float:
        longest = {name: values[piece].max() for name, values in lengths.items()}
        longest["input_length"] = plan.padded(longest["input_length"])
        return float(cost.step_ns(len(piece), **longest))

    steps = shares(plan, times, world_size, of_piece)
    overhead = cost.coefficients[0] * len(steps)
    names = ("input_real", "output_real", "input_squared_real", "cross_real")
    real = cost.real_ns(*(float(np.sum(frame.get(name, 0))) for name in names)) / world_size
    mean, slowest = float(steps.mean(axis=1).sum()), float(steps.max(axis=1).sum())
    rows = {"step overhead": round(overhead), "real": round(real), "padding": round(mean - overhead - real)}
    if world_size > 1:
        rows["waiting"] = round(slowest - mean)
    return rows, slowest, len(steps)


def cells_account(plan: Plan, source: str, *, exact: bool = False) -> Account:
    """Input cells of the epoch: rows ``real`` and ``padding``; ``exact`` gives a prediction a band of no width."""
    cells = plan.account("input")
    band: dict[str, Any] = {"low": cells.total, "high": cells.total} if exact else {}
    return Account(EPOCH_CELLS, "cells", cells.frame, cells.total, source, **band)


def steps_account(steps: int, source: str, *, exact: bool = False) -> Account:
    """Steps of the epoch, per rank."""
    rows, band = {"steps": steps}, {"low": steps, "high": steps} if exact else {}
    return Account.of("Steps of one epoch", "steps", rows, total=steps, source=source, basis="derived", **band)


def peak_account(peak_bytes: int, source: str, **more: Any) -> Account:
    """The largest peak of any step [bytes]."""
    return Account.of(PEAK, "bytes", {"largest step": peak_bytes}, total=peak_bytes, source=source, **more)


def setting_of(plan: Plan, world_size: int = 1) -> dict[str, Any]:
    """The knobs at which a plan stands: strategy, its limits, longest input [cells], ranks."""
    knobs = {name: tuple(value) if np.ndim(value) else value for name, value in plan.limits.items()
             if name in LIMIT_KNOBS}  # fmt: skip
    knobs = {name: value.item() if isinstance(value, np.generic) else value for name, value in knobs.items()}
    longest = int(plan.lengths["input_length"].max())
    return {"strategy": plan.strategy, **knobs, "max_length": longest, "world_size": world_size}
