"""What the ranks of a run recorded, step by step, on one clock."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from effkit.moe.setting import Setting

Array = np.ndarray[Any, np.dtype[Any]]
Clock = Callable[[int], int]


class Call(NamedTuple):
    """One collective on one rank: times in ns, and bytes to and from each rank."""

    kind: str
    start_ns: int
    end_ns: int
    sent_bytes: Sequence[int]
    received_bytes: Sequence[int]


class OfRank(NamedTuple):
    """One step on one rank: its phases (name, begin, end) and its collectives, in order [ns]."""

    begin_ns: int
    turn_ns: int
    end_ns: int
    phases: Sequence[tuple[str, int, int]]
    calls: Sequence[Call]


class Step(NamedTuple):
    """One step on all ranks; ``number`` tells whose routing it had."""

    job: int
    round: int
    number: int
    ranks: Sequence[OfRank]


@dataclass(frozen=True, eq=False)
class Run:
    """What all ranks of one run recorded.

    Attributes
    ----------
    settings
        What was run, by job.
    steps
        Every timed step of every job and round.
    kept
        Token copies kept, by (job, step): arrays [num_ranks, num_experts].
    dropped
        Token copies dropped, by (job, step): [num_ranks].
    facts
        num_ranks, ranks_per_node, backend, device, link_bytes_per_s, provenance.
    """

    settings: Sequence[Setting]
    steps: Sequence[Step]
    kept: Mapping[tuple[int, int], Array]
    dropped: Mapping[tuple[int, int], Array]
    facts: Mapping[str, Any]

    @property
    def num_ranks(self) -> int:
        return int(self.facts["num_ranks"])

    def of_job(self, job: int) -> list[Step]:
        """The timed steps of one setting."""
        return [step for step in self.steps if step.job == job]


def joined(runs: Sequence[Run]) -> Run:
    """Runs of the same settings, each of one round, as rounds of one."""
    steps = [step._replace(round=number) for number, run in enumerate(runs) for step in run.steps]
    return replace(runs[0], steps=steps)


def read(folder: str | Path) -> Run:
    """What ranks wrote into a folder; ValueError when a rank's file is missing or was not written by a rank."""
    folder = Path(folder)
    try:
        run = json.loads((folder / "run.json").read_text())
        ranks = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
        ranks.sort(key=lambda rank: rank["rank"])
        world = int(ranks[0]["num_ranks"]) if ranks else 0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} does not hold a run: run.json and a rank<r>.json of each rank are expected "
                         f"({error})") from error  # fmt: skip
    missing = sorted(set(range(world)) - {rank["rank"] for rank in ranks})
    if missing or not ranks:
        took_part = f" ({world} ranks took part)" if ranks else ""
        raise ValueError(f"{folder} lacks what rank {', '.join(map(str, missing)) or '0'} recorded{took_part}: "
                         "copy rank<r>.json of every rank there")  # fmt: skip
    one_clock = len({rank["machine"] for rank in ranks}) == 1 and ranks[0]["machine"]
    clocks = [_clock([] if one_clock else rank["clock"]) for rank in ranks]
    facts = {
        **{name: ranks[0][name] for name in ("num_ranks", "backend", "where", "provenance")},
        "ranks_per_node": int(run.get("ranks_per_node") or ranks[0]["local_world_size"]),
        "link_bytes_per_s": float(run.get("link_bytes_per_s") or 0.0),
    }
    steps, kept, dropped = [], {}, {}
    for records in zip(*(rank["steps"] for rank in ranks), strict=True):
        job, number = records[0]["job"], records[0]["step"]
        of_ranks = [_of_rank(record, clock) for record, clock in zip(records, clocks, strict=True)]
        steps.append(Step(job, records[0]["round"], number, of_ranks))
        kept[job, number], dropped[job, number] = (
            np.array([record[name] for record in records]) for name in ("kept", "dropped")
        )
    return Run([Setting.of(job["setting"]) for job in ranks[0]["jobs"]], steps, kept, dropped, facts)


def _clock(offsets: Sequence[Sequence[int]]) -> Clock:
    """A rank's clock on the first rank's: offsets measured before and after, and a line between them."""
    at, ahead = ([offset[i] for offset in offsets] or [0] for i in range(2))
    return lambda time_ns: time_ns - round(float(np.interp(time_ns, at, ahead)))


def _of_rank(record: Mapping[str, Any], clock: Clock) -> OfRank:
    stamps = [(name, clock(time_ns)) for name, time_ns in record["phases"]]
    phases = [(name, begin, end) for (name, begin), (_, end) in pairwise(stamps) if name]
    calls = [Call(kind, clock(start), clock(end), out, back) for kind, start, end, out, back in record["calls"]]
    return OfRank(clock(record["begin_ns"]), clock(record["turn_ns"]), clock(record["end_ns"]), phases, calls)
