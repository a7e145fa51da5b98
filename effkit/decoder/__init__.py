"""The decoder analysis: where autoregressive time goes, and what moving layers to the encoder buys."""

from __future__ import annotations

from effkit.decoder.condensing import CondensedAttention, condensed
from effkit.decoder.floors import roofline
from effkit.decoder.live import measure
from effkit.decoder.memory import kv_cache_bytes
from effkit.decoder.merging import kept_ratios, merge_tokens, merged
from effkit.decoder.nesting import exit_at, exits, train_nested
from effkit.decoder.prediction import predict, whatif
from effkit.decoder.rebalancing import rebalance, static_decoding
from effkit.decoder.recorded import account, positions
from effkit.decoder.setting import Setting
from effkit.decoder.speculating import best_num_draft, speculate
from effkit.decoder.states import contexts

__all__ = [
    "CondensedAttention", "Setting", "account", "best_num_draft", "condensed", "contexts", "exit_at", "exits",
    "kept_ratios", "kv_cache_bytes", "measure", "merge_tokens", "merged", "positions", "predict", "rebalance",
    "roofline", "speculate", "static_decoding", "train_nested", "whatif",
]  # fmt: skip
