"""Work for a kernel that has nothing else to do: it gives way as soon as something comes, and ends with the kernel."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from contextvars import ContextVar
from warnings import catch_warnings

from effkit.progress_bar import quiet

_REST_S = 0.5  # without anything to do, before work begins, and again after it gave way
_TURN_S = 0.01  # between two pieces of work, for all else
_occupied: ContextVar[Callable[[], bool] | None] = ContextVar("occupied", default=None)


class GaveWay(BaseException):
    """Raised inside idle work when something came. As with KeyboardInterrupt, ``except Exception`` does not hold it."""


def give_way() -> None:
    """To be called between two parts of long work: ends it here if it is idle work and something else is to be done."""
    occupied = _occupied.get()
    if occupied is not None and occupied():
        raise GaveWay


def work_when_idle(jobs: Iterable[Callable[[], object]], occupied: Callable[[], bool]) -> None:
    """Do these while no message waits for the kernel and nothing is ``occupied``; outside a kernel, do nothing.

    In the kernel's own thread, where no cell can run meanwhile: no measurement, no random number of a reader's. A job
    that gave way is begun again later; one that fails is left out: whoever needs its result will be told.
    """
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    waiting = deque(jobs)

    def stop() -> bool:
        return occupied() or _has_messages(loop)

    def work() -> None:
        gave_way = stop()
        if not gave_way:
            begun = _occupied.set(stop)
            try:  # a warning would be printed under the cell that ran last
                with suppress(Exception), catch_warnings(action="ignore"), quiet():
                    waiting[0]()
                waiting.popleft()
            except GaveWay:
                gave_way = True
            finally:
                _occupied.reset(begun)
        if waiting:
            loop.call_later(_REST_S if gave_way else _TURN_S, work)

    if waiting:
        loop.call_later(_REST_S, work)


def _has_messages(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop has something to do now. asyncio does not tell: where this cannot be seen, it has."""
    selector = getattr(loop, "_selector", None)
    return selector is None or bool(getattr(loop, "_ready", True)) or bool(selector.select(0))
