"""What levers on a training step are measured against: its own time, and what its peak may take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effkit.account import Account
from effkit.device import Device

if TYPE_CHECKING:
    from effkit.advice.training_study import TrainingStudy

LEFT = "what is left"
_USABLE_FRAC = 0.9  # of a device's memory


def limit_bytes(budget_bytes: int | None) -> float:
    """What the peak may take."""
    return budget_bytes if budget_bytes is not None else _USABLE_FRAC * Device.here().memory_bytes


def relative(study: TrainingStudy, computing_ratio: float, waiting_ns: float | None = None) -> Account:
    """What was measured beside the base, on the base's scale."""
    waiting = study.waiting_ns if waiting_ns is None else waiting_ns
    total = round(study.computing_ns * computing_ratio + waiting)
    return Account.of(
        study.account.title, "ns", {LEFT: total}, total=total, setting=dict(study.account.setting),
        source="the wall clock, relative to the step as it is, run in turn",
    )  # fmt: skip
