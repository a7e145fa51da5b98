"""The builder of live models, and what they share: checks of sizes, random batches."""

from __future__ import annotations

from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import nn

from effkit.device import usual_device


class Knobs(NamedTuple):
    """How our keywords become a configuration of transformers.

    ``fields`` has the configuration's fields that each keyword sets, ``fixed`` the values of others; ``loss`` is the
    name of the loss, which transformers infers from the class name, and ours is another.
    """

    fields: dict[str, str]
    fixed: dict[str, Any]
    loss: str | None = None


def build(kind: Any, *, device: str | None, dtype: torch.dtype | None, seed: int, **sizes: Any) -> Any:
    """A model of class ``kind``, from a configuration that its :class:`Knobs` make of ``sizes``."""
    check_counts(**{name: int(size) for name, size in sizes.items() if isinstance(size, Integral)})
    if "heads" in sizes:
        check_heads(sizes["hidden"], sizes["heads"])
    if sizes.get("ffn", 0) is None:
        sizes["ffn"] = 4 * sizes["hidden"]
    torch.manual_seed(seed)
    knobs: Knobs = kind.knobs
    fields = {field: sizes[name] for name, fields in knobs.fields.items() for field in fields.split()}
    model = kind(kind.config_class(**knobs.fixed, **fields))
    if knobs.loss:
        model.loss_type = knobs.loss
    return ready(model, device, dtype)


def check_counts(**counts: int) -> None:
    """Raise ValueError, naming the first that is below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} is at least 1; given: {count}")


def check_heads(hidden: int, heads: int) -> None:
    """Raise ValueError unless attention heads of equal width make up ``hidden``."""
    if hidden % heads:
        raise ValueError(f"hidden is a multiple of heads; given: {hidden} and {heads}")


def ready(model: nn.Module, device: str | None, dtype: torch.dtype | None) -> Any:
    """The model in training mode, in ``dtype`` (float32 when None), on ``device`` (:func:`usual_device` when None)."""
    return model.to(dtype=dtype or torch.float32, device=device or usual_device()).train()


def random_tokens(vocabulary: int, batch_size: int, length: int, seed: int, device: Any) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``labels`` [B, T], the same random tokens: the models shift labels by one themselves."""
    check_counts(batch_size=batch_size, length=length)
    tokens = torch.randint(vocabulary, (batch_size, length), generator=torch.Generator().manual_seed(seed)).to(device)
    return {"input_ids": tokens, "labels": tokens.clone()}


def random_classes(shape: tuple[int, ...], classes: int, seed: int, like: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Normal inputs of ``shape`` and classes [B], on the device (and inputs in the dtype) of the parameter ``like``."""
    check_counts(batch_size=shape[0])
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(shape, generator=generator).to(like)
    return inputs, torch.randint(classes, shape[:1], generator=generator).to(like.device)
