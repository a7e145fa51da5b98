"""The decoder analysis: where autoregressive time goes, and what moving layers to the encoder buys.

Beside the public names, ``effkit.advice`` asks for the titles ``WEIGHTS`` and ``CACHE`` of an account's companions.
"""

from effkit.decoder.accounting import CACHE as CACHE
from effkit.decoder.accounting import WEIGHTS as WEIGHTS
from effkit.decoder.early_exit import exit_at
from effkit.decoder.floors import roofline
from effkit.decoder.live import measure
from effkit.decoder.memory import kv_cache_bytes
from effkit.decoder.prediction import predict, whatif
from effkit.decoder.rebalancing import rebalance, static_decoding
from effkit.decoder.recorded import account, positions
from effkit.decoder.setting import Setting

__all__ = [
    "Setting", "account", "exit_at", "kv_cache_bytes", "measure", "positions", "predict", "rebalance",
    "roofline", "static_decoding", "whatif",
]  # fmt: skip

__dir__ = __all__.copy  # what a reader's Tab shows
