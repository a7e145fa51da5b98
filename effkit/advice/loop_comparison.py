"""What levers on a training step are measured against: its own time, and what its peak may take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from effkit.account import Account
from effkit.device import Device
from effkit.timing import interleaved_ns

if TYPE_CHECKING:
    from effkit.advice.subjects import Training

Call = Callable[[], object]
LEFT = "what is left"
_REPEATS = 5
_USABLE_FRAC = 0.9  # of a device's memory


def limit_bytes(budget_bytes: int | None) -> float:
    """What the peak may take."""
    return budget_bytes if budget_bytes is not None else _USABLE_FRAC * Device.here().memory_bytes


def in_turn(study: Training, now: Sequence[Call], then: Sequence[Call]) -> Account:
    """Time of the calls ``then`` relative to the calls ``now``, run in turn, each the fastest of several runs."""
    with study.held():
        study.step(study.batches[0])
        times = interleaved_ns(dict(enumerate([*now, *then])), _REPEATS, min)
    taken = list(times.values())
    return relative(study, sum(taken[len(now) :]) / sum(taken[: len(now)]))


def relative(study: Training, computing_ratio: float, waiting_ns: float | None = None) -> Account:
    """An Account of the base's time per step, its computing scaled by a measured ratio, its waiting as given [ns]."""
    waiting = study.waiting_ns if waiting_ns is None else waiting_ns
    total = round(study.computing_ns * computing_ratio + waiting)
    return Account.of(
        study.account.title, "ns", {LEFT: total}, total=total, setting=dict(study.account.setting),
        source="the wall clock, relative to the step as it is, run in turn",
    )  # fmt: skip
