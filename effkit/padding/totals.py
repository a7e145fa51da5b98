"""The totals of one epoch of a plan: time, cells, steps, peak memory. Measured and predicted accounts share them."""

from __future__ import annotations

from typing import Any

import numpy as np

from effkit.account import Account
from effkit.padding.cost import CostModel
from effkit.padding.plans import Plan

EPOCH_TIME = "Time of one epoch"


def epoch_rows(plan: Plan, cost: CostModel, world_size: int = 1) -> tuple[dict[str, int], float]:
    """What the cost model says an epoch spends its time on, per rank [ns]: the rows, and their sum unrounded.

    ``step overhead`` is the fixed cost of the steps; ``real`` what the real cells alone would take; ``padding`` the
    rest of the computing; ``waiting`` for the slowest rank of each step.
    """
    frame = plan.frame
    times = cost.step_ns(frame["num_rows"], frame["input_length"], frame.get("output_length", 0))
    total, slowest = float(times.sum()), world_total(plan, times, world_size)
    overhead = cost.coefficients[0] * len(frame)
    zeros = np.zeros(1)
    sums = [
        float(frame.get(name, zeros).sum())
        for name in ("input_real", "output_real", "input_squared_real", "cross_real")
    ]
    real = cost.real_ns(*sums)
    rows = {
        "step overhead": round(overhead / world_size),
        "real": round(real / world_size),
        "padding": round((total - overhead - real) / world_size),
    }
    if world_size > 1:
        rows["waiting"] = round(slowest - total / world_size)
    return rows, slowest


def world_total(plan: Plan, per_batch: Any, world_size: int) -> float:
    """Sum over the steps of the slowest rank's share, ranks drawing batches of one bucket at a time."""
    if world_size == 1:
        return float(np.sum(per_batch))
    rng = np.random.default_rng(0)
    slowest = 0.0
    for bucket in np.unique(plan.bucket):
        members = rng.permutation(per_batch[plan.bucket == bucket])
        whole = len(members) // world_size * world_size
        slowest += float(members[:whole].reshape(-1, world_size).max(axis=1).sum())
        slowest += float(members[whole:].sum()) / world_size  # leftovers are split until they go round
    return slowest


def cells_account(plan: Plan, source: str, **more: Any) -> Account:
    """Input cells of the epoch: rows ``real`` and ``padding``."""
    cells = plan.account("input")
    return Account("Input cells of one epoch", "cells", cells.frame, cells.total, source, **more)


def steps_account(plan: Plan, world_size: int, source: str, **more: Any) -> Account:
    """Steps of the epoch, per rank."""
    steps = -(-len(plan.batches) // world_size)
    return Account.of(
        "Steps of one epoch", "steps", {"steps": steps}, total=steps, source=source, basis="derived", **more
    )


def peak_account(peak_bytes: int, source: str, **more: Any) -> Account:
    """The largest peak of any step [bytes]."""
    return Account.of("Peak memory", "bytes", {"largest step": peak_bytes}, total=peak_bytes, source=source, **more)


def setting_of(plan: Plan, world_size: int = 1) -> dict[str, Any]:
    """The knobs at which a plan stands: strategy, its limits, longest input [cells], ranks."""
    numbers = {name: value for name, value in plan.limits.items() if isinstance(value, (int, float))}
    numbers.pop("put_back", None)
    longest = int(plan.lengths["input_length"].max())
    return {"strategy": plan.strategy, **numbers, "max_length": longest, "world_size": world_size}
