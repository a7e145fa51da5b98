"""A supernet: one set of weights for networks of several widths; shared as they are, or mixed for each width (MoS)."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import nn
from torch.nn import functional as F

from lessons.meter import reproducible

WIDTHS = (4, 8, 16, 32)
NUM_INPUTS, NUM_CLASSES = 16, 8


def task(num: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Points, shape (num, 16), and the class, of 8, that a fixed random network gives them."""
    fixed = torch.Generator().manual_seed(77)
    first = torch.randn(NUM_INPUTS, 24, generator=fixed) / NUM_INPUTS**0.5
    second = torch.randn(24, NUM_CLASSES, generator=fixed)
    x = torch.randn(num, NUM_INPUTS, generator=generator)
    return x, (torch.relu(x @ first - 0.3) @ second).argmax(1)


class MixedLinear(nn.Module):
    """A linear layer of which a subnetwork uses the upper left corner, from experts mixed for that subnetwork.

    ``weight(a) = sum_e router(a)_e weight_e``, with the router a softmax of a small network of the architecture, one
    number per expert and output neuron: the neuron-wise form of Mixture-of-Supernets (Jawahar et al., arXiv
    2306.04845). One expert is the plain weight-sharing supernet.
    Experts begin wider by the root of their number, so that an even mixture begins as wide as the plain layer does.
    """

    def __init__(self, num_in: int, num_out: int, num_experts: int) -> None:
        super().__init__()
        bound = (num_experts / num_in) ** 0.5
        self.weight = nn.Parameter(torch.empty(num_experts, num_out, num_in).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_experts, num_out).uniform_(-bound, bound))
        self.router = (
            nn.Sequential(nn.Linear(len(WIDTHS), 16), nn.ReLU(), nn.Linear(16, num_experts * num_out))
            if num_experts > 1
            else None
        )

    def corner(self, architecture: torch.Tensor, num_in: int, num_out: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight, shape (num_out, num_in), and bias, shape (num_out,), of a subnetwork; its architecture is one-hot."""
        weight, bias = self.weight[:, :num_out, :num_in], self.bias[:, :num_out]
        if self.router is None:
            return weight[0], bias[0]
        mixture = self.router(architecture).view(self.bias.shape).softmax(0)[:, :num_out]
        return (mixture[:, :, None] * weight).sum(0), (mixture * bias).sum(0)


class Supernet(nn.Module):
    """A classifier with two hidden layers whose width is chosen anew at every call.

    Parameters
    ----------
    num_experts
        1: weights are shared. 2 and more: mixed by the architecture.

    Raises
    ------
    ValueError
        For fewer than 1 expert.
    """

    def __init__(self, num_experts: int = 1) -> None:
        super().__init__()
        if num_experts < 1:
            raise ValueError(f"num_experts is {num_experts}, expected at least 1")
        most = WIDTHS[-1]
        sizes = ((NUM_INPUTS, most), (most, most), (most, NUM_CLASSES))
        self.layers = nn.ModuleList(MixedLinear(*size, num_experts) for size in sizes)

    def forward(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """Logits, shape (batch, 8), of the subnetwork of this width."""
        if width not in WIDTHS:
            raise ValueError(f"width is {width}, expected one of {', '.join(map(str, WIDTHS))}")
        architecture = torch.eye(len(WIDTHS))[WIDTHS.index(width)]
        sizes = ((NUM_INPUTS, width), (width, width), (width, NUM_CLASSES))
        for layer, (num_in, num_out) in zip(self.layers, sizes, strict=True):
            assert isinstance(layer, MixedLinear)
            weight, bias = layer.corner(architecture, num_in, num_out)
            x = F.linear(x, weight, bias)
            if layer is not self.layers[-1]:
                x = F.relu(x)
        return x


def trained(
    seed: int, widths: Sequence[int] = WIDTHS, *, num_experts: int = 1, steps: int = 400, rate: float = 4e-2
) -> pd.Series[float]:
    """Train on widths drawn at random, one a step; the held-out loss of each of them.

    With a single width this is training from scratch: the same network, batches and number of steps.
    """
    generator = reproducible(seed)
    model = Supernet(num_experts)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        x, y = task(128, generator)
        width = widths[int(torch.randint(0, len(widths), (), generator=generator))]
        optimizer.zero_grad()
        F.cross_entropy(model(x, width), y).backward()
        optimizer.step()
        schedule.step()
    x, y = task(4096, torch.Generator().manual_seed(999))
    with torch.no_grad():
        return pd.Series({width: float(F.cross_entropy(model(x, width), y)) for width in widths}, name=seed)


def gaps(*, seeds: Sequence[int] = (0, 1, 2)) -> pd.DataFrame:
    """How much worse a subnetwork is than the same network trained alone for as many steps.

    Returns
    -------
    DataFrame
        Indexed by ``seed`` and ``width``: held-out loss ``alone``, ``shared`` (one set of weights), ``mixed`` (two).
    """
    rows = {}
    for seed in seeds:
        shared = trained(seed)
        mixed = trained(seed, num_experts=2)
        for width in WIDTHS:
            alone = trained(seed, (width,))
            rows[seed, width] = {"alone": alone[width], "shared": shared[width], "mixed": mixed[width]}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(rows), names=["seed", "width"])
    return frame
