"""From what ranks wrote down to rows: waiting and moving, by hand."""

import pytest

from effkit.moe import breakdown
from effkit.moe.recorded import Call, OfRank, Step


def call(kind, start, end):
    return Call(kind, start, end, [0, 8], [8, 0])


def step(*ranks, turn=1000):
    made = [OfRank(0, turn, max(phase[2] for phase in phases), phases, calls) for phases, calls in ranks]
    return Step(0, 0, 0, made)


PLAIN = step(
    ([("gate", 0, 10), ("dispatch", 10, 50), ("experts", 50, 90)], [call("dispatch", 11, 49)]),
    ([("gate", 0, 30), ("dispatch", 30, 55), ("experts", 55, 100)], [call("dispatch", 31, 54)]),
)


def test_waiting_ends_when_the_last_rank_has_come():
    assert list(breakdown.pieces_of(PLAIN, 0)) == [("dispatch waiting", 11, 31), ("dispatch moving", 31, 49)]
    assert list(breakdown.pieces_of(PLAIN, 1)) == [("dispatch waiting", 31, 31), ("dispatch moving", 31, 54)]


def test_rows_are_means_over_ranks_and_the_slowest_is_waited_for_at_the_end():
    rows = breakdown.rows_ns(PLAIN)
    assert rows == {"gate": 20, "dispatch waiting": 10, "dispatch moving": (18 + 23) / 2, "experts": 42.5,
                    "handing over": 2, "waiting at the end": 5}  # fmt: skip
    assert breakdown.wall_ns(PLAIN) == 100
    assert sum(rows.values()) == pytest.approx(100)


def test_what_runs_under_computing_is_hidden():
    piped = step(
        ([("experts", 0, 40), ("dispatch", 40, 60), ("experts", 60, 80)], [call("dispatch", 10, 60)]),
        ([("experts", 0, 30), ("dispatch", 30, 50), ("experts", 50, 80)], [call("dispatch", 20, 50)]),
    )
    assert breakdown.rows_ns(piped) == {"dispatch moving": 20, "experts": 60, "waiting at the end": 0}
    assert breakdown.communication_ns(piped) == {"dispatch exposed": 20, "dispatch hidden": 20}


def test_a_barrier_is_waiting_and_what_follows_it_moving():
    met = step(
        ([("dispatch", 0, 60)], [call("dispatch barrier", 0, 40), call("dispatch", 40, 60)]),
        ([("gate", 0, 35), ("dispatch", 35, 60)], [call("dispatch barrier", 35, 41), call("dispatch", 42, 60)]),
    )
    assert breakdown.rows_ns(met) == {"gate": 17.5, "dispatch waiting": 23, "dispatch moving": 19,
                                      "handing over": 0.5, "waiting at the end": 0}  # fmt: skip


def test_rounds_are_told_by_their_median_and_steps_by_their_mean():
    steps = [
        Step(0, around, number, [OfRank(0, 0, wall, [], [])])
        for number, walls in enumerate([(10, 90, 12), (20, 22, 24)])
        for around, wall in enumerate(walls)
    ]
    assert breakdown.typical(steps, lambda one: {"wall": breakdown.wall_ns(one)}) == {"wall": (12 + 22) / 2}


def test_phases_are_told_by_their_place_around_the_experts():
    forward = [
        ("gate", 0, 1), ("compress", 1, 3), ("dispatch", 3, 10), ("compress", 10, 12), ("experts", 12, 20),
        ("compress", 20, 21), ("combine", 21, 22), ("dispatch", 22, 23), ("compress", 23, 24), ("experts", 24, 30),
        ("compress", 30, 31), ("combine", 31, 40), ("compress", 40, 42), ("unpermute", 42, 45),
    ]  # fmt: skip
    back = [("unpermute", 50, 52), ("combine", 52, 60), ("experts", 60, 70), ("dispatch", 70, 80), ("gate", 80, 81)]
    seen = breakdown.phases_by_place(OfRank(0, 50, 81, forward + back, []))
    assert seen == {
        (True, "before", "gate"): 1, (True, "before", "compress"): 2, (True, "during", "compress"): 5,
        (True, "during", "experts"): 14, (True, "after", "compress"): 2, (True, "after", "unpermute"): 3,
        (False, "before", "unpermute"): 2, (False, "during", "experts"): 10, (False, "after", "gate"): 1,
    }  # fmt: skip
