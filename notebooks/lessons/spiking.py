"""A spiking network of leaky integrate-and-fire neurons, learning through time or through space only."""

from __future__ import annotations

import random
from collections.abc import Collection
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from effkit.models.building import check_counts, random_classes, ready
from lessons.small_models import Output

THRESHOLD = 1.0


class _Spike(torch.autograd.Function):
    """1 where the potential reaches the threshold; its derivative is a triangle, max(0, 1 - |u - V|)."""

    @staticmethod
    def forward(ctx: Any, potential: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(potential)
        return (potential >= THRESHOLD).to(potential.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        (potential,) = ctx.saved_tensors
        return upstream * (1 - (potential - THRESHOLD).abs()).clamp_min(0)


class _ThroughSpace(torch.autograd.Function):
    """The whole forward of SLTT. Each time step's graph is differentiated and freed before the next step begins.

    What is kept for backward are gradients, of the size of the parameters, however many time steps there are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: Spiking,
        inputs: torch.Tensor,
        labels: torch.Tensor,
        chosen: Collection[int],
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        gradients: list[torch.Tensor] = []
        total: Any = 0.0
        mean: Any = 0.0
        state = model.at_rest()
        for step in range(model.steps):
            with torch.set_grad_enabled(step in chosen):
                logits, state = model.advance(inputs, state)
                loss = functional.cross_entropy(logits, labels) / model.steps
            if step in chosen:
                found = torch.autograd.grad(loss, parameters)
                gradients = [a.add_(b) for a, b in zip(gradients, found, strict=True)] if gradients else list(found)
                del found  # else it would live through the next time step's backward
            state = [before.detach() for before in state]
            total, mean = total + loss.detach(), mean + logits.detach() / model.steps
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(mean)
        return total, mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, None, None, *(upstream * gradient for gradient in ctx.saved_tensors))


class Spiking(nn.Module):
    """Layers of leaky integrate-and-fire neurons, whose last spikes a linear head reads at every time step.

    At each time step t, with spikes s and potentials u of a layer (arXiv 2302.14311, Section 3.1; V is 1)::

        u[t+1] = leak * (u[t] - V * s[t]) + W @ s_below[t+1] + b,    s[t+1] = 1 if u[t+1] >= V else 0

    The loss is the mean over time steps of the cross-entropy of the head, as in the paper.
    """

    def __init__(
        self,
        features: int,
        layers: int,
        hidden: int,
        classes: int,
        steps: int,
        leak: float,
        learning: str,
        backward_steps: int | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.steps, self.leak, self.learning = steps, leak, learning
        self.backward_steps = backward_steps or steps
        self.features = features
        self.layers = nn.ModuleList()
        for below, here in pairwise([features] + [hidden] * layers):
            layer = nn.Linear(below, here)
            # potentials of deviation 1 from normal inputs, and from spikes of which a sixth are 1: no layer is silent
            nn.init.normal_(layer.weight, std=(2.5 if self.layers else 1.0) / below**0.5)
            self.layers.append(layer)
        self.head = nn.Linear(hidden, classes)
        # not torch's generator: the choice has to be a plain number where tensors are fake
        self._chance = random.Random(seed)

    def at_rest(self) -> list[Any]:
        """The state of each layer before the first time step: what is left of its potentials after spiking."""
        return [0.0] * len(self.layers)

    def advance(self, inputs: torch.Tensor, state: list[Any]) -> tuple[torch.Tensor, list[Any]]:
        """One time step: ``inputs`` [B, features] and a state to logits [B, classes] and the next state."""
        spikes, after = inputs, []
        for layer, before in zip(self.layers, state, strict=True):
            potential = self.leak * before + layer(spikes)
            spikes = _Spike.apply(potential)
            after.append(potential - THRESHOLD * spikes)
        return self.head(spikes), after

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> Output:
        """``inputs`` [B, features], the same at each time step, and ``labels`` [B] to a loss and mean logits.

        Under ``"sltt"`` only ``.loss`` can be differentiated, by parameters that require gradients.
        """
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.learning == "sltt" and learning and torch.is_grad_enabled():
            chosen = self._chance.sample(range(self.steps), self.backward_steps)
            return Output(*_ThroughSpace.apply(self, inputs, labels, chosen, *learning))
        state, losses, logits = self.at_rest(), [], []
        for _ in range(self.steps):
            here, state = self.advance(inputs, state)
            logits.append(here)
            losses.append(functional.cross_entropy(here, labels))
        return Output(torch.stack(losses).mean(), torch.stack(logits).mean(dim=0))

    def random_batch(self, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``inputs`` [B, features] and ``labels`` [B]."""
        inputs, labels = random_classes((batch_size, self.features), self.head.out_features, seed, self.head.weight)
        return {"inputs": inputs, "labels": labels}


def build(
    *,
    features: int = 256,
    layers: int = 3,
    hidden: int = 256,
    classes: int = 10,
    steps: int = 6,
    leak: float = 0.5,
    learning: Literal["bptt", "sltt"] = "sltt",
    backward_steps: int | None = None,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Spiking:
    """A spiking classifier, in training mode, on the GPU where there is one.

    Parameters
    ----------
    features, layers, hidden, classes
        Its size; ``layers`` spiking layers of ``hidden`` neurons.
    steps
        Time steps T.
    leak
        Part of a potential that is left after one time step, from 0 to 1.
    learning
        ``"bptt"`` backpropagates through time: memory grows with T. ``"sltt"`` (arXiv 2302.14311, Section 4.2) does not
        follow gradients from one time step into an earlier one: its gradient is an approximation, its memory does not
        grow with T. Each time step is differentiated inside the forward, so backward does almost nothing.
    backward_steps
        K, for SLTT-K (Section 4.3): at each forward, K of the T time steps, drawn by ``seed``, are differentiated; all
        unless given. As in the authors' train_SLTTK.py the rest is left out and the sum is not scaled by T / K; unlike
        there, ``.loss`` is of all time steps.
    """
    check_counts(features=features, layers=layers, hidden=hidden, classes=classes, steps=steps)
    if learning not in ("bptt", "sltt"):
        raise ValueError(f'learning is "bptt" or "sltt"; given: {learning!r}')
    if not 0 <= leak <= 1:
        raise ValueError(f"leak is from 0 to 1; given: {leak}")
    if backward_steps is not None and learning == "bptt":
        raise ValueError('backward_steps belongs to learning="sltt"; leave it out or learn with "sltt"')
    if backward_steps is not None and not 1 <= backward_steps <= steps:
        raise ValueError(f"backward_steps is from 1 to steps ({steps}); given: {backward_steps}")
    torch.manual_seed(seed)
    model = Spiking(features, layers, hidden, classes, steps, leak, learning, backward_steps, seed)
    return ready(model, device, dtype)
