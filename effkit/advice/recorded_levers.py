"""Levers on a run that is over: a recording bounds what each could save, and no more than that."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effkit.account import Account
from effkit.advice import families
from effkit.advice.levers import Advice, Lever, banded, ranked
from effkit.advice.loop_comparison import LEFT
from effkit.panes.breakdown import cold, mean_of
from effkit.units import readable

if TYPE_CHECKING:
    from effkit.advice.subjects import Recorded

NOT_VISIBLE, HOST_BUSY = "not visible", "host busy, device idle"
_LEAST_FRAC = 0.05  # of a step: a row below it is not worth a word
_BOUNDS = (
    "these are bounds, from a recording: a lever can save no more than what it acts on took, and may save nothing; "
    "study the loop live (step=, model=, loader=) to have gains predicted from runs, and measured"
)
_LABS = {
    **dict.fromkeys(("saved activation", "recomputed activation", "workspace"), "ek.activations"),
    "optimizer state": "ek.activations (LowBitAdamW)",
    "gradient": "ek.activations (gradients at once used up)",
    "parameter": "ek.decoder.roofline, or a model of fewer or narrower weights",
    "input": "ek.padding",
}


def of_time(study: Recorded, goal: str, **more: Any) -> Advice:
    """Levers that bound what could be saved of the rows of a step's time."""
    base = study.time
    if base is None:
        return Advice(goal, (), notes=("time is not visible: no trace was given; give trace= as well",), **more)
    bounds = [_loading(study, base), *_communication(study, base), *_idle_device(study, base)] if base.total else []
    levers = [lever for lever in bounds if lever.gain_frac >= _LEAST_FRAC]
    blind = int(base.frame["value"].get(NOT_VISIBLE, 0))
    notes = cold(study.parts)
    notes.append(_BOUNDS if levers else f"no row that a lever could shorten takes {_LEAST_FRAC:.0%} of {study.unit}")
    if blind >= _LEAST_FRAC * base.total:
        notes.append(f"{_share(blind, study, base)} is device work that was not recorded: nothing is said of it")
    return replace(ranked(goal, levers, **more), notes=tuple(notes))


def of_memory(memory: Account | None, budget_bytes: int | None, **more: Any) -> Advice:
    """No lever: files do not say what a category would be with another setting."""
    if memory is None:
        return Advice("memory", (), notes=("memory is not visible: it was not recorded; give snapshot=",), **more)
    largest = str(memory.frame["value"].idxmax())
    size = int(memory.frame["value"].max())
    lab = _LABS.get(largest)
    look = "look at Capture.memory(by='stack') to see where it was allocated"
    look = f"measure the model live in {lab}" if lab else look
    notes = [f"what a lever saves cannot be predicted from files; the largest part of the peak of "
             f"{readable(memory.total, 'bytes')} is {largest}, {readable(size, 'bytes')}: {look}"]  # fmt: skip
    if budget_bytes is not None:
        over = memory.total - budget_bytes
        notes.append(f"the peak exceeds {readable(budget_bytes, 'bytes')} by {readable(over, 'bytes')}" if over > 0
                     else f"the peak is within {readable(budget_bytes, 'bytes')}")  # fmt: skip
    return Advice("memory", (), notes=tuple(notes), **more)


def _lever(
    base: Account, kind: str, name: str, found: str, amount_ns: float, code: str, effects: tuple[str, ...] = (),
    group: str = "",
) -> Lever:  # fmt: skip
    """All of the time that it acts on may go, or nothing."""
    left = round(base.total - min(amount_ns, float(base.total)))
    predicted = banded(base, {LEFT: left}, left, 0, "a bound: all of what was recorded")
    return Lever(kind, name, found, base, replace(predicted, high=base.total), code, effects, group, at_most=True)


def _share(amount: float, study: Recorded, base: Account) -> str:
    return f"{amount / max(1, base.total):.0%} of {study.unit}"


def _loading(study: Recorded, base: Account) -> Lever:
    amount = float(base.frame["value"].get(families.DATA, 0))
    return _lever(
        base, "data loading", "more loader processes", f"{_share(amount, study, base)} waits for the DataLoader",
        amount, "loader = DataLoader(dataset, num_workers=4, persistent_workers=True, pin_memory=True, ...)",
        ("each process holds a copy of what the dataset holds",),
    )  # fmt: skip


def _communication(study: Recorded, base: Account) -> list[Lever]:
    """Bytes that move could move under computation; ranks that wait could have equal work."""
    ranks, exposed = study.of_ranks, float(base.frame["value"].get(families.COMMUNICATION, 0))
    waiting, slowest = 0.0, None
    if ranks is not None:
        values, slowest = ranks.frame["value"], ranks.setting["slowest_rank"]
        waiting = min(exposed, float(values[values.index.str.endswith(" waiting")].sum()))
    moving = exposed - waiting
    # no more of it can be hidden than there is computation that hides none yet
    steps = study.parts
    computing = steps["kernel_ns" if study.saw_device else "cpu_exec_ns"] - steps["hidden_communication_ns"]
    room = mean_of(computing.clip(upper=steps["exposed_communication_ns"]))
    return [_lever(
        base, "communication", "overlap communication",
        f"{_share(moving, study, base)} is communication that no computation hides, and {_share(room, study, base)} "
        "could run under computation that hides none", min(moving, room),
        "model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=25)\n"
        "# FSDP2: fully_shard(block) for each block, so that the next gathers while this one computes\n"
        "# your own: work = dist.all_to_all_single(..., async_op=True); compute(); work.wait()",
        ("buffers of what is on its way take memory",),
    ), _lever(
        base, "waiting for ranks", "give all ranks equal work",
        f"{_share(waiting, study, base)}, the mean over ranks, waits for the last one to come; rank {slowest} has the "
        "longest step",
        waiting,
        "plan = padding.plan(lengths, 'bucket', batch_size=...)\n"
        "loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(rank, world_size))\n"
        "# experts: moe.balanced_placement(...); one slow machine: moe.find_slow(...)",
        ("ranks see batches in another order",),
    )]  # fmt: skip


def _idle_device(study: Recorded, base: Account) -> list[Lever]:
    """The device has nothing to do while the host launches, or after the host has waited for it."""
    if not study.saw_device:
        return []
    busy = float(base.frame["value"].get(HOST_BUSY, 0))
    behind, number = (mean_of(study.parts[column]) for column in ("behind_waits_ns", "num_waits"))
    return [_lever(
        base, "launch gaps", "launch less often",
        f"in {_share(busy, study, base)} the device idles while the host runs operators", busy,
        "model = torch.compile(model, mode='reduce-overhead')   # CUDA graphs\n"
        "# or torch.cuda.make_graphed_callables(model, sample); or larger batches",
        ("the first steps compile; shapes that vary compile again",), group="idle device",
    ), _lever(
        base, "synchronisation", "wait for the device less often",
        f"the host waits for the device {number:,.0f} times in {study.unit}, and behind that the device idles for "
        f"{_share(behind, study, base)} at most",
        behind,
        "total = total + loss.detach()   # and total.item() once, when it is shown\n"
        "batch = batch.to('cuda', non_blocking=True)   # from pinned memory; nonzero() and masks wait, too",
        group="idle device",
    )]  # fmt: skip
