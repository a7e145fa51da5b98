"""The layer of a setting, on a rank of a run or in this process alone."""

from __future__ import annotations

from typing import Any

import torch

from effkit.models import expert_parallel
from effkit.models.moe import ExpertParallel
from effkit.moe.setting import Setting


def layer_of(setting: Setting, **placed: Any) -> ExpertParallel:
    """The layer that a setting describes; ``placed`` are other keywords of :func:`effkit.models.expert_parallel`."""
    first, second = setting.degrees
    return expert_parallel(
        setting.hidden, setting.ffn, setting.num_experts, setting.top_k, capacity_factor=setting.capacity_factor,
        pad=setting.pad, num_chunks=first, num_chunks_backward=second, compress=setting.compress,
        num_hashes=setting.num_hashes, compensate=setting.compensate, message_dtype=setting.message_dtype,
        dtype=getattr(torch, setting.dtype), seed=setting.seed, **placed,
    )  # fmt: skip
