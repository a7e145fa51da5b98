"""Llama 3.1 8B as others recorded it under FSDP2, for :mod:`ledger_recorded`: transformers' model in place of theirs.

A block is recomputed but for attention and every second matrix product, as the public description of torchtitan's
"selective" checkpointing has it; parameters are kept in float32, and gathered in bfloat16.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import effkit as ek
from effkit import activations

_aten = torch.ops.aten
_ATTENTION = {
    _aten._scaled_dot_product_flash_attention.default, _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
}  # fmt: skip


def _contexts() -> Any:
    products: Counter[bool] = Counter()

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        products[context.is_recompute] += op is _aten.mm.default
        odd = op is _aten.mm.default and products[context.is_recompute] % 2 == 1
        return CheckpointPolicy.MUST_SAVE if odd or op in _ATTENTION else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


class Recomputed(nn.Module):
    """A block that is recomputed in backward, in part."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return checkpoint(self.block, *args, use_reentrant=False, context_fn=_contexts, **kwargs)


def forecast(setting: Mapping[str, Any]) -> ek.Account:
    """The account of rank 0."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
                         num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, use_cache=False,
                         attn_implementation="sdpa")  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).train()
    model.model.layers = nn.ModuleList(map(Recomputed, model.model.layers))
    tokens = torch.zeros(setting["batch_size"], setting["length"], dtype=torch.long)
    return activations.forecast(
        model, {"input_ids": tokens, "labels": tokens}, device=setting["chip"], world_size=setting["ranks"],
        shard="fsdp2", param_dtype=setting["param_dtype"],
    )  # fmt: skip
