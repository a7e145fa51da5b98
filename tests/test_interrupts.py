"""Ctrl-C: delivered, and never in the middle of what must not break off."""

from __future__ import annotations

import gc
import signal
import threading
import time
import weakref

import pytest

from effkit.interrupts import PutBack, deliver, uninterrupted


def press():
    signal.raise_signal(signal.SIGINT)


class Noted(PutBack):
    """Puts a list's length back; presses while it does."""

    def __init__(self, presses=0):
        self.presses, self.done = presses, []

    def begin(self):
        return self

    def put_back(self):
        for _ in range(self.presses):
            press()
        self.done.append("all")


@pytest.fixture(autouse=True)
def usual(ctrl_c):
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("presses", [0, 1, 3])
def test_a_press_while_something_is_put_back_is_delivered_after_it(presses):
    context = Noted(presses)
    if presses:
        with pytest.raises(KeyboardInterrupt), context:
            pass
    else:
        with context:
            pass
    assert context.done == ["all"]


def test_a_second_press_waits_until_what_the_first_broke_off_is_put_back():
    context = Noted(presses=2)

    def run():
        with context:
            try:
                press()
            finally:
                press()  # while the first is on its way out
                context.done.append("cleared up")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert context.done == ["cleared up", "all"]


def test_what_must_not_break_off_runs_to_its_end():
    done = []

    def call():
        press()
        done.append(1)
        return 7

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(call)
    assert done == [1]
    assert uninterrupted(lambda: 7) == 7


def test_a_press_is_delivered_between_two_that_must_not_break_off():
    done, context = [], Noted()

    def call():
        press()
        done.append(1)

    def run():
        with context:
            uninterrupted(call)
            uninterrupted(call)

    with pytest.raises(KeyboardInterrupt):
        run()
    assert done == [1]
    assert context.done == ["all"]


def test_inside_of_one_another_it_waits_for_the_outermost():
    done = []

    def inner():
        press()
        done.append("inner")

    def outer():
        uninterrupted(inner)
        done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(outer)
    assert done == ["inner", "outer"]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_press_that_python_loses_is_delivered_later():
    """An exception in the callback of a weak reference is printed, and the program goes on."""

    class Held:
        pass

    context, held = Noted(), [Held()]
    reference = weakref.ref(held[0], lambda _: press())

    def run():
        with context:
            held.clear()
            gc.collect()
            assert reference() is None
            deliver()
            context.done.append("went on")

    with pytest.raises(KeyboardInterrupt):
        run()
    assert context.done == ["all"]


def test_one_press_is_one_interrupt():
    with pytest.raises(KeyboardInterrupt), Noted():
        press()
    with Noted():
        pass
    deliver()


def test_in_another_thread_nothing_is_taken_over():
    seen = []

    def work():
        with Noted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGINT)]


def test_a_handler_of_the_users_is_asked_and_put_back():
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(time.time()))
    try:
        with Noted(presses=1):
            press()
            assert len(pressed) == 1
        assert len(pressed) == 2
    finally:
        signal.signal(signal.SIGINT, before)
