"""RecordedStudy: what files say about a run that is over, and what they cannot say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from effkit import moe
from effkit.account import Account
from effkit.advice import families, recorded_levers
from effkit.advice.levers import Advice
from effkit.advice.overviews import NO_CEILINGS, Overview
from effkit.advice.recorded_levers import HOST_BUSY, NOT_VISIBLE, within_steps
from effkit.advice.studies import Study
from effkit.captured import Capture
from effkit.loading import load
from effkit.loading.fleet import Fleet
from effkit.moe import UNSEEN
from effkit.panes.breakdown import NO_DEVICE, mean_of
from effkit.panes.families import NOT_VISIBLE as NOBODY
from effkit.units import readable

TIME, RANKS = "Time of one step", "One step of all ranks, waiting told from moving"
COPIES, NO_OPERATOR = "copies", "kernels without an operator"
_FROM = "steps from "  # begins the note that says what marks a step
_OUTSIDE_FRAC = 0.05  # of the kernels' time, that may lie outside of the steps before a word is due
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

Files = str | Path | Sequence[str | Path]


class RecordedStudy(Study):
    """A profiler trace, or one per rank, and a memory snapshot; nothing is run.

    FileNotFoundError or ValueError when a file is absent, or holds no events (a trace) or no memory (a snapshot).

    ``capture`` is what the trace holds, None where none was given; ``of_memory`` the Capture that memory was recorded
    in, None where neither file holds any; ``trace`` the path that was given.
    """

    def __init__(self, trace: Files | None, snapshot: str | Path | None, *, step: str | None = None) -> None:
        self.capture = None if trace is None else load(trace)
        memory = None if snapshot is None else load(snapshot)
        named = [_named(path) for path in (trace, snapshot) if path is not None]
        super().__init__(f"a recording, {' and '.join(named)}")
        self.trace, self.step = trace, step
        if self.capture is not None and self.parts.empty:
            raise ValueError(f"there are no events in {named[0]}: trace= takes what torch.profiler exported, snapshot= "
                             "what torch.cuda.memory._dump_snapshot() wrote")  # fmt: skip
        if self.capture is not None and 0 < self.parts["kernel_ns"].notna().mean() < 1:
            raise ValueError(f"some of the ranks in {named[0]} recorded a device and some did not, so that their mean "
                             "means nothing: give the files of either alone")  # fmt: skip
        if memory is not None and not _holds_memory(memory):
            raise ValueError(f"no memory is in {named[-1]}: snapshot= takes what torch.cuda.memory._dump_snapshot() "
                             "wrote")  # fmt: skip
        self.of_memory = next((part for part in (memory, self.capture) if part is not None and _holds_memory(part)),
                              None)  # fmt: skip

    @cached_property
    def parts(self) -> pd.DataFrame:
        """:meth:`Capture.overview`, one row per rank and step."""
        assert self.capture is not None, "there is a trace"
        return self.capture.overview(self.step)

    @cached_property
    def inside(self) -> Capture:
        """The trace without what lies outside of the steps; of many ranks, which are not kept in memory, all of it."""
        assert self.capture is not None, "there is a trace"
        return self.capture if isinstance(self.capture, Fleet) else within_steps(self.capture, self.parts)

    @cached_property
    def operators(self) -> pd.DataFrame:
        """:meth:`Capture.operators` of the steps."""
        return self.inside.operators()

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
        """One step, the mean over steps and ranks; None without a trace."""
        if self.capture is None:
            return None
        whole = "kernel_ns" if self.saw_device else "cpu_exec_ns"
        rows = {name: share * mean_of(self.parts[whole]) for name, share in self._shares().items()}
        rows |= {row: mean_of(self.parts[part]) for part, row in _ROWS.items()
                 if part != whole and self.parts[part].notna().all()}  # fmt: skip
        shown = {row: round(value) for row, value in rows.items() if value >= 1}
        basis = {row: "derived" if row in (*_COMPUTING, NO_OPERATOR) else "measured" for row in shown}
        source = (self._marks or ["the recorded steps"])[0].removeprefix(_FROM)
        return Account.of(
            TIME, "ns", shown, basis=basis, total=round(mean_of(self.parts["dur_ns"])),
            source=f"{source}, the mean over {self.num_steps:,} of them" if self.num_steps > 1 else source,
            setting={"num_ranks": self.num_ranks, "num_steps": self.num_steps},
        )  # fmt: skip

    @property
    def _marks(self) -> list[str]:
        """The notes that say what marks a step."""
        return [note for note in self.parts.attrs["notes"] if note.startswith(_FROM)]

    def _shares(self) -> dict[str, float]:
        """How the time of kernels, or of operators, is divided between families; they sum to 1. Copies and
        communication have rows of their own: what they take on the device is not shared out again."""
        table = self.inside.families()
        column = table["kernel_ns" if self.saw_device else "host_self_ns"].astype("float64").fillna(0).clip(lower=0)
        nobody = float(column.get(NOBODY, 0.0))
        by_row = column.drop(index=NOBODY, errors="ignore").groupby(families.row).sum()
        times = {name: float(by_row.get(name, 0.0)) for name in _COMPUTING}
        times[families.OTHER] += float(by_row.get(families.HOST, 0.0))  # somebody's own backward
        if self.saw_device:
            times[families.OTHER] += times.pop(families.ASKING)
            times[NO_OPERATOR] = nobody
        total = sum(times.values())
        if not total:
            return {families.OTHER: 1.0}
        return {name: value / total for name, value in times.items() if value > 0}

    @cached_property
    def of_ranks(self) -> Account | None:
        """The MoE lab's account of ranks that communicate; None where fewer than two, or no collective, are there."""
        if self.capture is None or self.num_ranks < 2:
            return None
        try:
            return replace(moe.account(self.capture, self.step), title=RANKS)
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

    @property
    def _outside_frac(self) -> float:
        """Of the kernels' time, what is not in a step."""
        inside = float(self.parts[["kernel_ns", "exposed_communication_ns", "hidden_communication_ns"]].sum().sum())
        return 1 - min(1.0, inside / max(1.0, float(self.inside.kernels()["total_ns"].sum())))

    _why_no_ranks = ""

    def _look(self) -> Overview:
        accounts = [account for account in (self.time, self.of_ranks, self.memory) if account is not None]
        return Overview(tuple(accounts), NO_CEILINGS, tuple(self._found()), tuple(self._unseen()))

    def _found(self) -> list[str]:
        found = []
        for capture in (self.capture, self.of_memory):
            facts = {} if capture is None else capture.provenance
            # a snapshot does not say on what device it was taken
            if facts.get("device") and (capture is self.capture or self.capture is None):
                found.append(str(facts["device"]))
            if facts.get("torch"):
                found.append(f"torch {facts['torch']}")
        if self.capture is not None:
            found.append(self._ranks_and_steps(self.capture))
        if self.memory is not None:
            found.append(f"memory of {self._device_of_memory()}, {readable(self.memory.total, 'bytes')} at its peak")
        return list(dict.fromkeys(found))

    def _ranks_and_steps(self, capture: Capture) -> str:
        world = capture.provenance.get("world_size")
        of = f" of {world}" if world and world > self.num_ranks else ""
        ranks = f"{self.num_ranks}{of} ranks" if of or self.num_ranks > 1 else "one rank"
        per_rank = sorted(set(self.parts.groupby(level="rank").size()))
        steps = f"{per_rank[0]} steps" if per_rank != [1] else "one step"
        steps = f"{per_rank[0]} to {per_rank[-1]} steps" if len(per_rank) > 1 else steps
        return f"{ranks}, {steps}{' each' if self.num_ranks > 1 else ''}: {'; '.join(self._marks)}"

    def _device_of_memory(self) -> str:
        assert self.of_memory is not None
        return str(self.of_memory._chosen_memory(None, None)["device"])

    def _unseen(self) -> list[str]:
        unseen = [
            "padding: a recording holds neither masks nor lengths; study the loop live, with its loader",
            "model FLOPs utilisation and the launch floor: a recording holds neither the model nor this device's rates",
        ]
        if self.capture is None:
            return [*unseen, "time: a memory snapshot has none; give trace= as well"]
        notes = [note for note in self.parts.attrs["notes"] if not note.startswith((_FROM, NO_DEVICE))]
        if NO_DEVICE in self.parts.attrs["notes"]:
            unseen.append("what a device did: none was recorded, so that operators count by their time on the host")
        if not self.capture.provenance.get("torch"):
            unseen.append("the torch version: a trace does not say it")
        unseen += self._unseen_ranks(self.capture)
        notes += self._notes_on_ranks()
        if self.memory is None:
            unseen.append("memory: it was not recorded; give snapshot=, or profile with profile_memory=True")
        return list(dict.fromkeys([*unseen, *notes]))

    def _unseen_ranks(self, capture: Capture) -> list[str]:
        unseen = []
        if missing := capture.provenance.get("missing_ranks"):
            listed = ", ".join(map(str, list(missing)[:8])) + (", …" if len(missing) > 8 else "")
            unseen.append(f"what ranks {listed} did: there is no file of them, and waiting for them counts as moving")
        assert self.time is not None, "there is a trace"
        many = (capture.provenance.get("world_size") or 1) > 1
        if self.num_ranks == 1 and (many or families.COMMUNICATION in self.time.frame.index):
            unseen.append("waiting for other ranks told from moving bytes: this is one rank; give a folder with all")
        return unseen

    def _notes_on_ranks(self) -> list[str]:
        notes, ranks = [], self.of_ranks
        if ranks is not None:
            notes += [note for note in ranks.setting["notes"] if "were not recorded" not in note]
            if any(UNSEEN in row for row in ranks.frame.index):
                notes.append("who waited for whom, in calls that no other rank's recording shows")
        elif self._why_no_ranks:
            notes.append(f"waiting told from moving: {self._why_no_ranks}")
        if self.saw_device and isinstance(self.inside, Fleet) and self._outside_frac > _OUTSIDE_FRAC:
            notes.append(f"which operators launched the kernels of the steps alone: {self._outside_frac:.0%} of the "
                         "kernels' time is outside of them, and is shared out as well")  # fmt: skip
        return notes

    def _advise(self, goal: str, budget_bytes: int | None, **more: Any) -> Advice:
        if goal == "memory":
            return recorded_levers.of_memory(self.memory, budget_bytes, **more)
        return recorded_levers.of_time(self, goal, **more)


def _holds_memory(capture: Capture) -> bool:
    return bool(capture._recorded_memory())


def _named(path: Files) -> str:
    return Path(path).name if isinstance(path, str | Path) else f"{len(path)} files"
