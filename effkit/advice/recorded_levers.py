"""Levers on a run that is over: a recording bounds what each could save, and no more than that."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from effkit.account import Account
from effkit.advice import families
from effkit.advice.levers import Advice, Lever, banded, ranked
from effkit.advice.loop_comparison import LEFT
from effkit.captured import Capture
from effkit.loading import load
from effkit.loading.fleet import Fleet
from effkit.trace.names import LAUNCHES, WAITS
from effkit.units import readable

if TYPE_CHECKING:
    from effkit.advice.subjects import Recorded

NOT_VISIBLE, HOST_BUSY = "not visible", "host busy, device idle"
_LEAST_FRAC = 0.05  # of a step: a row below it is not worth a word
_HALF, _TENTH = 0.5, 0.1  # of a row: what is predicted to be saved, and the least
_MANY_WAITS = 4  # in a step: one or two are somebody's log of the loss
_BOUNDS = (
    "these are bounds, from a recording: each lever can save no more than its row, half of it is taken for predicted "
    "and a tenth for the least; study the loop live (step=, model=, loader=) to have gains predicted from runs, and "
    "measured"
)
_LABS = {
    **dict.fromkeys(("saved activation", "recomputed activation", "workspace"), "ek.activations"),
    "optimizer state": "ek.activations (LowBitAdamW)",
    "gradient": "ek.activations (gradients at once used up)",
    "parameter": "ek.decoder.roofline, or a model of fewer or narrower weights",
    "input": "ek.padding",
}


@dataclass(frozen=True)
class _Bound:
    """A row, and what would make it shorter."""

    kind: str
    name: str
    found: str
    amount_ns: float
    code: str
    side_effects: tuple[str, ...] = ()
    group: str = ""


def of_time(study: Recorded, goal: str, **more: Any) -> Advice:
    """Levers that bound what could be saved of the rows of a step's time."""
    base = study.time
    if base is None:
        return Advice(goal, (), notes=("time is not visible: no trace was given; give trace= as well",), **more)
    least = _LEAST_FRAC * base.total
    bounds = [*_loading(base), *_communication(study, base), *_idle_device(study, base, least)]
    levers = [_lever(base, bound) for bound in bounds if bound.amount_ns >= least]
    blind = int(base.frame["value"].get(NOT_VISIBLE, 0))
    notes = [_BOUNDS] if levers else [f"no row that a lever could shorten takes {_LEAST_FRAC:.0%} of the step"]
    if blind >= least:
        share = f"{blind / base.total:.0%}"
        notes.append(f"{share} of the step is device work that was not recorded: nothing is said of it")
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


def _lever(base: Account, bound: _Bound) -> Lever:
    """Half of the row is predicted to go, all of it at most, a tenth of it at least."""
    amount = min(bound.amount_ns, float(base.total))
    total = base.total - _HALF * amount
    half = banded(base, {LEFT: round(total)}, total, _HALF * amount, "a bound: half of what was recorded")
    predicted = replace(half, low=max(0, round(base.total - amount)), high=round(base.total - _TENTH * amount))
    return Lever(bound.kind, bound.name, bound.found, base, predicted, bound.code, bound.side_effects, bound.group)


def _share(amount: float, base: Account) -> str:
    return f"{amount / max(1, base.total):.0%} of a step"


def _loading(base: Account) -> list[_Bound]:
    amount = float(base.frame["value"].get(families.DATA, 0))
    return [_Bound(
        "data loading", "more loader processes", f"{_share(amount, base)} waits for the DataLoader", amount,
        "loader = DataLoader(dataset, num_workers=4, persistent_workers=True, pin_memory=True, ...)",
        ("each process holds a copy of what the dataset holds",),
    )]  # fmt: skip


def _communication(study: Recorded, base: Account) -> list[_Bound]:
    """Bytes that move could move under computation; ranks that wait could have equal work."""
    ranks, exposed = study.of_ranks, float(base.frame["value"].get(families.COMMUNICATION, 0))
    overlap = _Bound(
        "communication", "overlap communication", f"{_share(exposed, base)} is communication that no computation hides",
        exposed,
        "model = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=25)\n"
        "# FSDP2: fully_shard(block) for each block, so that the next gathers while this one computes\n"
        "# your own: work = dist.all_to_all_single(..., async_op=True); compute(); work.wait()",
        ("buffers of what is on its way take memory",),
    )  # fmt: skip
    if ranks is None:
        return [overlap]
    values = ranks.frame["value"]
    waiting, moving = (float(values[values.index.str.endswith(f" {word}")].sum()) for word in ("waiting", "moving"))
    unseen = max(0.0, exposed - waiting - moving)
    slowest = ranks.setting["slowest_rank"]
    found = f"{_share(moving + unseen, base)} is communication that moves bytes while nothing computes"
    overlap = replace(overlap, amount_ns=moving + unseen, found=found)
    return [overlap, _Bound(
        "waiting for ranks", "give all ranks equal work",
        f"{_share(waiting, base)}, the mean over ranks, waits for the last one to come; rank {slowest} has the longest "
        "step",
        waiting,
        "plan = padding.plan(lengths, 'bucket', batch_size=...)\n"
        "loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(rank, world_size))\n"
        "# experts: moe.balanced_placement(...); one slow machine: moe.find_slow(...)",
        ("ranks see batches in another order",),
    )]  # fmt: skip


def _idle_device(study: Recorded, base: Account, least: float) -> list[_Bound]:
    """The device has nothing to do while the host launches, or after the host has waited for it."""
    if not study.saw_device:
        return []
    rows = base.frame["value"]
    busy, between = float(rows.get(HOST_BUSY, 0)), float(rows.get(families.HOST, 0))
    found = [_Bound(
        "launch gaps", "launch less often",
        f"in {_share(busy, base)} the device idles while the host runs operators", busy,
        "model = torch.compile(model, mode='reduce-overhead')   # CUDA graphs\n"
        "# or torch.cuda.make_graphed_callables(model, sample); or larger batches",
        ("the first steps compile; shapes that vary compile again",), group="idle device",
    )]  # fmt: skip
    waits, where = _waits_per_step(study) if busy + between >= least else (0.0, "")
    if waits >= _MANY_WAITS:
        found.append(_Bound(
            "synchronisation", "ask for fewer numbers",
            f"a step waits for the device {waits:,.0f} times ({where}), and in {_share(busy + between, base)} the "
            "device idles",
            busy + between, "total = total + loss.detach()   # and total.item() once, when it is shown",
            group="idle device",
        ))  # fmt: skip
    return found


def _waits_per_step(study: Recorded) -> tuple[float, str]:
    """How often a step waits until the device is done, and in what: operators of all ranks, calls of one rank."""
    calls = study.operators["calls"]
    asked = float(calls.get("aten::_local_scalar_dense", calls.get("aten::item", 0))) / study.num_steps
    rank = study.inside
    if isinstance(rank, Fleet):
        if not isinstance(study.trace, str | Path):
            return asked, "aten::item"
        whole = load(Path(study.trace) / next(iter(rank.provenance["files"].values())))  # one of them shows what all do
        rank = within_steps(whole, whole.overview(study.step))
    calls = rank.events[rank.events["category"].str.endswith(LAUNCHES)]
    waited = int(calls["name"].str.contains(WAITS).sum()) / max(1, len(rank.overview(study.step)))
    return max((asked, "aten::item"), (waited, "cudaStreamSynchronize and its like"))


def within_steps(capture: Capture, steps: pd.DataFrame) -> Capture:
    """The same recording without what begins outside of the steps, which its overview lists."""
    starts = capture.events["start_ns"]
    inside = pd.Series(False, starts.index)
    for begin, dur in zip(steps["start_ns"], steps["dur_ns"], strict=True):
        inside |= (starts >= begin) & (starts < begin + dur)
    return replace(capture, events=capture.events[inside].reset_index(drop=True))
