"""Ctrl-C at many moments of a measurement, a study and a forecast: delivered, and everything is as it was."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from functools import partial

import pytest
from loops import BATCHES, Loop, begun, same, state
from torch import nn

import effkit as ek
from effkit import activations

pytestmark = [
    pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore"),
    pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="presses are sent to a thread"),
]  # fmt: skip


class Large(Loop):
    """8 million parameters, whose restoring takes a while, and few examples."""

    def built(self):
        return nn.Sequential(nn.Linear(4, 2048), nn.Linear(2048, 2048), nn.Linear(2048, 2048), nn.BatchNorm1d(2048))


def pressed(run, after_s, again_s=()):
    """Run this and press so many seconds after its begin, and again so many after that; how often it was pressed, and
    how often that was told. Nothing is raised once it has ended."""
    main, sent, told, inside, stop = threading.main_thread().ident, [], [], [True], threading.Event()

    def hear(*_):
        told.append(1)
        if inside:
            raise KeyboardInterrupt

    def press():
        for wait in (after_s, *again_s):
            if stop.wait(wait):
                return
            sent.append(wait)
            signal.pthread_kill(main, signal.SIGINT)

    hand, before = threading.Thread(target=press), signal.signal(signal.SIGINT, hear)
    try:
        with suppress(KeyboardInterrupt):  # a second one may come while the first is on its way out
            with suppress(KeyboardInterrupt):
                hand.start()
                run()
            inside.clear()
        inside.clear()
        if not again_s:
            stop.set()
        hand.join()
        assert signal.getsignal(signal.SIGINT) is hear
    finally:
        signal.signal(signal.SIGINT, before)
    return len(sent), len(told)


def check(loop, before):
    after = state(loop)
    assert [i for i, (one, other) in enumerate(zip(before[0], after[0], strict=True)) if not same(one, other)] == []
    assert after[1:] == before[1:]


def square(output):
    return output.square().mean()


def scanned(call, count):
    """Press at so many moments of this call, evenly spread, and check what it left; of each press (presses, told), and
    how long the call takes [s]."""
    loop = begun(Loop)
    before, outcomes = state(loop), []
    call(loop)
    start = time.perf_counter()
    call(loop)
    whole_s = time.perf_counter() - start
    check(loop, before)
    for number in range(count):
        outcomes.append(pressed(partial(call, loop), whole_s * (number + 0.5) / count))
        check(loop, before)
    call(loop)
    return outcomes, whole_s


DOORS = {
    "measure": (4, lambda loop: activations.measure(loop.model, BATCHES[0], loss=square, repeats=1, time_levers=True)),
    "study": (5, lambda loop: ek.study(step=loop.step, model=loop.model, loader=BATCHES, num_batches=2).overview()),
    "forecast": (25, lambda loop: activations.forecast(loop.model, BATCHES[0], loss=square, batch_size=16)),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_press_at_any_moment(door):
    count, call = DOORS[door]
    for presses, told in scanned(call, count)[0]:
        # none where it was quicker this time; once more where Python lost it, in a callback of a weak reference
        assert presses <= told <= 2 * presses


@pytest.mark.parametrize("again_s", [0.002, 0.01, 0.03])
def test_a_second_press_while_a_large_model_is_put_back(again_s):
    loop = begun(Large)
    before = state(loop)
    for after_s in (0.15, 0.4):
        run = partial(ek.study, step=loop.step, model=loop.model, loader=BATCHES)
        presses, told = pressed(run, after_s, [again_s, again_s])
        assert presses == 3
        assert told >= 1
        check(loop, before)
