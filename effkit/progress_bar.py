"""A word about what is being done, wherever it takes longer than two seconds: in a terminal, and under a cell."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from tqdm import tqdm

from effkit.interrupts import deliver

Progress = Callable[[int, int], None]  # (runs done, runs in all); what it raises ends the measurement
SLOW_S = 2.0
_EVERY_S = 0.25  # no oftener: whoever is timed must not wait for a screen


class _Bar:
    """What a public call has done so far. Drawn from :func:`advance` alone: between runs, never inside of one."""

    def __init__(self, what: str) -> None:
        self._what, self._begun = what, time.monotonic()
        self.next = self._begun + SLOW_S
        self._screen: Any = None

    def advance(self, done: int | None, total: int | None) -> None:
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + _EVERY_S
        of = f", {done:,} of {total:,}" if done is not None and total else ""
        shell = _kernel()
        how = "Ctrl-C stops it" if shell is None else "interrupt the kernel to stop it"
        said = f"{self._what}{of}, {now - self._begun:.0f} s ({how})"
        if self._screen is None:  # a bar of tqdm's has no truth value
            line = {"bar_format": "{desc}", "leave": False, "disable": None}
            self._screen = tqdm(**line) if shell is None else _label(said, shell)
        if shell is None:
            self._screen.set_description_str(said)
        else:
            self._screen.value = said

    def close(self) -> None:
        if self._screen is not None:
            self._screen.close()


_bar: ContextVar[_Bar | None] = ContextVar("bar", default=None)


@contextmanager
def working(what: str) -> Iterator[None]:
    """Around a public call, or as its decorator: says ``what`` after two seconds, and is gone at its end.

    Of calls inside calls the outermost alone speaks.
    """
    with nullcontext() if _bar.get() is not None else _speaking(_Bar(what)):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, nothing is said: somebody else says it, or nobody waits."""
    with _speaking(_Bar("")):
        hush()
        yield


@contextmanager
def _speaking(bar: _Bar) -> Iterator[None]:
    begun = _bar.set(bar)
    try:
        yield
    finally:
        _bar.reset(begun)
        bar.close()


def advance(done: int | None = None, total: int | None = None) -> None:
    """Between two runs: how far it has come, where that is known."""
    if (bar := _bar.get()) is not None:
        bar.advance(done, total)


def hush() -> None:
    """From here on somebody else says how far the call has come."""
    if (bar := _bar.get()) is not None:
        bar.next = math.inf


def tell(progress: Progress | None, done: int, total: int) -> None:
    """Report to whoever listens, or else to the call's progress bar. A press of Ctrl-C that Python has lost ends the
    measurement here."""
    deliver()
    if progress is None:
        advance(done, total)
    else:
        hush()
        progress(done, total)


def _kernel() -> Any:
    if "IPython" not in sys.modules:
        return None
    from IPython import get_ipython

    shell = get_ipython()
    return shell if hasattr(shell, "kernel") else None


def _label(said: str, shell: Any) -> Any:
    """A widget and nothing beside it: a notebook that is saved, or compared, holds no trace of it once it is closed."""
    import ipywidgets

    label = ipywidgets.Label(said)
    view = {"version_major": 2, "version_minor": 0, "model_id": label.model_id}
    shell.display_pub.publish({"application/vnd.jupyter.widget-view+json": view})
    return label
