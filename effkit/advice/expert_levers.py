"""Levers on a mixture of experts as it would be on several ranks: the MoE lab, asked about the user's own layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from effkit import moe
from effkit.account import Account
from effkit.advice.experts import ROUNDS, Experts
from effkit.advice.levers import Lever
from effkit.advice.training_loop import TrainingLoop
from effkit.lab import OF_A_MEDIAN, SPREAD, interval

EXPERTS, OUTSIDE = "expert layers", "outside of the expert layers"
_TRAINING = 3  # forward passes that a forward and a backward pass take
_CHUNKS = (2, 4)
_CAPACITY = 1.25
_LEAST_NOISE = 0.03  # of two runs


def levers(study: TrainingLoop) -> list[Lever]:
    """What evens out experts, and what hides their exchange; none where all experts are on one rank."""
    experts = study.experts
    if experts is None or study.num_ranks < 2:
        return []
    layer = study.expert_layer
    base = _step(study, experts, layer)
    busiest = int(experts.popularity.argmax())
    found = (
        f"expert {busiest} of {experts.num_experts} gets {experts.popularity[busiest]:.0%} of the tokens, and all "
        "ranks wait for the one that holds it"
    )
    replicas = max(1, study.num_ranks // 2)

    def lever(
        kind: str, name: str, seen: str, changes: Mapping[str, Any], code: str, effects: tuple[str, ...] = (),
        use: Callable[[], Any] | None = None,
    ) -> Lever:  # fmt: skip
        return Lever(
            kind, name, seen, base, _step(study, experts, _predicted(layer, changes)), code, effects,
            group="experts" if kind == "hot expert" else kind, use=use, keep=study.receipts.append,
            run=lambda: _step(study, experts, moe.measure(base=layer, **changes)),
        )  # fmt: skip

    return [
        lever("hot expert", "experts placed by load", found, {"placement": "balanced"},
              "owner = moe.balanced_placement(loads, num_ranks)   # models.expert_parallel(owner=owner, ...)",
              ("goes by lasting popularity: watch that it lasts",),
              lambda: moe.balanced_placement(experts.loads, study.num_ranks)),
        lever("hot expert", f"{replicas} expert{'s' * (replicas > 1)} on every rank", found, {"num_replicas": replicas},
              "owner[busiest] = -1   # models.expert_parallel(owner=owner, ...)",
              ("its gradients are summed over the ranks", "its weights are on every rank")),
        lever("hot expert", f"a capacity of {_CAPACITY}", found, {"capacity_factor": _CAPACITY},
              f"models.expert_parallel(capacity_factor={_CAPACITY}, ...)", ("tokens beyond it are dropped",)),
        *(lever("overlap", f"the exchange in {num} pieces", "experts wait for whole messages", {"num_chunks": num},
                f"models.expert_parallel(num_chunks={num}, ...)") for num in _CHUNKS),
    ]  # fmt: skip


def _predicted(layer: Account, changes: Mapping[str, Any]) -> Account:
    """The lab's prediction, with a band for the change. At the measured setting the prediction is the measurement: what
    the cost model is wrong by acts on the change, and only the noise of both runs on the whole."""
    predicted, calibration = moe.predict(layer, **changes), layer.calibration
    noise = SPREAD * OF_A_MEDIAN * calibration.noise_frac / math.sqrt(ROUNDS)
    half = calibration.band_frac * abs(layer.total - predicted.total) + max(_LEAST_NOISE, noise) * layer.total
    return replace(predicted, **interval(predicted.total, half))


def _step(study: TrainingLoop, experts: Experts, layer: Account) -> Account:
    """A step on several ranks: what this process takes outside of the expert layers, and these as the lab runs them."""
    inside = min(0.95 * study.computing_ns, _TRAINING * experts.forward_ns)
    outside = study.computing_ns - inside + study.waiting_ns
    num = experts.num_layers

    def whole(value: float) -> int:
        return round(outside + num * value)

    band: Mapping[str, Any] = {}
    if layer.low is not None and layer.high is not None:
        band = {"low": whole(layer.low), "high": whole(layer.high), "in_range": layer.in_range}
    return Account.of(
        f"Time of one step on {study.num_ranks} ranks", "ns",
        {OUTSIDE: round(outside), EXPERTS: round(num * layer.total)}, total=whole(layer.total), basis="derived",
        source=f"one process outside of {num} expert layers, and {layer.source} for each of them", **band,
    )  # fmt: skip
