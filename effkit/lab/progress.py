"""How far a long measurement has come."""

from __future__ import annotations

from collections.abc import Callable

from effkit.interrupts import deliver

Progress = Callable[[int, int], None]  # (runs done, runs in all); what it raises ends the measurement


def tell(progress: Progress | None, done: int, total: int) -> None:
    """Report to whoever listens; nobody may. A press of Ctrl-C that Python has lost ends the measurement here."""
    deliver()
    if progress is not None:
        progress(done, total)
