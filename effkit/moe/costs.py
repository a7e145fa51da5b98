"""What each phase of a step costs, as a function of the setting: terms that are counted, times that are fitted.

Shapes: R ranks, E experts, N tokens of a rank, H hidden, F inner width; ``rows`` are those that travel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from effkit.least_squares import Floats, nonnegative
from effkit.models.lsh import NUM_DIRECTIONS
from effkit.models.messages import form_of, row_bytes
from effkit.moe import routing
from effkit.moe.breakdown import BARRIER, TRAVELS, phases_by_place
from effkit.moe.recorded import Call, OfRank, Step
from effkit.moe.setting import Setting
from effkit.trace.names import ITEM_BYTES

COUNT_BYTES = 8  # of one expert's count, which every rank tells every other
Key = tuple[bool, str, str]  # forward?, before / during / after the experts, phase


class Handing(NamedTuple):
    """Overlapped exchanges: time to hand one over, between one and the next, and until its end is noticed [ns]."""

    submit_ns: float = 0.0
    between_ns: float = 0.0
    wake_ns: float = 0.0


@dataclass(frozen=True, eq=False)
class Costs:
    """Fitted times: of each phase per :func:`terms`, and of one collective per :func:`moving_terms` [ns]; and what it
    costs to hand an exchange to a thread of its own."""

    phases: Mapping[Key, Floats]
    moving: Floats
    handing: Handing = field(default_factory=Handing)

    def phase_ns(self, key: Key, setting: Setting, traffic: routing.Traffic, rank: int) -> float:
        """Time of one rank's phase; 0 for one that was never seen to take any."""
        if key not in self.phases:
            return 0.0
        return float(self.phases[key] @ terms(key, setting, traffic, rank))

    def ends_ns(self, arrived_ns: Floats, sent_bytes: Floats, ranks_per_node: int, overlap: bool) -> Floats:
        """When each rank leaves a collective to which the ranks come at these moments; ``sent_bytes`` [from, to].

        A pair's bytes pass once both have come, one after another where they share a link: those of whoever came last
        go first, for their receivers have been waiting. A rank leaves when all that is for it is there.
        """
        num_ranks = len(sent_bytes)
        ready = np.maximum.outer(arrived_ns, arrived_ns)
        last = float(arrived_ns.max())
        late = np.broadcast_to((arrived_ns == last)[:, None], ready.shape)
        start, per_byte = moving_terms(sent_bytes, ranks_per_node, overlap), self.moving
        fixed = float(per_byte[[0, 3]] @ start[[0, 3]])
        node = np.arange(num_ranks) // ranks_per_node
        time_ns = sent_bytes * np.where(node[:, None] == node[None], per_byte[2], per_byte[1])
        time_ns = time_ns * (1 - np.eye(num_ranks))
        ends, free = np.full(num_ranks, last + fixed), 0.0
        turns = {(float(at), bool(of_late)) for at, of_late in zip(ready.flat, late.flat, strict=True)}
        for moment, first in sorted(turns, key=lambda turn: (turn[0], not turn[1])):
            together = (ready == moment) & (late == first)
            free = max(free, moment) + float(time_ns[together].sum())
            ends = np.where((together & (time_ns > 0)).any(axis=0), np.maximum(ends, free + fixed), ends)
        return ends


def terms(key: Key, setting: Setting, traffic: routing.Traffic, rank: int) -> Floats:
    """What the time of a phase is proportional to, part by part."""
    forward, place, phase = key
    pieces = setting.degrees[0 if forward else 1]
    n, h, f, e = setting.num_tokens, setting.hidden, setting.ffn, setting.num_experts
    kept, own = float(traffic.kept[rank].sum()), float(traffic.rows[rank].sum())
    arrived = traffic.held(rank)
    rows, experts = float(arrived.sum()), float((arrived.sum(axis=0) > 0).sum())
    cut, lsh = float(pieces > 1), float(setting.compress == "lsh")
    recut = float(not forward and place == "before" and setting.degrees[0] != setting.degrees[1])
    half, eighth = (float(setting.message_dtype == dtype) for dtype in ("bfloat16", "float8"))
    by_phase = {
        "gate": [1.0, n * e, n * h * e],
        "permute": [1.0, pieces * e * len(traffic.rows), (kept if place == "before" or not forward else 0.0) * h,
                    cut * own * h, recut * rows * (h + f)],
        "unpermute": [1.0, kept * h, n * h],
        # the quadratic term: what outgrows the caches costs more per row; then, of all pieces but one, the exchange of
        # another competes for the machine; last, ranks that share cores or memory compete while both compute
        "experts": [pieces * experts, rows * h * f, rows * (h + f), rows**2 * (h + f) / pieces,
                    pieces * experts * h * f, (1 - 1 / pieces) * rows * h * f, traffic.beside(rank) * h * f],
        "compress": [lsh, lsh * n * h * setting.num_hashes * NUM_DIRECTIONS, lsh * kept * h,
                     half, half * (own + rows) * h, eighth, eighth * (own + rows) * h],
    }  # fmt: skip
    return np.array(by_phase.get(phase, [1.0]))


def moving_terms(sent_bytes: Floats, ranks_per_node: int, overlap: bool) -> Floats:
    """What a collective takes from the last arrival to the last departure: start-up, bytes between nodes, bytes between
    ranks of a node, and, overlapped, its start-up once more."""
    node = np.arange(len(sent_bytes)) // ranks_per_node
    same_node = node[:, None] == node[None]
    intra = float(sent_bytes[same_node].sum() - np.trace(sent_bytes))
    return np.array([1.0, float(sent_bytes[~same_node].sum()), intra, float(overlap)])


def message_bytes(setting: Setting, *, forward: bool, out: bool) -> int:
    """Bytes of a row on its way to the experts (``out``) or back, forward or backward."""
    form = form_of(setting.message_dtype, forward=forward, out=out)
    return row_bytes(form, setting.hidden, ITEM_BYTES[setting.dtype])


def fit(settings: Sequence[Setting], steps: Sequence[Step], ranks_per_node: int) -> Costs:
    """Costs from what was measured: every phase's and every collective's median over the rounds.

    Relative errors are minimised, so that short times count as much as long ones.
    """
    by_place: dict[tuple[int, int, int], list[dict[Key, float]]] = defaultdict(list)
    for step in steps:
        for rank, record in enumerate(step.ranks):
            by_place[step.job, step.number, rank].append(phases_by_place(record))
    designs: dict[Key, list[tuple[Floats, float]]] = defaultdict(list)
    for (job, number, rank), rounds in by_place.items():
        for key in dict.fromkeys(key for phases in rounds for key in phases):
            time_ns = float(np.median([phases.get(key, 0.0) for phases in rounds]))
            traffic = routing.traffic(settings[job], len(steps[0].ranks), number)
            designs[key].append((terms(key, settings[job], traffic, rank), time_ns))
    moving = _fitted(_collectives(settings, steps, ranks_per_node))
    return Costs({key: _fitted(design) for key, design in designs.items()}, moving, _handing(settings, steps))


def _collectives(settings: Sequence[Setting], steps: Sequence[Step], ranks_per_node: int) -> list[tuple[Floats, float]]:
    """Terms of each collective, and its time from the last arrival to the last departure [ns], median over rounds."""
    designs: dict[tuple[int, int, int], Floats] = {}
    times: dict[tuple[int, int, int], list[float]] = defaultdict(list)
    for step in steps:
        for n, calls in enumerate(zip(*(rank.calls for rank in step.ranks), strict=True)):
            if calls[0].kind.endswith(BARRIER):
                continue
            key = step.job, step.number, n
            overlap = settings[step.job].degrees[0 if calls[0].start_ns < step.ranks[0].turn_ns else 1] > 1
            sent_bytes = np.array([call.sent_bytes for call in calls], float)
            designs[key] = moving_terms(sent_bytes, ranks_per_node, overlap)
            times[key].append(max(call.end_ns for call in calls) - max(call.start_ns for call in calls))
    return [(designs[key], float(np.median(rounds))) for key, rounds in times.items()]


def _handing(settings: Sequence[Setting], steps: Sequence[Step]) -> Handing:
    """Medians over all overlapped exchanges; nothing where none was."""
    submits, betweens, wakes = [0.0], [0.0], [0.0]
    for rank, forward, calls in _overlapped(settings, steps):
        betweens += [later.start_ns - call.end_ns for call, later in pairwise(calls)]
        for name, begin, end in rank.phases:
            if name in TRAVELS and calls[0].start_ns < end <= rank.end_ns:
                ended = [call.end_ns for call in calls if call.kind == name and begin < call.end_ns <= end]
                if ended:
                    wakes.append(end - max(ended))
                elif (begin < rank.turn_ns) == forward:
                    submits.append(end - begin)
    return Handing(*(float(np.median(times[1:] or times)) for times in (submits, betweens, wakes)))


def _overlapped(settings: Sequence[Setting], steps: Sequence[Step]) -> Iterator[tuple[OfRank, bool, list[Call]]]:
    """The collectives of every rank and direction (forward?) whose exchanges overlap with computing."""
    for step in steps:
        for rank in step.ranks:
            for forward, degree in zip((True, False), settings[step.job].degrees, strict=True):
                # forward, one more collective comes first: it tells the counts, and does not overlap
                calls = [call for call in rank.calls if (call.start_ns < rank.turn_ns) == forward][int(forward) :]
                if degree > 1 and calls:
                    yield rank, forward, calls


def _fitted(measured: Sequence[tuple[Floats, float]]) -> Floats:
    """Nanoseconds per term, from terms and times."""
    design, times = (np.array(column) for column in zip(*measured, strict=True))
    weight = 1 / np.maximum(times, 0.02 * times.mean() + 1.0)
    return nonnegative(design * weight[:, None], times * weight)
