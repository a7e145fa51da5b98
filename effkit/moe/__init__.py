"""The MoE all-to-all analysis: moving, waiting and computing in an expert-parallel layer.

Beside the public names, ``effkit.advice`` asks for ``UNSEEN``: how a row of :func:`account` ends that nobody can tell
waiting from moving in.
"""

from typing import TYPE_CHECKING

from effkit.lazy import lazily
from effkit.ranks.launching import why_no_links

if TYPE_CHECKING:
    from effkit.moe.accounting import UNSEEN as UNSEEN
    from effkit.moe.accounting import account
    from effkit.moe.balancing import worth_balancing
    from effkit.moe.live import measure, prepare
    from effkit.moe.loads import balanced_placement, imbalance
    from effkit.moe.prediction import best_degrees, predict, whatif
    from effkit.moe.rank_spans import timeline
    from effkit.moe.setting import Setting
    from effkit.ranks.links import link

__all__ = [
    "Setting", "account", "balanced_placement", "best_degrees", "imbalance", "link", "measure", "predict", "prepare",
    "timeline", "whatif", "why_no_links", "worth_balancing",
]  # fmt: skip

__getattr__ = lazily(__name__, {
    "accounting": ["UNSEEN", "account"], "balancing": ["worth_balancing"],
    ".ranks.links": ["link"], "live": ["measure", "prepare"], "loads": ["balanced_placement", "imbalance"],
    "prediction": ["best_degrees", "predict", "whatif"], "rank_spans": ["timeline"], "setting": ["Setting"],
})  # fmt: skip

__dir__ = __all__.copy  # what a reader's Tab shows
