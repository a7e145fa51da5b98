"""Levers on the peak of a training step: what is kept for nothing first, then what costs time or accuracy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effkit import activations
from effkit.account import Account
from effkit.activations import TIME, Levers
from effkit.advice import interventions, probing
from effkit.advice.leaks import detached_after, growth_bytes
from effkit.advice.levers import Advice, Lever, banded, limit_bytes
from effkit.advice.training_loop import TrainingLoop
from effkit.units import readable

_STEPS = 1000  # over which a leak is counted, unless their number is given
_SHOWN = 6


def advise(study: TrainingLoop, budget_bytes: int | None, **more: Any) -> Advice:
    """Waste first, by what it saves; then, where the peak exceeds the budget, the quickest way to get below it."""
    wasted = [lever for lever in (_leak(study, more["num_steps"] or _STEPS), _gradients(study)) if lever is not None]
    wasted.sort(key=lambda lever: -lever.gain_frac)
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
    found = [*wasted, *fitting]
    return Advice("memory", tuple(lever for lever in found if lever.helps),
                  tuple(lever for lever in found if not lever.helps), tuple(notes), **more)  # fmt: skip


def _leak(study: TrainingLoop, num_steps: int) -> Lever | None:
    kept = study.kept
    if not kept.num_tensors:
        return None
    peak = study.memory
    title = f"Memory after {num_steps:,} steps"

    def rows(growth: int) -> dict[str, int]:
        return {"peak of one step": peak.total, "kept from step to step": growth * num_steps}

    def after(growth: int, source: str) -> Account:
        return Account.of(title, "bytes", rows(growth), total=sum(rows(growth).values()), source=source)

    base = after(kept.growth_bytes, "the allocator, over three steps, times their number")
    left = rows(min(kept.own_bytes, kept.growth_bytes))
    slack = num_steps * max(round(0.02 * kept.growth_bytes), 512)
    predicted = banded(base, left, sum(left.values()), slack, "what these tensors themselves hold")
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
        keep=study._noted,
    )  # fmt: skip


def _gradients(study: TrainingLoop) -> Lever | None:
    if not study.heard.zeroed:
        return None
    tried = probing.probes([study.largest], [0])
    intervention = interventions.gradients_to_none
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
        "optimizer.zero_grad(set_to_none=True)", run=run, use=lambda: intervention(study.model), keep=study._noted,
    )  # fmt: skip


def _fitting(study: TrainingLoop, limit: float, notes: list[str]) -> list[Lever]:
    """Combinations of the activation lab's levers that fit, the quickest first."""
    try:
        base = study.lab_base
    except ValueError as error:
        notes.append(f"levers on activations are not visible: {error}")
        return []
    found: list[Lever] = []
    smallest: Lever | None = None
    for lossless in (True, False):  # what changes gradients only where nothing else fits
        table = activations.front(base, lossless=lossless)
        table = table[table["on_front"] & (table["setting"] != "plain")]
        for name in table["setting"]:
            changes = table.attrs["settings"][name]
            predicted = activations.predict(base, **changes)
            lever = _lab_lever(study, base, predicted, changes)
            smallest = lever if smallest is None or predicted.total < smallest.predicted.total else smallest
            if (predicted.high or predicted.total) <= limit:
                found.append(lever)
        if found:
            break
    if not found and smallest is not None:
        notes.append(f"nothing fits into {readable(round(limit), 'bytes')}: the nearest is shown; use a smaller batch")
        return [smallest]
    return found[:_SHOWN]


def _lab_lever(study: TrainingLoop, base: Account, predicted: Account, changes: Mapping[str, Any]) -> Lever:
    levers = Levers(**changes)
    words = ", ".join(f"{name}={value}" for name, value in changes.items())
    before, after = (account.companion(TIME).total for account in (base, predicted))
    effects = [f"a step takes {after / before - 1:+.0%}, predicted"]
    if not levers.lossless:
        effects.append("gradients or updates are no longer exact")
    if levers.micro_batches > 1:
        apart = base.calibration.parts_error
        effects.append(f"two micro-batches move this model's gradient by {apart:.2g} of its length, dropout left out")
    return Lever(
        "activation memory", words, f"the peak is {readable(base.total, 'bytes')}, of which "
        f"{base.share.get('saved activation', 0.0):.0%} are saved activations", base, predicted, _code(changes),
        tuple(effects), group="peak", keep=study._noted, use=lambda: levers.applied(study.model),
        run=lambda: activations.measure(study.model, study.largest, base=base, **changes),
    )  # fmt: skip


def _code(changes: Mapping[str, Any]) -> str:
    levers = Levers(**changes)
    lines = [f"with Levers({', '.join(f'{k}={v!r}' for k, v in changes.items())}).applied(model):  # forward"]
    if levers.micro_batches > 1:
        lines.append(f"# cut the batch into {levers.micro_batches}, one backward each, one optimizer step")
    if levers.optimizer_states != "float32":
        lines.append(f"optimizer = activations.LowBitAdamW(model.parameters(), states={levers.optimizer_states!r})")
    return "\n".join(lines)
