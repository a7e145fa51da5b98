"""The padding analysis: how much of each step is computed on nothing, and what a better batch plan buys.

Beside the public names, ``effkit.advice`` asks for ``input_lengths`` and ``real_rows`` of a batch, ``plan_at`` a
setting, and the titles ``EPOCH_CELLS`` and ``PEAK``.
"""

from typing import TYPE_CHECKING

from effkit.lazy import lazily
from effkit.padding.accounting import EPOCH_CELLS as EPOCH_CELLS
from effkit.padding.accounting import PEAK as PEAK
from effkit.padding.accounting import account
from effkit.padding.calibration import MemoryModel, fit_memory
from effkit.padding.loader_audit import Watch, watch
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
    "STRATEGIES", "MemoryModel", "Plan", "Watch", "account", "fit_memory", "lengths", "measure", "plan", "predict",
    "watch", "whatif",
]  # fmt: skip

__getattr__ = lazily(__name__, {"live": ["measure"]})  # torch is only needed there

__dir__ = __all__.copy  # what a reader's Tab shows
