"""What the builders of live models share: checks of sizes, the device, random batches, one kind of output."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn


class Output(NamedTuple):
    """What a model of our own returns: ``loss`` (a scalar) and ``logits`` (its last axis is classes or tokens)."""

    loss: torch.Tensor
    logits: torch.Tensor


def check_counts(**counts: int) -> None:
    """Raise ValueError, naming the first that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is at least 1; given: {count}")


def check_heads(hidden: int, heads: int) -> None:
    """Raise ValueError unless attention heads of equal width make up ``hidden``."""
    if hidden % heads:
        raise ValueError(f"hidden is a multiple of heads; given: {hidden} and {heads}")


def ready(model: nn.Module, device: str | None, dtype: torch.dtype) -> Any:
    """The model in training mode, on ``device``, or on the GPU where there is one when None."""
    return model.to(dtype=dtype, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).train()


def random_tokens(vocabulary: int, batch_size: int, length: int, seed: int, device: Any) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` [B, T], the same random tokens: the models shift labels by one themselves."""
    check_counts(batch_size=batch_size, length=length)
    tokens = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": tokens, "labels": tokens.clone()}


def random_classes(
    shape: tuple[int, ...], classes: int, seed: int, like: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal inputs of ``shape`` and classes [B], on the device (and inputs in the dtype) of the parameter ``like``."""
    check_counts(batch_size=shape[0])
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator).to(like)
    return inputs, torch.randint(classes, shape[:1], generator=generator).to(like.device)
