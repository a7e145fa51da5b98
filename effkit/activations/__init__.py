"""The activation-memory analysis: what fills the peak of a training step, and what each lever gives back.

Beside the public names, ``effkit.advice`` asks to ``observe`` a step of its own (an ``Observation``, in the phases
``FORWARD``, ``BACKWARD`` and ``OPTIMIZER``), for ``rows`` of a batch, and for the titles ``PEAK``, ``TIME`` and
``SENT_BYTES``.
"""

from effkit.activations.checkpointing import blocks, checkpoint
from effkit.activations.compressing import compressed
from effkit.activations.gradients import gradient_error
from effkit.activations.levers import Levers
from effkit.activations.live import account, measure
from effkit.activations.low_bit import LowBitAdamW
from effkit.activations.offloading import offloaded
from effkit.activations.on_ranks import SENT_BYTES as SENT_BYTES
from effkit.activations.on_ranks import TIME as TIME
from effkit.activations.pipelining import pipeline
from effkit.activations.planning import cheapest, front
from effkit.activations.prediction import forecast, largest_batch, live_bytes, predict, saved, whatif
from effkit.activations.real_step import Observation as Observation
from effkit.activations.real_step import observe as observe
from effkit.activations.sharding import Sharding, spread
from effkit.activations.stepping import BACKWARD as BACKWARD
from effkit.activations.stepping import FORWARD as FORWARD
from effkit.activations.stepping import OPTIMIZER as OPTIMIZER
from effkit.activations.stepping import rows as rows
from effkit.activations.timeline import PEAK as PEAK
from effkit.ranks.links import links

__all__ = [
    "Levers", "LowBitAdamW", "Sharding", "account", "blocks", "cheapest", "checkpoint", "compressed", "forecast",
    "front", "gradient_error", "largest_batch", "links", "live_bytes", "measure", "offloaded", "pipeline", "predict",
    "saved", "spread", "whatif",
]  # fmt: skip

__dir__ = __all__.copy  # what a reader's Tab shows
