"""Work while nothing else is to be done."""

import asyncio
import threading
import time

import pytest
from test_whatif import BASE, KNOBS, measure, predict

from effkit import idle, models
from effkit.activations.fake_step import Replayer
from effkit.activations.levers import Levers
from effkit.whatif import WhatIf


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(idle, "_REST_S", 0.001)
    monkeypatch.setattr(idle, "_TURN_S", 0.0)


def in_a_loop(until, seconds=60):
    """Run a loop, as a kernel's, until this is so; ``until`` is made inside it."""

    async def run():
        done = until()
        async with asyncio.timeout(seconds):
            while not done():
                await asyncio.sleep(0.005)

    asyncio.run(run())


def test_outside_a_loop_nothing_is_done():
    idle.work_when_idle([pytest.fail], lambda: False)
    idle.give_way()


def test_jobs_are_done_in_order_and_one_that_fails_holds_up_none():
    done = []

    def fails():
        done.append("failed")
        raise MemoryError

    def until():
        idle.work_when_idle([lambda: done.append(1), fails, lambda: done.append(2)], lambda: False)
        assert done == [], "not before whoever asks has returned"
        return lambda: len(done) == 3

    in_a_loop(until)
    assert done == [1, "failed", 2]


def test_a_job_gives_way_to_what_comes_and_is_begun_again():
    order = []

    def job():
        order.append("begun")
        if order.count("begun") == 1:  # a message arrives while it works
            asyncio.get_running_loop().call_soon(order.append, "message")
        idle.give_way()
        order.append("done")

    def until():
        idle.work_when_idle([job], lambda: False)
        return lambda: "done" in order

    in_a_loop(until)
    assert order == ["begun", "message", "begun", "done"]


def test_nothing_is_begun_while_it_is_occupied():
    done, occupied = [], [True] * 5

    def until():
        idle.work_when_idle([lambda: done.append(len(occupied))], lambda: bool(occupied and occupied.pop()))
        return lambda: done

    in_a_loop(until)
    assert done == [0]


def asked_ahead(measuring):
    """The settings that a panel has predicted by itself once its measurement, if any, was over."""
    asked, while_measuring = [], []

    def noted(base, **setting):
        asked.append(setting)
        while_measuring.append(WhatIf._running.locked())
        return predict(base, **setting)

    def until():
        panel = WhatIf(BASE, noted, KNOBS, measure)
        assert asked == []
        if measuring:
            WhatIf._running.acquire()
            asyncio.get_running_loop().call_later(0.1, WhatIf._running.release)
        return lambda: len(panel._ahead) == 6

    in_a_loop(until)
    assert not any(while_measuring)
    return asked


@pytest.mark.parametrize("measuring", [False, True])
def test_a_panel_predicts_the_first_moves_and_never_beside_a_measurement(measuring):
    rest = {"rows": 10, "ranks": 2, "order": "random"}
    moves = [{"rows": 11}, {"rows": 9}, {"ranks": 3}, {"ranks": 1}, {"order": "random"}, {"order": "sorted"}]
    assert asked_ahead(measuring) == [rest | move for move in moves]


def test_what_was_predicted_ahead_is_what_the_move_shows():
    asked = []

    def noted(base, **setting):
        asked.append(setting["rows"])
        return predict(base, **setting)

    panels = []

    def until():
        panels.append(WhatIf(BASE, noted, KNOBS))
        return lambda: len(panels[0]._ahead) == 6

    in_a_loop(until)
    (panel,) = panels
    before = len(asked)
    panel.controls["rows"].value = 11
    assert len(asked) == before
    assert panel.shown().startswith("Time: 110 ns (predicted")
    panel.controls["rows"].value = 12
    assert len(asked) == before + 1
    assert panel.shown().startswith("Time: 120 ns (predicted")


def test_a_move_in_another_thread_is_not_kept_waiting():
    """JupyterLab has widgets' messages in a thread of their own."""
    begun, shown = threading.Event(), []

    def endless_ahead(base, **setting):
        if threading.current_thread() is threading.main_thread():
            begun.set()
            end = time.monotonic() + 20
            while not shown and time.monotonic() < end:
                idle.give_way()
        return predict(base, **setting)

    def moves(panel):
        assert begun.wait(20)
        panel.controls["rows"].value = 50
        shown.append(panel.shown())

    def until():
        threading.Thread(target=moves, args=(WhatIf(BASE, endless_ahead, KNOBS),), daemon=True).start()
        return lambda: shown

    in_a_loop(until)
    assert shown[0].startswith("Time: 500 ns (predicted")


@pytest.mark.parametrize(
    "after", [15, 45, 75, 100, 125],
    ids=["in the first forward", "in the first update", "in forward", "in recomputing", "in the update"],
)  # fmt: skip
def test_a_replay_that_gave_way_changes_no_figure_of_the_next(after):
    model = models.gpt(layers=2, hidden=32, heads=2, vocabulary=50)
    batch = model.random_batch(batch_size=2, length=8)
    levers = Levers(checkpoint_every=1, optimizer_states="int8")
    undisturbed = Replayer(model).replay(batch, levers).levels()
    replayer, parts = Replayer(model), iter(range(after))
    begun = idle._occupied.set(lambda: next(parts, None) is None)
    with pytest.raises(idle.GaveWay):
        replayer.replay(batch, levers)
    idle._occupied.reset(begun)
    assert (replayer.replay(batch, levers).levels() == undisturbed).all()
