"""Where the time of a step goes: every rank's phases, with the time in collectives told apart as waiting and moving."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from effkit.moe.recorded import OfRank, Step

TRAVELS = ("dispatch", "combine", "replicas")
BARRIER = " barrier"
END, HANDING = "waiting at the end", "handing over"
ROWS = ("gate", "permute", "compress", "dispatch waiting", "dispatch moving", "experts", "combine waiting",
        "combine moving", "replicas waiting", "replicas moving", "unpermute", HANDING,
        END)  # fmt: skip


def wall_ns(step: Step) -> int:
    """From the moment when all ranks began to the moment when the slowest was done."""
    return max(rank.end_ns for rank in step.ranks) - min(rank.begin_ns for rank in step.ranks)


def rows_ns(step: Step) -> dict[str, float]:
    """The mean over ranks of each phase's time, ``ROWS`` in order; only time that no computing hides counts as
    waiting or moving. ``HANDING``: between computing and an exchange, when neither goes on. ``END``: until the slowest
    rank is done. A row that never occurs is left out."""
    rows: dict[str, float] = defaultdict(float)
    done = max(rank.end_ns for rank in step.ranks)
    rows[END] = sum(done - rank.end_ns for rank in step.ranks) / len(step.ranks)
    for rank in range(len(step.ranks)):
        for name, time_ns in _of_rank(step, rank).items():
            rows[name] += time_ns / len(step.ranks)
    return {name: rows[name] for name in ROWS if name in rows}


def communication_ns(step: Step) -> dict[str, float]:
    """The mean over ranks of the time in collectives, by kind: ``dispatch exposed``, ``dispatch hidden``, …"""
    times: dict[str, float] = defaultdict(float)
    num_ranks = len(step.ranks)
    for rank, of_rank in enumerate(step.ranks):
        phases = _of_rank(step, rank)
        for kind in TRAVELS:
            calls = [call for call in of_rank.calls if call.kind in (kind, kind + BARRIER)]
            if calls:
                busy = sum(call.end_ns - call.start_ns for call in calls)
                exposed = min(busy, phases.get(f"{kind} waiting", 0) + phases.get(f"{kind} moving", 0))
                times[f"{kind} exposed"] += exposed / num_ranks
                times[f"{kind} hidden"] += (busy - exposed) / num_ranks
    return dict(times)


def _of_rank(step: Step, rank: int) -> dict[str, float]:
    """Time of each row on one rank, but for the end [ns]."""
    rows: dict[str, float] = defaultdict(float)
    pieces = list(pieces_of(step, rank))
    for name, begin, end in step.ranks[rank].phases:
        if name not in TRAVELS:
            rows[name] += end - begin
            continue
        left = float(end - begin)
        for label, start, stop in pieces:
            if (common := min(end, stop) - max(begin, start)) > 0:
                rows[label] += common
                left -= common
        if left > 0:
            rows[HANDING] += left
    return rows


def pieces_of(step: Step, rank: int) -> Iterable[tuple[str, int, int]]:
    """The collectives of one rank, cut where the last of the ranks came: (``dispatch waiting``, begin, end), …

    The n-th collective of a rank is the n-th of every other. A barrier before a collective is its waiting.
    """
    last = [max(other.calls[n].start_ns for other in step.ranks) for n in range(len(step.ranks[rank].calls))]
    met = False
    for call, came in zip(step.ranks[rank].calls, last, strict=True):
        kind = call.kind.removesuffix(BARRIER)
        if barrier := call.kind.endswith(BARRIER):
            yield f"{kind} waiting", call.start_ns, call.end_ns
        else:
            turn = call.start_ns if met else min(max(came, call.start_ns), call.end_ns)
            yield f"{kind} waiting", call.start_ns, turn
            yield f"{kind} moving", turn, call.end_ns
        met = barrier


def typical(steps: Sequence[Step], of_step: Any) -> dict[str, float]:
    """Each row's median over rounds, averaged over the steps of different routing; ``of_step(step)`` gives rows."""
    by_number: dict[int, list[Mapping[str, float]]] = defaultdict(list)
    for step in steps:
        by_number[step.number].append(of_step(step))
    names = dict.fromkeys(name for rows in by_number.values() for row in rows for name in row)
    return {name: float(np.mean([np.median([row.get(name, 0.0) for row in rows]) for rows in by_number.values()]))
            for name in names}  # fmt: skip


def phases_by_place(rank: OfRank) -> dict[tuple[bool, str, str], float]:
    """Time of one rank's computing phases by (forward?, place, phase) [ns].

    The place is ``before`` the experts' first piece, ``during`` the pieces, or ``after`` the last one: what a pipeline
    can hide lies in the middle.
    """
    times: dict[tuple[bool, str, str], float] = defaultdict(float)
    for forward in (True, False):
        phases = [phase for phase in rank.phases if (phase[1] < rank.turn_ns) == forward]
        names = [name for name, _, _ in phases]
        if "experts" not in names:
            continue
        first, last = names.index("experts"), len(names) - 1 - names[::-1].index("experts")
        # the first piece is unpacked between its arrival and the experts, the last one packed right after them
        if names[max(0, first - 2) : first] == ["dispatch" if forward else "combine", "compress"]:
            first -= 1
        if names[last + 1 : last + 2] == ["compress"]:
            last += 1
        for i, (name, begin, end) in enumerate(phases):
            if name not in TRAVELS:
                place = "before" if i < first else "after" if i > last else "during"
                times[forward, place, name] += end - begin
    return dict(times)
