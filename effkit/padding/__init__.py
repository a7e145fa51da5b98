"""The padding analysis: how much of each step is computed on nothing, and what a better batch plan buys.

Beside the public names, ``effkit.advice`` asks for ``input_lengths`` and ``real_rows`` of a batch, ``plan_at`` a
setting, and the titles ``EPOCH_TIME``, ``EPOCH_CELLS`` and ``PEAK``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from effkit.padding.accounting import account
from effkit.padding.cost import CostModel, fit_cost
from effkit.padding.epoch_accounts import EPOCH_CELLS as EPOCH_CELLS
from effkit.padding.epoch_accounts import EPOCH_TIME as EPOCH_TIME
from effkit.padding.epoch_accounts import PEAK as PEAK
from effkit.padding.loader_audit import Watch, watch
from effkit.padding.memory import MemoryModel, fit_memory
from effkit.padding.planning import STRATEGIES, plan
from effkit.padding.plans import Plan
from effkit.padding.prediction import plan_at as plan_at
from effkit.padding.prediction import predict, whatif
from effkit.padding.real_cells import input_lengths as input_lengths
from effkit.padding.real_cells import real_rows as real_rows
from effkit.padding.sources import lengths

if TYPE_CHECKING:
    from effkit.padding.live import measure

__all__ = [
    "STRATEGIES", "CostModel", "MemoryModel", "Plan", "Watch", "account", "fit_cost", "fit_memory", "lengths",
    "measure", "plan", "predict", "watch", "whatif",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """``measure`` is imported when first named: torch is only needed there."""
    if name == "measure":
        return import_module("effkit.padding.live").measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
