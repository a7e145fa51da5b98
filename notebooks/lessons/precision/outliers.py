"""Channels that stick out: the kurtosis of what a layer reads, and an optimizer that is said to keep it low."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from effkit.training import evaluating
from lessons.corpora import windows
from lessons.precision.formats import low_precision
from lessons.precision.small_language import held_out_loss, matrices


def excess_kurtosis(x: Tensor) -> Tensor:
    """E[(x - mean)^4] / variance^2 - 3 over the last dimension: 0 for a normal distribution, -2 for a coin.

    With one channel far out among n it comes close to n: a few outliers are all that is needed. Rows without any
    variance give nan.

    Raises
    ------
    ValueError
        With fewer than 4 values in a row.
    """
    if x.shape[-1] < 4:
        raise ValueError(f"rows have {x.shape[-1]} values, expected at least the 4 of a fourth moment")
    centred = x.double() - x.double().mean(-1, keepdim=True)
    variance = centred.square().mean(-1)
    return centred.pow(4).mean(-1) / variance.square() - 3


def channel_kurtosis(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """Excess kurtosis over the channels of what each linear layer of the blocks reads, mean over tokens."""
    found: dict[str, float] = {}
    handles = []
    for name, layer in matrices(model).items():

        def note(_: nn.Module, given: Any, name: str = name) -> None:
            found[name] = float(excess_kurtosis(given[0]).mean())

        handles.append(layer.register_forward_pre_hook(note))
    try:
        with evaluating(model):
            model(**batch)
    finally:
        for handle in handles:
            handle.remove()
    return found


def muon(model: nn.Module, lr: float = 3e-3) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for embedding, output layer and norms.

    Its update is orthogonalised, so that no direction of a matrix is preferred: the part of arXiv 2506.19697 that is
    tried here, with torch's Muon. The learning rate is adjusted to that of AdamW, so that one number serves both.
    """
    hidden = [layer.weight for layer in matrices(model).values()]
    known = {id(weight) for weight in hidden}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in known]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, weight_decay=0.01, fused=True),
    ]


def readings(model: nn.Module, text: Tensor) -> dict[str, float]:
    """What an optimizer left behind, on held-out letters.

    Returns
    -------
    dict
        Excess kurtosis over channels of what attention and feed-forward read (mean), and of what the last projection of
        the feed-forward reads (largest); the loss [nats]; and what 4 bits for weights and activations, one scale per
        tensor, add to it.
    """
    found = channel_kurtosis(model, {"input_ids": windows(text, 32, 32)})
    read = [value for name, value in found.items() if name.endswith(("q_proj", "up_proj"))]
    loss = held_out_loss(model, text)
    in_four_bits = held_out_loss(model, text, around=lambda: low_precision(model, "int4", ["weights", "activations"]))
    return {
        "kurtosis, block reads": sum(read) / len(read),
        "kurtosis, down reads": max(value for name, value in found.items() if name.endswith("down_proj")),
        "loss": loss,
        "4 bits add": in_four_bits - loss,
    }
