"""TrainingStudy: a training loop, and what would help it: levers on its time, and on what its peak is made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from effkit import activations
from effkit.account import Account
from effkit.activations import SENT_BYTES, TIME, Levers
from effkit.advice import batch_levers, expert_levers, families, probing, step_hooks
from effkit.advice.leaks import detached_after, growth_bytes
from effkit.advice.levers import LEFT, Advice, Lever, banded, limit_bytes, ranked
from effkit.advice.step_hooks import Intervention
from effkit.advice.training_loop import TrainingLoop
from effkit.device import Device
from effkit.units import readable

_MANY_NUMBERS = 32  # asked for in a step, on a CPU, where nothing is waited for
_WORTH_CASTING_FRAC = 0.15  # of the time in products
_FASTER = 1.2  # bfloat16 products than float32 ones
_LEAK_STEPS = 1000  # over which a leak is counted, unless their number is given
_SHARDS = ("zero1", "zero2", "zero3")
_SHOWN = 6


class TrainingStudy(TrainingLoop):
    """A training loop, with all levers on its time and memory that there is a reason to try, useful or not."""

    _spreads = True

    @cached_property
    def _tried(self) -> dict[int | None, list[Lever]]:
        """Levers on time by budget: to try them takes seconds."""
        return {}

    def _advise(self, goal: str, budget_bytes: int | None, **more: Any) -> Advice:
        if goal == "memory":
            return _on_memory(self, budget_bytes, **more)
        if budget_bytes not in self._tried:
            on_batches, on_experts = batch_levers.levers(self, budget_bytes), expert_levers.levers(self)
            self._tried[budget_bytes] = on_batches + _interventions(self, budget_bytes) + on_experts
        return ranked(goal, self._tried[budget_bytes], **more)


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
        return self.intervention is step_hooks.nothing_recomputed


def _ideas(study: TrainingLoop) -> list[_Idea]:
    heard, weight, ideas = study.heard, next(study.model.parameters()), list[_Idea]()
    if heard.num_asked >= (1 if weight.is_cuda else _MANY_NUMBERS):
        place, times = heard.asked.most_common(1)[0]
        ideas.append(_Idea(
            "synchronisation", "ask for fewer numbers",
            f"a step asks for {heard.num_asked:,} numbers with item(), float() or tolist(), {times:,} of them in "
            f"{place}: each waits for the device",
            "total = total + loss.detach()   # and total.item() once, when it is shown",
            step_hooks.numbers_not_waited_for,
        ))  # fmt: skip
    if heard.zeroed:
        ideas.append(_Idea(
            "gradients", "let go of gradients", "zero_grad(set_to_none=False) writes zeros, and backward adds to them",
            "optimizer.zero_grad(set_to_none=True)", step_hooks.gradients_to_none,
        ))  # fmt: skip
    if heard.num_recomputed:
        ideas.append(_Idea(
            "recomputation", "keep activations", f"{heard.num_recomputed} modules are computed again in backward",
            "model.gradient_checkpointing_disable()   # or call the block, not checkpoint(block)",
            step_hooks.nothing_recomputed,
        ))  # fmt: skip
    rates, share = Device.here().rate_flops_per_s, families.share_of_products(study.rows_ns)
    faster = rates["bfloat16"] / rates["float32"]
    single = weight.dtype == torch.float32 and not heard.autocast
    if single and share >= _WORTH_CASTING_FRAC and faster >= _FASTER:
        ideas.append(_Idea(
            "precision", "bfloat16 products",
            f"products take {share:.0%} of the step, in float32; this device multiplies {faster:.1f} times as fast in "
            "bfloat16", f"with torch.autocast('{weight.device.type}', torch.bfloat16): ...  # around the forward",
            step_hooks.in_bfloat16, ("values are rounded to 8 bits: watch the loss",),
        ))  # fmt: skip
    return ideas


def _interventions(study: TrainingLoop, budget_bytes: int | None) -> list[Lever]:
    if not (ideas := _ideas(study)):
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
        if not (seen := not parts):
            effects.append("tried on two thirds of a batch: a whole one may run other kernels")
            doubt *= 1 + math.log2(3 / 2)  # by so many doublings a whole batch lies beyond what was tried

    def run() -> Account:
        """Every batch with the intervention and without it, in turn."""
        now, then = ([way(study.model)(partial(study.step, batch)) for batch in study.batches]
                     for way in (step_hooks.without_intervening, idea.intervention))  # fmt: skip
        return study.in_turn(now, then)

    predicted = banded(base, {LEFT: round(base.total - saved)}, base.total - saved, doubt,
                       f"steps of {len(tried)} batches with it and without it, in turn, {saving.num_repeats} times",
                       in_range=seen)  # fmt: skip
    return Lever(
        idea.kind, idea.name, idea.found, base, predicted, idea.code, tuple(effects),
        run=run, use=None if idea.intervention is step_hooks.numbers_not_waited_for else  # measures, cannot train
        partial(idea.intervention, study.model), keep=study.receipts.append,
    )  # fmt: skip


def _on_memory(study: TrainingLoop, budget_bytes: int | None, num_ranks: int = 1, **more: Any) -> Advice:
    """Waste first, by what it saves; then, where the peak exceeds the budget, the quickest way to get below it; and
    ways to share the step over ranks."""
    looked = _leak(study, more["num_steps"] or _LEAK_STEPS), _gradients(study)
    wasted = sorted((lever for lever in looked if lever is not None), key=lambda lever: -lever.gain_frac)
    notes: list[str] = []
    limit = limit_bytes(budget_bytes)
    fitting: list[Lever] = []
    if study.memory.total > limit:
        fitting = _fitting(study, limit, notes)
        if study.heard.num_recomputed:
            notes.append(f"the model checkpoints already: {study.heard.num_recomputed} modules are computed again in "
                         "backward")  # fmt: skip
    else:
        notes.append(f"the peak, {readable(study.memory.total, 'bytes')}, is within {readable(round(limit), 'bytes')}: "
                     "nothing that costs time or accuracy is suggested")  # fmt: skip
    found = [*wasted, *fitting, *(_shared(study, num_ranks, limit, notes) if num_ranks > 1 else ())]
    return Advice("memory", tuple(lever for lever in found if lever.helps),
                  tuple(lever for lever in found if not lever.helps), tuple(notes), **more)  # fmt: skip


def _leak(study: TrainingLoop, num_steps: int) -> Lever | None:
    kept = study.kept
    if not kept.num_tensors:
        return None
    peak = study.memory

    def after(growth: int, source: str) -> Account:
        rows = {"peak of one step": peak.total, "kept from step to step": growth * num_steps}
        return Account.of(f"Memory after {num_steps:,} steps", "bytes", rows, total=sum(rows.values()), source=source)

    base = after(kept.growth_bytes, "the allocator, over three steps, times their number")
    left = after(min(kept.own_bytes, kept.growth_bytes), "what these tensors themselves hold")
    slack = num_steps * max(round(0.02 * kept.growth_bytes), 512)
    predicted = banded(base, left.frame["value"].to_dict(), left.total, slack, left.source)
    held = f" in {', '.join(kept.holders)}" if kept.holders else ""

    def run() -> Account:
        with study.held():
            growth = growth_bytes(lambda: detached(study.largest), study.model.parameters())
        return after(max(0, growth), "the allocator, over three steps, each cut from its graph")

    detached = detached_after(study.step)
    return Lever(
        "leak", "keep values, not graphs",
        f"every step leaves {readable(kept.growth_bytes, 'bytes')} behind: {kept.num_tensors} tensors{held} hold the "
        "graph that made them",
        base, predicted, "total = total + loss.detach()   # or loss.item()", run=run, use=lambda: detached,
        keep=study.receipts.append,
    )  # fmt: skip


def _gradients(study: TrainingLoop) -> Lever | None:
    if not study.heard.zeroed:
        return None
    tried = probing.probes([study.largest], [0])
    intervention = step_hooks.gradients_to_none
    with study.held():
        study.step(study.largest)
        peak, margin = study.peaks.at_full(tried, study.largest, intervention)
    base = study.memory

    def run() -> Account:
        with study.held():
            study.step(study.largest)
            truth = study.peaks.of(study.largest, intervention)
        return Account.of(base.title, "bytes", {"peak": truth}, total=truth, source=base.source)

    return Lever(
        "gradients", "let go of gradients", "gradients are zeroed, and stay in memory through the next forward pass",
        base, banded(base, {"peak": peak}, peak, margin, "the peaks of two parts of a batch"),
        "optimizer.zero_grad(set_to_none=True)", run=run, use=partial(intervention, study.model),
        keep=study.receipts.append,
    )  # fmt: skip


def _fitting(study: TrainingLoop, limit: float, notes: list[str]) -> list[Lever]:
    """Combinations of the activation lab's levers that fit, the quickest first."""
    try:
        base = study.lab_base
    except ValueError as error:
        notes.append(f"levers on activations are not visible: {error}")
        return []
    tried: list[Lever] = []
    for lossless in (True, False):  # what changes gradients only where nothing else fits
        table = activations.front(base, lossless=lossless)
        names = table["setting"][table["on_front"] & (table["setting"] != "plain")]
        levers = [_lab_lever(study, base, table.attrs["settings"][name]) for name in names]
        if found := [lever for lever in levers if (lever.predicted.high or lever.predicted.total) <= limit]:
            return found[:_SHOWN]
        tried += levers
    if not tried:
        return []
    notes.append(f"nothing fits into {readable(round(limit), 'bytes')}: the nearest is shown; use a smaller batch")
    return [min(tried, key=lambda lever: lever.predicted.total)]


def _shared(study: TrainingLoop, num_ranks: int, limit: float, notes: list[str]) -> list[Lever]:
    """Ways to share the step over ranks: those that fit first, and of these the one that sends least."""
    try:
        base = study.lab_base
        found = [(shard, activations.predict(base, world_size=num_ranks, shard=shard)) for shard in _SHARDS]
    except ValueError as error:
        notes.append(f"what ranks would hold is not visible: {error}")
        return []
    levers = []
    for shard, predicted in found:
        change: dict[str, Any] = {"world_size": num_ranks, "shard": shard}
        sent = readable(predicted.companion(SENT_BYTES).total, "bytes")
        levers.append(Lever(
            "sharding", f"share the step over {num_ranks} ranks: {shard}",
            f"the peak is {readable(base.total, 'bytes')}; a rank holds all of its own batch's, and a part of the rest",
            base, predicted, f"model, make = activations.spread(model, Sharding(**{change}), torch.optim.AdamW)",
            (f"collectives of {sent} in every step, whose time is not predicted",), group="peak",
            keep=study.receipts.append,
            run=partial(activations.measure, study.model, study.largest, base=base, **change),
        ))  # fmt: skip
    return sorted(
        levers, key=lambda lever: (lever.predicted.total > limit, lever.predicted.companion(SENT_BYTES).total)
    )


def _lab_lever(study: TrainingLoop, base: Account, changes: Mapping[str, Any]) -> Lever:
    levers, predicted = Levers(**changes), activations.predict(base, **changes)
    words = ", ".join(f"{name}={value}" for name, value in changes.items())
    before, after = (account.companion(TIME).total for account in (base, predicted))
    effects = [f"a step takes {after / before - 1:+.0%}, predicted"]
    if not levers.lossless:
        effects.append("gradients or updates are no longer exact")
    lines = [f"with Levers({', '.join(f'{k}={v!r}' for k, v in changes.items())}).applied(model):  # forward"]
    if levers.micro_batches > 1:
        apart = base.calibration.parts_error
        effects.append(f"two micro-batches move this model's gradient by {apart:.2g} of its length, dropout left out")
        lines.append(f"# cut the batch into {levers.micro_batches}, one backward each, one optimizer step")
    if levers.optimizer_states != "float32":
        lines.append(f"optimizer = activations.LowBitAdamW(model.parameters(), states={levers.optimizer_states!r})")
    return Lever(
        "activation memory", words, f"the peak is {readable(base.total, 'bytes')}, of which "
        f"{base.share.get('saved activation', 0.0):.0%} are saved activations", base, predicted, "\n".join(lines),
        tuple(effects), group="peak", keep=study.receipts.append, use=lambda: levers.applied(study.model),
        run=lambda: activations.measure(study.model, study.largest, base=base, **changes),
    )  # fmt: skip
