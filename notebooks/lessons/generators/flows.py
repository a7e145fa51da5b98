"""A small flow-matching model on small synthetic pictures, and its training as the meter drives it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import torch
from torch import nn
from torch.nn import functional as F

from lessons.meter import reproducible

SIDE = 8  # pixels of a picture's edge
NUM_TIMES = 16  # numbers that the time is given in


@cache
def pictures() -> torch.Tensor:
    """Small pictures of one shape each, shape (4096, 64): a disc, ring, cross or bar, anywhere, of any size.

    Pixels are scaled to mean 0 and variance 1 over the whole set, held-out pictures included, as large as the noise.
    """
    num, generator = 4096, torch.Generator().manual_seed(0)
    kind = torch.randint(0, 4, (num, 1, 1), generator=generator)
    row, column = (torch.rand(2, num, 1, 1, generator=generator) * 4 + 1.5).unbind()
    size = torch.rand(num, 1, 1, generator=generator) * 1.2 + 1.2
    brightness = torch.rand(num, 1, 1, generator=generator) * 0.5 + 0.5
    down = torch.arange(SIDE).view(1, SIDE, 1) - row
    right = torch.arange(SIDE).view(1, 1, SIDE) - column
    away = (down**2 + right**2).sqrt()
    near, far = torch.minimum(down.abs(), right.abs()), torch.maximum(down.abs(), right.abs())
    edges = torch.stack(
        [
            size - away,  # a disc
            0.6 - (away - size).abs(),  # a ring
            torch.minimum(0.6 - near, size - far),  # a cross
            torch.minimum(0.6 - down.abs(), size - right.abs()),  # a bar
        ]
    )
    shapes = torch.sigmoid(4 * edges).gather(0, kind.expand(num, SIDE, SIDE)[None])[0]
    flat = (shapes * brightness).flatten(1)
    return (flat - flat.mean()) / flat.std()


def noised(clean: torch.Tensor, noise: torch.Tensor, time: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The straight path from noise (time 0) to data (time 1), and its velocity.

    ``x_t = (1 - t) noise + t clean``, ``velocity = clean - noise`` (Lipman et al., Flow Matching, arXiv 2210.02747).

    Parameters
    ----------
    clean, noise
        Shape (batch, dimensions).
    time
        Shape (batch,), in [0, 1].
    """
    return noise + time[:, None] * (clean - noise), clean - noise


class FlowModel(nn.Module):
    """A residual network that predicts the velocity of a point on its way from noise to data.

    Parameters
    ----------
    dimensions
        Of a point: 64 for the pictures.
    hidden
        Width of a block.
    num_blocks
        How many. The first ``num_blocks // 2`` are what the papers call the early layers.
    """

    frequencies: torch.Tensor

    def __init__(self, dimensions: int = SIDE * SIDE, hidden: int = 64, num_blocks: int = 4) -> None:
        super().__init__()
        self.reads = nn.Linear(dimensions + NUM_TIMES, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, hidden))
            for _ in range(num_blocks)
        )
        self.writes = nn.Linear(hidden, dimensions)
        self.num_early = max(1, num_blocks // 2)
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(NUM_TIMES // 2).div(2))

    def early(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """What the early layers make of a noised point, shape (batch, hidden)."""
        angles = time[:, None] * self.frequencies
        hidden = self.reads(torch.cat([x, angles.sin(), angles.cos()], dim=1))
        for block in self.blocks[: self.num_early]:
            hidden = hidden + block(hidden)
        return hidden

    def late(self, hidden: torch.Tensor) -> torch.Tensor:
        """The velocity, shape (batch, dimensions), from what the early layers made."""
        for block in self.blocks[self.num_early :]:
            hidden = hidden + block(hidden)
        return self.writes(hidden)

    def forward(self, x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        """The velocity at a point x, shape (batch, dimensions), and a time, shape (batch,)."""
        return self.late(self.early(x, time))


class FlowTraining:
    """Flow matching from scratch: what ``meter.to_target`` drives.

    Parameters
    ----------
    seed
        Of the weights, the batches and the noise.
    rate
        Learning rate of AdamW.
    batch_size
        Pictures a step.
    data
        Shape (num, dimensions); the last 512 are held out. The pictures by default.
    model
        Another network to train.
    """

    phase = "flow"

    def __init__(
        self,
        seed: int,
        *,
        rate: float = 8e-3,
        batch_size: int = 64,
        data: torch.Tensor | None = None,
        model: Callable[[], FlowModel] = FlowModel,
    ) -> None:
        self.generator = reproducible(seed)
        data = pictures() if data is None else data
        self.train, self.held_out = data[:-512], data[-512:]
        self.model = model()
        self.num_tokens = batch_size  # a picture is one token here
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, fused=True)
        fixed = torch.Generator().manual_seed(12345)  # the same noise whenever the loss is looked at
        self.times = (torch.arange(512) + 0.5) / 512
        self._noise = torch.randn(self.held_out.shape, generator=fixed)

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clean pictures, noise and times of the next step."""
        chosen = torch.randint(0, len(self.train), (self.num_tokens,), generator=self.generator)
        clean = self.train[chosen]
        noise = torch.randn(clean.shape, generator=self.generator)
        return clean, noise, torch.rand(self.num_tokens, generator=self.generator)

    def objective(self) -> torch.Tensor:
        """What the next step minimises."""
        clean, noise, time = self.batch()
        x, velocity = noised(clean, noise, time)
        return F.mse_loss(self.model(x, time), velocity)

    def step(self) -> None:
        """One step of AdamW."""
        self.optimizer.zero_grad()
        self.objective().backward()
        self.optimizer.step()

    def loss(self) -> float:
        """Mean squared error of the velocity on held-out pictures, at times spread evenly from noise to data."""
        return float(self.losses().mean())

    @torch.no_grad()
    def losses(self) -> torch.Tensor:
        """The same, picture by picture, shape (512,), each at its own one of ``times``."""
        x, velocity = noised(self.held_out, self._noise, self.times)
        return ((self.model(x, self.times) - velocity) ** 2).mean(1)
