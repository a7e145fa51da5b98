"""A linear classifier that is trained from zero, so that nothing in it is random."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def fitted(
    x: torch.Tensor, y: torch.Tensor, num_classes: int, *, num_steps: int, learning_rate: float, decay: float,
    loss: Loss = functional.cross_entropy,
) -> nn.Linear:  # fmt: skip
    """Train it by Adam on all examples at once.

    Parameters
    ----------
    x, y
        Features, shape (examples, features), and classes, shape (examples,).
    decay
        Adam's own: added to the gradient, not decoupled.
    loss
        Of scores (examples, classes) and classes.
    """
    model = nn.utils.skip_init(nn.Linear, x.shape[1], num_classes)  # draws nothing from torch's generator
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, weight_decay=decay)
    for _ in range(num_steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model
