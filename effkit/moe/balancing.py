"""Is it worth balancing? The step now, with perfect balance, and with what each policy would get, in time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.lab import calibration_of
from effkit.moe import routing
from effkit.moe.calibration import Calibration, total_ns
from effkit.moe.loads import balanced_placement


def worth_balancing(base: Account, loads: Any = None) -> pd.DataFrame:
    """What balance would save, in nanoseconds of a step.

    ValueError when the loads do not fit the measured layer, or something else decides what travels: compression,
    padding.

    Parameters
    ----------
    base
        What :func:`effkit.moe.measure` returned.
    loads
        Tokens of another router, say your own: [num_steps, num_ranks, num_experts]; by default the measured ones.

    Returns
    -------
    DataFrame
        By ``policy``: ``step_ns``, ``saved_ns`` against now, ``saved_frac``, ``dropped_frac`` of the token copies, and
        ``basis``. ``perfect balance`` is a bound: every rank's copies spread evenly over the experts. The policies:
        ``balanced placement`` by the mean loads, ``capacity 1.0`` (which drops what exceeds it), and
        ``replicate the hottest`` expert of each rank.
    """
    calibration = calibration_of(base, Calibration, "moe")
    setting, owner, num_ranks = calibration.setting, calibration.owner, calibration.num_ranks
    own = np.asarray(calibration.loads if loads is None else loads)
    if own.ndim != 3 or own.shape[1:] != (num_ranks, setting.num_experts):
        raise ValueError(f"loads are tokens by step, rank and expert, shape [num_steps, {num_ranks}, "
                         f"{setting.num_experts}]; given: {own.shape}")  # fmt: skip

    if setting.compress != "none" or setting.pad:
        raise ValueError("loads decide what travels only where nothing is compressed or padded: measure without")

    def time_ns(kept: Any, owner: Any = owner, **changes: Any) -> float:
        changed = setting.change(**changes)
        traffic = [routing.Traffic(step, step, step, np.asarray(owner)) for step in kept]
        return calibration.anchor(changed) * total_ns(calibration.steps(changed, traffic=traffic))

    def row(step_ns: float, dropped_frac: float = 0.0, basis: str = "derived") -> dict[str, Any]:
        return {"step_ns": round(step_ns), "dropped_frac": dropped_frac, "basis": basis}

    now = time_ns(own)
    table = {"now": row(base.total if loads is None else now, basis="measured" if loads is None else "derived")}
    each, rest = np.divmod(own.sum(axis=2, keepdims=True), setting.num_experts)  # spread evenly, to the token
    table["perfect balance"] = row(time_ns(each + (np.arange(setting.num_experts) < rest)))
    if (owner >= 0).all() and setting.num_experts % num_ranks == 0:
        table["balanced placement"] = row(time_ns(own, owner=balanced_placement(own, num_ranks)))
    most = routing.capacity(setting.change(capacity_factor=1.0))
    capped = np.minimum(own, most)
    table["capacity 1.0"] = row(time_ns(capped), float(1 - capped.sum() / own.sum()))
    hottest = np.argsort(-own.sum(axis=(0, 1)), kind="stable")
    copied, held = owner.copy(), []
    for rank in range(num_ranks):
        held += [expert for expert in hottest if owner[expert] == rank][:1]
    copied[held] = -1
    replicas = setting.num_replicas + len(held)
    if setting.num_experts - replicas >= num_ranks:
        table["replicate the hottest"] = row(
            time_ns(own, owner=copied, num_replicas=replicas, placement=tuple(np.maximum(copied, 0).tolist()))
        )
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("policy")
    saved = frame["step_ns"].iloc[0] - frame["step_ns"]
    frame.insert(1, "saved_ns", saved)
    frame.insert(2, "saved_frac", saved / frame["step_ns"].iloc[0])
    return frame
