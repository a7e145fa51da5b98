"""Ctrl-C that waits: while something is put back, or runs that must not break off, a press is delivered after it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

Result = TypeVar("Result")
_held: set[CodeType] = set()  # functions that no press interrupts, whatever they call


class _Presses:
    """What Ctrl-C was told, while we listen in its place: in the main thread, where it is raised."""

    depth = 0
    usual: Any = None
    waiting = False  # a press came while it was held
    raised = False  # one was raised; inside of a weak reference's callback, Python prints it and goes on


def _pressed(number: int, frame: FrameType | None) -> None:
    # a second press, while the first is on its way out, would break off what clears up behind it
    if _holds(frame) or sys.exc_info()[0] is KeyboardInterrupt:
        _Presses.waiting = True
    else:
        _Presses.raised = True
        _Presses.usual(number, frame)


def _holds(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code in _held:
            return True
        frame = frame.f_back
    return False


def _listen() -> None:
    if threading.current_thread() is not threading.main_thread():
        return
    if not _Presses.depth:
        usual = signal.getsignal(signal.SIGINT)
        if not callable(usual):  # ignored, or not Python's to handle
            return
        _Presses.usual, _Presses.waiting, _Presses.raised = usual, False, False
        signal.signal(signal.SIGINT, _pressed)
    _Presses.depth += 1


def _leave() -> None:
    """Listen no more; called by a held function, whose caller hears what waited."""
    if threading.current_thread() is not threading.main_thread() or not _Presses.depth:
        return
    _Presses.depth -= 1
    if not _Presses.depth:
        signal.signal(signal.SIGINT, _Presses.usual)
    if not _holds(sys._getframe(2)):
        deliver()


def deliver() -> None:
    """Raise a press that waited, or that was raised and lost."""
    lost = _Presses.raised and sys.exc_info()[0] is not KeyboardInterrupt
    if threading.current_thread() is threading.main_thread() and (_Presses.waiting or lost):
        _Presses.waiting = _Presses.raised = False
        _Presses.usual(signal.SIGINT, sys._getframe())


def uninterrupted(call: Callable[[], Result]) -> Result:
    """Call this; what is pressed meanwhile is delivered when it has returned."""
    _listen()
    try:
        return call()
    finally:
        _leave()


class PutBack:
    """A context that puts something back in the end, whatever happens: a subclass has ``begin`` and ``put_back``."""

    def begin(self) -> Any:
        """Enters the context; what it returns is bound by ``as``. No press interrupts this."""
        raise NotImplementedError

    def put_back(self) -> None:
        """Leaves it. No press interrupts this."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        _listen()
        try:
            begun = self.begin()
        except BaseException:
            _leave()
            raise
        try:
            if not _holds(sys._getframe(1)):
                deliver()
        except BaseException:
            self.__exit__()
            raise
        return begun

    def __exit__(self, *_: object) -> None:
        try:
            self.put_back()
        finally:
            _leave()


_held.update((uninterrupted.__code__, PutBack.__enter__.__code__, PutBack.__exit__.__code__))
