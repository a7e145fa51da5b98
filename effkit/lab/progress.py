"""How far a long measurement has come."""

from __future__ import annotations

from collections.abc import Callable

from effkit.interrupts import deliver
from effkit.progress_bar import advance, hush

Progress = Callable[[int, int], None]  # (runs done, runs in all); what it raises ends the measurement


def tell(progress: Progress | None, done: int, total: int) -> None:
    """Report to whoever listens, or else to the call's progress bar. A press of Ctrl-C that Python has lost ends the
    measurement here."""
    deliver()
    if progress is None:
        advance(done, total)
    else:
        hush()
        progress(done, total)
