"""RecordedStudy: what files say about a run that is over, and what they cannot say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import pandas as pd

from effkit import moe
from effkit.account import Account
from effkit.advice import families
from effkit.advice.levers import LEFT, Advice, Lever, banded, ranked
from effkit.advice.overviews import NO_CEILINGS, Overview, recorded_ceilings
from effkit.advice.studies import Study
from effkit.captured import Capture
from effkit.loading import load
from effkit.loading.fleet import Fleet
from effkit.moe import UNSEEN
from effkit.panes.breakdown import NO_DEVICE, cold, mean_of, room
from effkit.panes.families import NOT_VISIBLE as NOBODY
from effkit.panes.steps import WHOLE
from effkit.units import readable

RANKS, EVERYTHING = "One step of all ranks, waiting told from moving", "the whole recording"
COPIES, NO_OPERATOR = "copies", "kernels without an operator"
NOT_VISIBLE, HOST_BUSY = "not visible", "host busy, device idle"
_FROM = "steps from "  # begins the note that says what marks a step
# part of Capture.overview() -> row; kernel_ns becomes a row per family, and so does cpu_exec_ns without a device
_ROWS = {
    "exposed_communication_ns": families.COMMUNICATION,
    "memcpy_ns": COPIES,
    "dataloader_ns": families.DATA,
    "not_visible_ns": NOT_VISIBLE,
    "cpu_exec_ns": HOST_BUSY,
    "idle_ns": families.HOST,
}
_COMPUTING = (
    families.PRODUCTS, families.ATTENTION, families.NORMS, families.OTHER, families.OPTIMIZER, families.ASKING,
)  # fmt: skip
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

Files = str | Path | Sequence[str | Path]


class RecordedStudy(Study):
    """A profiler trace, or one per rank, and a memory snapshot; nothing is run.

    FileNotFoundError or ValueError when a file is absent, or holds no events (a trace) or no memory (a snapshot).

    ``capture`` is what the trace holds, None where none was given; ``of_memory`` the Capture that memory was recorded
    in, None where neither file holds any. Of a serving engine's batches those are studied, prefill or decode, that took
    most of the time, unless ``step`` names the others.
    """

    def __init__(
        self, trace: Files | Capture | None, snapshot: str | Path | Capture | None, *, step: str | None = None
    ) -> None:
        opened = (one if one is None or isinstance(one, Capture) else load(one) for one in (trace, snapshot))
        self.capture, memory = opened
        named = [_named(path) for path in (trace, snapshot) if path is not None]
        super().__init__(f"a recording, {' and '.join(named)}")
        self.step = step
        if self.capture is not None and self.parts.empty:
            raise ValueError(f"there are no events in {named[0]}: trace= takes what torch.profiler exported, snapshot= "
                             "what torch.cuda.memory._dump_snapshot() wrote")  # fmt: skip
        if self.capture is not None and 0 < self.parts["kernel_ns"].notna().mean() < 1:
            raise ValueError(f"some of the ranks in {named[0]} recorded a device and some did not, so that their mean "
                             "means nothing: give the files of either alone")  # fmt: skip
        if memory is not None and not memory._recorded_memory():
            raise ValueError(f"no memory is in {named[-1]}: snapshot= takes what torch.cuda.memory._dump_snapshot() "
                             "wrote")  # fmt: skip
        phases = None if self.capture is None else self.parts.get("phase")
        if phases is not None and phases.nunique() > 1:  # the mean over them would mean nothing
            self.step = str(self.parts["dur_ns"].groupby(phases).sum().idxmax())
            self._other_phases = sorted({*phases} - {self.step})
            del vars(self)["parts"]
        self.of_memory = next((part for part in (memory, self.capture) if part is not None and part._recorded_memory()),
                              None)  # fmt: skip

    @cached_property
    def parts(self) -> pd.DataFrame:
        """:meth:`Capture.overview`, one row per rank and step."""
        assert self.capture is not None, "there is a trace"
        return self.capture.overview(self.step)

    @cached_property
    def inside(self) -> Capture:
        """The trace without what is in no step."""
        assert self.capture is not None, "there is a trace"
        return self.capture._in_steps(self.step)

    @property
    def unit(self) -> str:
        """What one row of ``parts`` is, in words."""
        if any(WHOLE in mark for mark in self._marks):
            return EVERYTHING
        phases = set(self.parts.get("phase", ()))
        return f"a step of {phases.pop()}" if len(phases) == 1 else "a step"

    @property
    def num_steps(self) -> int:
        """Recorded steps of all ranks together."""
        return len(self.parts)

    @cached_property
    def saw_device(self) -> bool:
        """Whether every rank recorded what its device did."""
        return bool(self.parts["kernel_ns"].notna().all())

    @cached_property
    def time(self) -> Account | None:
        """One step, the mean over steps and ranks, without first launches; None without a trace."""
        if self.capture is None:
            return None
        whole = "kernel_ns" if self.saw_device else "cpu_exec_ns"
        rows = {name: share * mean_of(self.parts[whole]) for name, share in self._shares().items()}
        rows |= {row: mean_of(self.parts[part]) for part, row in _ROWS.items()
                 if part != whole and self.parts[part].notna().all()}  # fmt: skip
        shown = {row: round(value) for row, value in rows.items() if value >= 1}
        basis = {row: "derived" if row in (*_COMPUTING, NO_OPERATOR) else "measured" for row in shown}
        source = (self._marks or ["the recorded steps"])[0].removeprefix(_FROM)
        source += f", the mean over {self.num_steps:,} of them" if self.num_steps > 1 else ""
        once = round(mean_of(self.parts["first_launch_ns"].fillna(0))) if cold(self.parts) else 0
        if once:  # a steady run does not pay it
            source += f", without first launches ({readable(once, 'ns')})"
            shown[HOST_BUSY] -= once
        return Account.of(
            f"Time of {self.unit.replace('a step', 'one step')}", "ns", shown, basis=basis,
            total=round(mean_of(self.parts["dur_ns"])) - once, source=source,
            setting={"num_ranks": self.num_ranks, "num_steps": self.num_steps},
        )  # fmt: skip

    @property
    def _marks(self) -> list[str]:
        """The notes that say what marks a step."""
        return [note for note in self.parts.attrs["notes"] if note.startswith(_FROM)]

    def _shares(self) -> dict[str, float]:
        """How the time of kernels, or of operators, is divided between families; they sum to 1. Copies and
        communication have rows of their own: what they take on the device is not shared out again."""
        times = self.inside.families()["kernel_ns" if self.saw_device else "host_self_ns"].astype("float64").fillna(0)
        # somebody's own backward, and on a device what is asked for, are kernels like others
        elsewhere = {NOBODY: NO_OPERATOR, families.HOST: families.OTHER}
        elsewhere |= {families.ASKING: families.OTHER} if self.saw_device else {}
        rows = times.index.map(lambda family: family if family == NOBODY else families.row(family))
        times = times.clip(lower=0).groupby(rows.map(lambda row: elsewhere.get(row, row))).sum()
        times = times.reindex([*_COMPUTING, *([NO_OPERATOR] if self.saw_device else [])]).dropna()
        return (times[times > 0] / times.sum()).to_dict() or {families.OTHER: 1.0}

    @cached_property
    def of_ranks(self) -> Account | None:
        """The MoE lab's account of ranks that communicate; None where fewer than two, or no collective, are there."""
        if self.capture is None or self.num_ranks < 2:
            return None
        try:
            title = RANKS if self.unit != EVERYTHING else RANKS.replace("One step", EVERYTHING.capitalize())
            return replace(moe.account(self.capture, self.step), title=title)
        except ValueError as error:
            self._why_no_ranks = str(error)
            return None

    @property
    def num_ranks(self) -> int:
        """Of which there is a trace."""
        return self.parts.index.get_level_values("rank").nunique()

    @cached_property
    def memory(self) -> Account | None:
        """What filled the memory at its peak; None where that was not recorded."""
        return None if self.of_memory is None else self.of_memory.memory()

    _why_no_ranks = ""
    _other_phases: Sequence[str] = ()

    def _look(self) -> Overview:
        accounts = [account for account in (self.time, self.of_ranks, self.memory) if account is not None]
        return Overview(tuple(accounts), self._ceilings, tuple(self._found()), tuple(self._unseen()))

    @cached_property
    def _ceilings(self) -> pd.DataFrame:
        if self.capture is None or not self.saw_device:
            return NO_CEILINGS
        return recorded_ceilings(self.inside.products(), int(self.parts["dur_ns"].sum()))

    def _found(self) -> list[str]:
        facts = [capture.provenance for capture in (self.capture, self.of_memory) if capture is not None]
        # beside a trace, a snapshot does not say on what device it was taken
        found = [str(each["device"]) for each in facts[:1] if each.get("device")]
        found += [f"torch {each['torch']}" for each in facts if each.get("torch")]
        if self.capture is not None:
            found.append(self._ranks_and_steps(self.capture))
        if self.of_memory is not None and self.memory is not None:
            device = self.of_memory._chosen_memory(None, None)["device"]
            found.append(f"memory of {device}, {readable(self.memory.total, 'bytes')} at its peak")
        return list(dict.fromkeys(found))

    def _ranks_and_steps(self, capture: Capture) -> str:
        world = capture.provenance.get("world_size")
        of = f" of {world}" if world and world > self.num_ranks else ""
        ranks = f"{self.num_ranks}{of} ranks" if of or self.num_ranks > 1 else "one rank"
        if self.unit == EVERYTHING:
            return f"{ranks}, {EVERYTHING}: no step is marked; name an annotation that marks one with step="
        least, most = self.parts.groupby(level="rank").size().agg(["min", "max"])
        steps = f"{least} to {most} steps" if least < most else f"{most} steps" if most > 1 else "one step"
        return f"{ranks}, {steps}{' each' if self.num_ranks > 1 else ''}: {'; '.join(self._marks)}"

    def _unseen(self) -> list[str]:
        unseen = [
            "padding: a recording holds neither masks nor lengths; study the loop live, with its loader",
            "the launch floor: a recording does not hold this device's rates",
        ]
        if self._ceilings.empty:
            unseen.append("model FLOPs utilisation: no matrix product was recorded with shapes (record_shapes=True), "
                          "or we hold no datasheet of the device")  # fmt: skip
        if self.capture is None:
            return [*unseen, "time: a memory snapshot has none; give trace= as well"]
        notes = [note for note in self.parts.attrs["notes"] if not note.startswith((_FROM, NO_DEVICE))]
        if NO_DEVICE in self.parts.attrs["notes"]:
            unseen.append("what a device did: none was recorded, so that operators count by their time on the host")
        if not self.capture.provenance.get("torch"):
            unseen.append("the torch version: a trace does not say it")
        unseen += [f"steps of {phase}: study(..., step='{phase}') looks at them" for phase in self._other_phases]
        assert self.time is not None, "there is a trace"
        many = (self.capture.provenance.get("world_size") or 1) > 1
        if self.num_ranks == 1 and (many or families.COMMUNICATION in self.time.frame.index):
            unseen.append("waiting for other ranks told from moving bytes: this is one rank; give a folder with all")
        if self.memory is None:
            unseen.append("memory: it was not recorded; give snapshot=, or profile with profile_memory=True")
        ranks = self.of_ranks
        notes += [*self.capture._notes(), *(ranks.setting["notes"] if ranks else ())]
        if ranks and any(UNSEEN in row for row in ranks.frame.index):
            notes.append("who waited for whom, in calls that no other rank's recording shows")
        elif self._why_no_ranks:
            notes.append(f"waiting told from moving: {self._why_no_ranks}")
        return list(dict.fromkeys([*unseen, *notes, *filter(None, [self.capture._outside(self.inside)])]))

    def _advise(self, goal: str, budget_bytes: int | None, **more: Any) -> Advice:
        if goal == "memory":
            return _of_memory(self.memory, budget_bytes, **more)
        return _of_time(self, goal, **more)


def of_file(path: str | Path) -> RecordedStudy:
    """The study of a trace, a snapshot, a saved capture, or a folder of one of them: what it holds decides."""
    capture = load(path)
    without_time = capture.overview().empty if isinstance(capture, Fleet) else capture.events.empty
    return RecordedStudy(None, capture) if without_time else RecordedStudy(capture, None)


def _named(path: Files | Capture) -> str:
    if isinstance(path, Capture):
        return str(path.provenance.get("what", "a capture"))
    return Path(path).name if isinstance(path, str | Path) else f"{len(path)} files"


def _of_time(study: RecordedStudy, goal: str, **more: Any) -> Advice:
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


def _of_memory(memory: Account | None, budget_bytes: int | None, **more: Any) -> Advice:
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


def _share(amount: float, study: RecordedStudy, base: Account) -> str:
    return f"{amount / max(1, base.total):.0%} of {study.unit}"


def _bounds(study: RecordedStudy, base: Account) -> Iterator[Lever]:
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
            "# experts: moe.balanced_placement(...); one slow machine: lessons.pair_delays",
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
