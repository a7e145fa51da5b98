"""Two ways to lend a generator the features of a pretrained encoder: align with them, or start from them."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from lessons.generators.flows import FlowTraining, noised, pictures

NUM_FEATURES = 32


class PictureEncoder(nn.Module):
    """An encoder pretrained without labels: from a random half of the pixels it has to draw the whole picture."""

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(dimensions, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, NUM_FEATURES)
        )
        self.draws = nn.Sequential(nn.GELU(), nn.Linear(NUM_FEATURES, 96), nn.GELU(), nn.Linear(96, dimensions))

    def objective(self, clean: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Mean squared error of the drawing, for pictures of shape (batch, dimensions)."""
        seen = torch.rand(clean.shape, generator=generator) < 0.5
        drawn: torch.Tensor = self.draws(self.features(clean * seen))
        return F.mse_loss(drawn, clean)


class AlignedTraining(FlowTraining):
    """Flow matching whose early layers are also pulled towards an encoder's features of the *clean* picture (REPA).

    The loss is ``flow + weight * (1 - cosine(head(early), encoder))``: Yu et al., arXiv 2410.06940. The
    encoder comes from nowhere here, so its training is the first phase, and its forward pass is part of every step.

    Parameters
    ----------
    seed
        Of everything.
    weight
        Of the alignment; the paper's is 0.5.
    encoder_steps
        How long the encoder is trained first.
    warm_up_steps
        After that, how long the early layers alone learn to give the features, before anything is generated; then the
        weight of the alignment falls to 0 over ``decay_steps`` (after ERW: Liu et al., arXiv 2504.10188; the straight
        fall is ours). 0: plain REPA.
    rate
        Learning rate of AdamW, in all phases.
    """

    def __init__(
        self,
        seed: int,
        *,
        weight: float = 0.5,
        encoder_steps: int = 150,
        warm_up_steps: int = 0,
        decay_steps: int = 200,
        rate: float = 8e-3,
    ) -> None:
        super().__init__(seed, rate=rate)
        dimensions = pictures().shape[1]
        self.encoder = PictureEncoder(dimensions)
        hidden = self.model.writes.in_features
        self.head = nn.Sequential(nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, NUM_FEATURES))
        self.weight, self.encoder_steps, self.warm_up_steps = weight, encoder_steps, warm_up_steps
        self.decay_steps = decay_steps
        self.num_steps = 0
        early = [self.model.reads, *self.model.blocks[: self.model.num_early], self.head]
        self._optimizers = {
            "encoder": torch.optim.AdamW(self.encoder.parameters(), lr=rate, fused=True),
            "warm-up": torch.optim.AdamW([one for module in early for one in module.parameters()], lr=rate, fused=True),
            "flow, aligned": torch.optim.AdamW(
                [*self.model.parameters(), *self.head.parameters()], lr=rate, fused=True
            ),
        }

    @property
    def phase(self) -> str:  # type: ignore[override]
        """``encoder``, then ``warm-up`` where there is one, then ``flow, aligned``."""
        if self.num_steps < self.encoder_steps:
            return "encoder"
        return "warm-up" if self.num_steps < self.encoder_steps + self.warm_up_steps else "flow, aligned"

    @property
    def weight_now(self) -> float:
        """Of the alignment in the next step: constant, or falling linearly after a warm-up."""
        done = self.num_steps - self.encoder_steps - self.warm_up_steps
        return self.weight * max(0.0, 1 - done / self.decay_steps) if self.warm_up_steps else self.weight

    def misalignment(self, early: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        """1 - cosine between the head's reading of the early layers and the frozen features, mean over a batch."""
        with torch.no_grad():
            features = self.encoder.features(clean)
        return 1 - F.cosine_similarity(self.head(early), features, dim=1).mean()

    def objective(self) -> torch.Tensor:
        """What the next step minimises, by phase."""
        clean, noise, time = self.batch()
        if self.phase == "encoder":
            return self.encoder.objective(clean, self.generator)
        x, velocity = noised(clean, noise, time)
        early = self.model.early(x, time)
        if self.phase == "warm-up":
            return self.misalignment(early, clean)
        flow = F.mse_loss(self.model.late(early), velocity)
        # A weight that has fallen to 0 still costs its forward passes: steps of one phase cost the same.
        return flow + self.weight_now * self.misalignment(early, clean)

    def step(self) -> None:
        """One step of the phase's own AdamW."""
        self.optimizer = self._optimizers[self.phase]
        super().step()
        self.num_steps += 1
