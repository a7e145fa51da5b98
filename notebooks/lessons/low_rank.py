"""Low-rank adapters, as Omniview-Tuning fine-tunes with: few weights learn, and what that leaves of a step's memory."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn import functional


class LowRank(nn.Module):
    """A frozen linear layer and a correction of low rank beside it: W x + B A x (LoRA, arXiv 2106.09685, equation 3).

    Parameters
    ----------
    linear
        The layer, weights of shape (out, in); it stays as it is and learns no more.
    rank
        Of the correction: A has shape (rank, in) and starts at random, B (out, rank) at zero.

    Raises
    ------
    ValueError
        When the rank is not from 1 to the smaller side of the weights.
    """

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        if not 1 <= rank <= min(linear.weight.shape):
            raise ValueError(
                f"rank is {rank}, expected 1 to {min(linear.weight.shape)}, the smaller side of the weights"
            )
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in) -> (..., out)."""
        return self.linear(x) + functional.linear(functional.linear(x, self.down), self.up)


def adapted(model: nn.Module, rank: int = 4) -> nn.Module:
    """A copy of the model in which every linear layer has an adapter, and nothing but adapters learns.

    Its output is the model's own until an adapter has learned.

    Raises
    ------
    ValueError
        When there is no linear layer, or one is too small for the rank.
    """
    adapted_model = copy.deepcopy(model).requires_grad_(False)
    found = [
        (module, name, child)
        for module in list(adapted_model.modules())
        for name, child in module.named_children()
        if isinstance(child, nn.Linear)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no linear layer that an adapter could stand beside")
    for module, name, child in found:
        setattr(module, name, LowRank(child, rank))
    return adapted_model
