"""Levers on a run that is over: a recording bounds what each could save, and no more than that."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from effkit.account import Account
from effkit.advice import families
from effkit.advice.levers import Advice, Lever, banded, ranked
from effkit.advice.loop_comparison import LEFT
from effkit.panes.breakdown import cold, mean_of, room
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
    notes = cold(study.parts)
    if base.total <= mean_of(study.parts["dur_ns"]) / 2:  # the rest is first launches: what is left says little
        return Advice(goal, (), notes=tuple(notes), **more)
    levers = [lever for lever in _bounds(study, base) if lever.gain_frac >= _LEAST_FRAC]
    blind = int(base.frame["value"].get(NOT_VISIBLE, 0))
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
    look = (f"measure the model live in {_LABS[largest]}" if largest in _LABS
            else "look at Capture.memory(by='stack') to see where it was allocated")  # fmt: skip
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


def _bounds(study: Recorded, base: Account) -> Iterator[Lever]:
    """What could be waited for less, and run at the same time."""
    lever, share, steps = partial(_lever, base), partial(_share, study=study, base=base), study.parts
    row = base.frame["value"].to_dict().get
    loading, exposed, busy = (float(row(name, 0)) for name in (families.DATA, families.COMMUNICATION, HOST_BUSY))
    yield lever(
        "data loading", "more loader processes", f"{share(loading)} waits for the DataLoader", loading,
        "loader = DataLoader(dataset, num_workers=4, persistent_workers=True, pin_memory=True, ...)",
        ("each process holds a copy of what the dataset holds",),
    )  # fmt: skip
    if (ranks := study.of_ranks) is not None:
        values = ranks.frame["value"]
        waiting = min(exposed, float(values[values.index.str.endswith(" waiting")].sum()))
        exposed -= waiting
        yield lever(
            "waiting for ranks", "give all ranks equal work",
            f"{share(waiting)}, the mean over ranks, waits for the last one to come; rank "
            f"{ranks.setting['slowest_rank']} has the longest step", waiting,
            "plan = padding.plan(lengths, 'bucket', batch_size=...)\n"
            "loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(rank, world_size))\n"
            "# experts: moe.balanced_placement(...); one slow machine: moe.delays(...)",
            ("ranks see batches in another order",),
        )  # fmt: skip
    spare = mean_of(room(steps))
    yield lever(
        "communication", "overlap communication",
        f"{share(exposed)} is communication that no computation hides, and {share(spare)} could run under computation "
        "that hides none", min(exposed, spare),
        "model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=25)\n"
        "# FSDP2: fully_shard(block) for each block, so that the next gathers while this one computes\n"
        "# your own: work = dist.all_to_all_single(..., async_op=True); compute(); work.wait()",
        ("buffers of what is on its way take memory",),
    )  # fmt: skip
    if not study.saw_device:
        return
    yield lever(
        "launch gaps", "launch less often", f"in {share(busy)} the device idles while the host runs operators", busy,
        "model = torch.compile(model, mode='reduce-overhead')   # CUDA graphs\n"
        "# or torch.cuda.make_graphed_callables(model, sample); or larger batches",
        ("the first steps compile; shapes that vary compile again",), group="idle device",
    )  # fmt: skip
    behind, number = mean_of(steps["behind_waits_ns"]), mean_of(steps["num_waits"])
    yield lever(
        "synchronisation", "wait for the device less often",
        f"the host waits for the device {number:,.0f} times in {study.unit}, and behind that the device idles "
        f"for {share(behind)} at most", behind,
        "total = total + loss.detach()   # and total.item() once, when it is shown\n"
        "batch = batch.to('cuda', non_blocking=True)   # from pinned memory; nonzero() and masks wait, too",
        group="idle device",
    )  # fmt: skip
