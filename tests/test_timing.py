"""The wall clock around calls."""

import platform
import subprocess
import sys
import time

import accelerators
import pytest

from effkit import timing
from effkit.timing import Stopwatch, elapsed_ns, interleaved_ns


def test_a_call_is_timed_between_two_waits_for_the_accelerator(monkeypatch):
    done = []
    monkeypatch.setattr(timing, "synchronize", lambda: done.append("wait"))
    taken = elapsed_ns(lambda: done.append(time.sleep(0.01)))
    assert done == ["wait", None, "wait"]
    assert 10_000_000 <= taken < 10_000_000_000


FAULTS = """
import resource
import numpy as np
from effkit.timing import elapsed_ns, ratios_in_turn

def step():
    [np.ones(2**17) for _ in range(24)]  # 24 MiB in blocks of one, and free again

if "timed" in sys.argv:
    elapsed_ns(lambda: None)
if "in turn" in sys.argv:
    ratios_in_turn(lambda: 1, [], lambda _: [])
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another allocator keeps what is freed by its own rules")
def test_a_timed_step_finds_the_memory_that_the_one_before_has_freed():
    def pages(*how):
        done = subprocess.run(
            [sys.executable, "-c", "import sys" + FAULTS, *how], capture_output=True, text=True, check=True
        )
        return int(done.stdout)

    assert pages() > 5000, "without it every page is a fresh one: 6,144 of 4 KiB"
    assert pages("timed") < 500
    assert pages("in turn") < 500


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


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_work_that_an_accelerator_was_given_is_a_part_of_the_call(kind, monkeypatch):
    queue = accelerators.installed(monkeypatch, kind)
    queue.give(0.2)
    assert 50_000_000 <= elapsed_ns(lambda: queue.give(0.05)) < 190_000_000, "what was given before is not counted"
    assert interleaved_ns({"a": lambda: queue.give(0.05)}, repeats=1)["a"] >= 50_000_000


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_a_stopwatch_tells_the_accelerators_own_time(kind, monkeypatch):
    queue = accelerators.installed(monkeypatch, kind)
    clock = Stopwatch(kind)
    queue.give(0.1)  # the host runs ahead of it
    marks = [clock.mark()]
    for seconds in (0.02, 0.04):
        queue.give(seconds)
        marks.append(clock.mark())
    assert clock.ns(marks).tolist() == pytest.approx([0, 20e6, 60e6], abs=1e5)
    host = Stopwatch()
    begin = host.mark()
    time.sleep(0.01)
    assert 10_000_000 <= host.ns([begin, host.mark()])[1] < 10_000_000_000
