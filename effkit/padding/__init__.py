"""The padding analysis: how much of each step is computed on nothing, and what a better batch plan buys.

Beside the public names, ``effkit.advice`` asks for ``input_lengths`` of a batch, ``plan_at`` a setting, ``epoch_rows``
of a plan by a cost model, and the titles ``EPOCH_TIME``, ``EPOCH_CELLS`` and ``PEAK``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effkit.padding.accounting import account
from effkit.padding.auditing import Watch, watch
from effkit.padding.auditing import input_lengths as input_lengths
from effkit.padding.cost import CostModel, fit_cost
from effkit.padding.memory import MemoryModel, fit_memory
from effkit.padding.planning import STRATEGIES, plan
from effkit.padding.plans import Plan
from effkit.padding.prediction import plan_at as plan_at
from effkit.padding.prediction import predict, whatif
from effkit.padding.sources import lengths
from effkit.padding.totals import EPOCH_CELLS as EPOCH_CELLS
from effkit.padding.totals import EPOCH_TIME as EPOCH_TIME
from effkit.padding.totals import PEAK as PEAK
from effkit.padding.totals import epoch_rows as epoch_rows

if TYPE_CHECKING:
    from effkit.account import Account

__all__ = [
    "STRATEGIES", "CostModel", "MemoryModel", "Plan", "Watch", "account", "fit_cost", "fit_memory", "lengths",
    "measure", "plan", "predict", "watch", "whatif",
]  # fmt: skip


def measure(plan: Plan, model: Any, **options: Any) -> Account:
    """The time of one epoch of ``plan`` on a live ``model``: see :func:`effkit.padding.live.measure`."""
    from effkit.padding import live  # torch is only needed here

    return live.measure(plan, model, **options)
