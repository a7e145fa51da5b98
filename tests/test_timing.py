"""The wall clock around calls."""

import time

import pytest

from effkit import timing
from effkit.timing import elapsed_ns, interleaved_ns


def test_a_call_is_timed_between_two_waits_for_the_accelerator(monkeypatch):
    done = []
    monkeypatch.setattr(timing, "synchronize", lambda: done.append("wait"))
    taken = elapsed_ns(lambda: done.append(time.sleep(0.01)))
    assert done == ["wait", None, "wait"]
    assert 10_000_000 <= taken < 10_000_000_000


def test_each_call_is_made_once_a_turn_and_once_to_warm_up():
    made = []
    found = interleaved_ns({"a": lambda: made.append("a"), "b": lambda: made.append("b")}, repeats=4)
    assert sorted(made) == ["a"] * 5 + ["b"] * 5
    assert all({*made[i : i + 2]} == {"a", "b"} for i in range(0, 10, 2)), "in turn"
    assert set(found) == {"a", "b"}
    assert all(isinstance(taken, int) for taken in found.values())
    naps = iter([0.3, 0.0])
    assert interleaved_ns({"a": lambda: time.sleep(next(naps))}, repeats=1)["a"] < 1e8, "the warm-up is not counted"


def test_every_time_is_kept_but_the_warm_up():
    naps, kept = iter([0.3, 0.0, 0.01]), []
    interleaved_ns({"a": lambda: time.sleep(next(naps))}, repeats=2, pick=lambda times: kept.extend(times) or 0)
    assert len(kept) == 2
    assert kept[0] < kept[1] < 3e8
    with pytest.raises(ValueError, match="repeats is at least 1; given: 0"):
        interleaved_ns({}, repeats=0)
