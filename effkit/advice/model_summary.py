"""Which parts a model has: attention, experts, recurrent layers, encoder and decoder."""

from __future__ import annotations

from typing import Any

import torch

_KINDS = (
    ("attention", ("attention", "attn")),
    ("mixture of experts", ("expertparallel", "sparsemoeblock", "moe")),
    ("recurrent", ("lstm", "gru", "rnn", "mamba", "recurrent")),
    ("convolution", ("conv1d", "conv2d", "conv3d")),
)


def described(model: torch.nn.Module) -> str:
    """The model's class and its parts, in words."""
    return f"{type(model).__name__}: " + ", ".join(f"{num} {what}" for what, num in parts_of(model).items())


def parts_of(model: torch.nn.Module) -> dict[str, int]:
    """What there is, and how often: the outermost modules whose class name says so.

    >>> parts_of(torch.nn.Sequential(torch.nn.LSTM(2, 2), torch.nn.MultiheadAttention(2, 1)))
    {'attention': 1, 'recurrent': 1}
    """
    counts: dict[str, int] = {}
    for kind, words in _KINDS:
        inside: list[str] = []
        for path, module in model.named_modules():
            name = type(module).__name__.lower()
            if any(path.startswith(outer + ".") for outer in inside) or module is model:
                continue
            # transformers' GPT-2 calls its linear layers Conv1D
            if any(word in name for word in words) and type(module).__module__ != "transformers.pytorch_utils":
                inside.append(path)
        if inside:
            counts[kind] = len(inside)
    config: Any = getattr(model, "config", None)
    for name in ("encoder_layers", "decoder_layers"):
        if isinstance(num := getattr(config, name, None), int) and getattr(config, "is_encoder_decoder", False):
            counts[name.replace("_", " ")] = num
    return counts
