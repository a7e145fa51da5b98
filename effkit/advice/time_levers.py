"""Levers on the time of a training step: on its batches, its loader, its experts, and on how the step is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from effkit.account import Account
from effkit.advice import batch_levers, expert_levers, families, interventions, probing
from effkit.advice.interventions import Intervention
from effkit.advice.levers import LEFT, Lever, banded, limit_bytes
from effkit.advice.training_loop import TrainingLoop
from effkit.device import Device
from effkit.units import readable

_MANY_NUMBERS = 32  # asked for in a step, on a CPU, where nothing is waited for
_WORTH_CASTING_FRAC = 0.15  # of the time in products
_FASTER = 1.2  # bfloat16 products than float32 ones


@dataclass(frozen=True)
class _Idea:
    """An intervention, and what the study saw (``found``) that is a reason to try it."""

    kind: str
    name: str
    found: str
    code: str
    intervention: Intervention
    side_effects: tuple[str, ...] = ()

    @property
    def raises_memory(self) -> bool:
        return self.intervention is interventions.nothing_recomputed


def levers(study: TrainingLoop, budget_bytes: int | None) -> list[Lever]:
    """All levers that the study has a reason to try, whether they save time or not."""
    return batch_levers.levers(study, budget_bytes) + _interventions(study, budget_bytes) + expert_levers.levers(study)


def _ideas(study: TrainingLoop) -> list[_Idea]:
    heard, model = study.heard, study.model
    ideas = []
    on_gpu = next(model.parameters()).is_cuda
    if heard.num_asked >= (1 if on_gpu else _MANY_NUMBERS):
        place, times = heard.asked.most_common(1)[0]
        ideas.append(_Idea(
            "synchronisation", "ask for fewer numbers",
            f"a step asks for {heard.num_asked:,} numbers with item(), float() or tolist(), {times:,} of them in "
            f"{place}: each waits for the device",
            "total = total + loss.detach()   # and total.item() once, when it is shown",
            interventions.numbers_not_waited_for,
        ))  # fmt: skip
    if heard.zeroed:
        ideas.append(_Idea(
            "gradients", "let go of gradients", "zero_grad(set_to_none=False) writes zeros, and backward adds to them",
            "optimizer.zero_grad(set_to_none=True)", interventions.gradients_to_none,
        ))  # fmt: skip
    if heard.num_recomputed:
        ideas.append(_Idea(
            "recomputation", "keep activations", f"{heard.num_recomputed} modules are computed again in backward",
            "model.gradient_checkpointing_disable()   # or call the block, not checkpoint(block)",
            interventions.nothing_recomputed,
        ))  # fmt: skip
    if not heard.autocast and _casting_may_pay(study):
        rates = Device.here().rate_flops_per_s
        ideas.append(_Idea(
            "precision", "bfloat16 products",
            f"products take {families.share_of_products(study.rows_ns):.0%} of the step, in float32; this device "
            f"multiplies {rates['bfloat16'] / rates['float32']:.1f} times as fast in bfloat16",
            f"with torch.autocast('{next(model.parameters()).device.type}', torch.bfloat16): ...  # around the forward",
            interventions.in_bfloat16, ("values are rounded to 8 bits: watch the loss",),
        ))  # fmt: skip
    return ideas


def _casting_may_pay(study: TrainingLoop) -> bool:
    rates = Device.here().rate_flops_per_s
    single = next(study.model.parameters()).dtype == torch.float32
    share = families.share_of_products(study.rows_ns)
    return single and share >= _WORTH_CASTING_FRAC and rates["bfloat16"] >= _FASTER * rates["float32"]


def _interventions(study: TrainingLoop, budget_bytes: int | None) -> list[Lever]:
    ideas = _ideas(study)
    if not ideas:
        return []
    levers: list[Lever | None] = []
    with study.held():
        for whole in (True, False):  # what raises memory is tried on parts of a batch
            those = {idea.kind: idea for idea in ideas if idea.raises_memory != whole}
            if those:
                tried = probing.probes(study.batches, study.steps_ns, whole)
                study.step(tried[0])
                ways = {kind: idea.intervention for kind, idea in those.items()}
                savings = probing.savings(study.step, study.model, tried, ways)
                levers += [_lever(study, idea, savings[kind], tried, budget_bytes) for kind, idea in those.items()]
    return [lever for lever in levers if lever is not None]


def _lever(
    study: TrainingLoop, idea: _Idea, saving: probing.Saving, tried: list[Any], budget_bytes: int | None
) -> Lever | None:
    saved, doubt = (amount / len(study.steps_ns) for amount in saving.over(study.steps_ns))
    effects = list(idea.side_effects)
    base, seen = study.account, True
    if idea.raises_memory:
        parts = probing.parts(study.largest)
        with study.held():
            peak, margin = study.peaks.at_full(parts or tried, study.largest, idea.intervention)
        if peak + margin > limit_bytes(budget_bytes):
            return None
        effects.append(f"the peak rises to {readable(peak, 'bytes')}, predicted")
        seen = not parts
        if not seen:
            effects.append("tried on two thirds of a batch: a whole one may run other kernels")
            doubt *= 1 + math.log2(3 / 2)  # by so many doublings a whole batch lies beyond what was tried

    def run() -> Account:
        """Every batch with the intervention and without it, in turn."""
        now, then = ([way(study.model)(partial(study.step, batch)) for batch in study.batches]
                     for way in (interventions.without_intervening, idea.intervention))  # fmt: skip
        return study.in_turn(now, then)

    predicted = banded(base, {LEFT: round(base.total - saved)}, base.total - saved, doubt,
                       f"steps of {len(tried)} batches with it and without it, in turn, {saving.num_repeats} times",
                       in_range=seen)  # fmt: skip
    return Lever(
        idea.kind, idea.name, idea.found, base, predicted, idea.code, tuple(effects),
        run=run, use=None if idea.intervention is interventions.numbers_not_waited_for else  # measures, cannot train
        partial(idea.intervention, study.model), keep=study._noted,
    )  # fmt: skip
