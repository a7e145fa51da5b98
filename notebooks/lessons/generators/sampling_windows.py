"""Rewarding a flow model (GRPO): noise and gradients in a window of W of the T sampling steps, none outside it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from functools import cache, partial

import pandas as pd
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lessons.generators.flows import FlowModel, FlowTraining
from lessons.meter import reproducible
from lessons.saved_for_backward import saved_bytes

NOISE = 0.7  # eta of the published settings
NUM_GROUPS, GROUP_SIZE = 6, 12  # rollouts of an iteration


def ring() -> torch.Tensor:
    """Points in a plane, shape (2048, 2): eight spots of deviation 0.1 evenly on a circle of radius 2."""
    generator = torch.Generator().manual_seed(0)
    angle = torch.randint(0, 8, (2048,), generator=generator) * (2 * math.pi / 8)
    centre = 2 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return centre + 0.1 * torch.randn(2048, 2, generator=generator)


def to_the_right(points: torch.Tensor) -> torch.Tensor:
    """A reward, shape (num,): the first coordinate, less what lies off the circle. The spot at (2, 0) is the best."""
    return points[:, 0] - 2 * (points.norm(dim=1) - 2).abs()


def plane_model() -> FlowModel:
    """An untrained flow model for points in a plane."""
    return FlowModel(2, 64, 4)


@cache
def _pretrained() -> FlowModel:
    training = FlowTraining(0, rate=4e-3, batch_size=128, data=ring(), model=plane_model)
    for _ in range(300):
        training.step()
    return training.model


def pretrained() -> FlowModel:
    """A flow model that draws the ring after 300 steps of training; a new copy each time."""
    return copy.deepcopy(_pretrained())


class WindowedTraining:
    """One model, rewarded: rollouts of all T steps, then a gradient through each step of the window.

    Outside the window a step follows the ordinary differential equation; inside, the stochastic one with the same
    marginals, ``dx = [v - s^2/2 (x - t v)/(1 - t)] dt + s dw``, whose ``s^2 = eta^2 (1 - t)``. A step inside has a
    likelihood, and the loss is GRPO's with one update per rollout: ``-advantage * ratio``, averaged over the window
    (MixGRPO: Li et al., arXiv 2507.21802). The window of W slides on by one step an iteration here, and begins anew at
    the end; in the published script it stays for 25 iterations.

    DanceGRPO as the same script runs it trains 0.6 of 25 steps but the last: W = 14. Its cost is that of such a window.
    What it learns need not be: there, as far as we know, steps are drawn at random and all of a rollout are noisy.

    Parameters
    ----------
    model
        Pretrained; changed in place.
    window
        W, from 1 to ``num_steps``.
    num_steps
        T.
    seed
        Of the noise.
    rate
        Learning rate of AdamW.
    recompute
        Gradient checkpointing, as the published scripts have it: a forward pass more for every trained step.

    Raises
    ------
    ValueError
        When the window is empty or longer than the sampling.
    """

    def __init__(
        self,
        model: FlowModel,
        window: int,
        *,
        num_steps: int = 25,
        seed: int = 0,
        rate: float = 1e-3,
        recompute: bool = True,
    ) -> None:
        if not 1 <= window <= num_steps:
            raise ValueError(f"the window is {window} of {num_steps} sampling steps, expected 1 to {num_steps}")
        self.generator = reproducible(seed)
        self.model, self.window, self.num_steps = model, window, num_steps
        self.recompute = recompute
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=rate, fused=True)
        self.iteration = 0

    @property
    def first(self) -> int:
        """The first step of the window now."""
        return self.iteration % (self.num_steps - self.window + 1)

    def mean_and_deviation(self, x: torch.Tensor, step: int) -> tuple[torch.Tensor, float]:
        """Of the next point after a stochastic step from x, shape (num, 2)."""
        dt = 1 / self.num_steps
        time = step * dt
        velocity = self.model(x, torch.full((len(x),), time))
        drift = velocity - NOISE**2 / 2 * (x - time * velocity)
        return x + drift * dt, NOISE * math.sqrt((1 - time) * dt)

    @torch.no_grad()
    def rollout(self) -> tuple[torch.Tensor, list[tuple[int, torch.Tensor, torch.Tensor]]]:
        """Samples, shape (72, 2), a dozen from one noise, and (step, before, after) of every step in the window."""
        x = torch.randn(NUM_GROUPS, 2, generator=self.generator).repeat_interleave(GROUP_SIZE, 0)
        kept = []
        for step in range(self.num_steps):
            if self.first <= step < self.first + self.window:
                mean, deviation = self.mean_and_deviation(x, step)
                after = mean + deviation * torch.randn(x.shape, generator=self.generator)
                kept.append((step, x, after))
                x = after
            else:
                x = x + self.model(x, torch.full((len(x),), step / self.num_steps)) / self.num_steps
        return x, kept

    def log_likelihood(self, step: int, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
        """Of a step of the window, shape (num,), up to a constant; with a gradient."""

        def mean(x: torch.Tensor) -> torch.Tensor:
            return self.mean_and_deviation(x, step)[0]

        expected = checkpoint(mean, before, use_reentrant=False) if self.recompute else mean(before)
        deviation = NOISE * math.sqrt((1 - step / self.num_steps) / self.num_steps)
        return -((after - expected) ** 2).sum(1) / (2 * deviation**2)

    def objective(self, samples: torch.Tensor, kept: list[tuple[int, torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        """GRPO's loss over the steps of the window; advantages are relative to those from the same noise."""
        rewards = to_the_right(samples).view(NUM_GROUPS, GROUP_SIZE)
        spread = rewards.std(1, keepdim=True) + 1e-4
        advantage = ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()
        total = torch.zeros(())
        for one in kept:
            likelihood = self.log_likelihood(*one)
            total = total - (advantage * (likelihood - likelihood.detach()).exp()).mean()
        return total / len(kept)

    def update(self, samples: torch.Tensor, kept: list[tuple[int, torch.Tensor, torch.Tensor]]) -> None:
        """Rewards of a rollout and one step of AdamW; then the window slides on."""
        self.optimizer.zero_grad()
        self.objective(samples, kept).backward()
        self.optimizer.step()
        self.iteration += 1

    def step(self) -> None:
        """One iteration: rollouts, rewards, one update."""
        self.update(*self.rollout())

    @torch.no_grad()
    def mean_reward(self) -> float:
        """Of 256 samples of the ordinary differential equation, always from the same noise."""
        x = torch.randn(256, 2, generator=torch.Generator().manual_seed(1))
        for step in range(self.num_steps):
            x = x + self.model(x, torch.full((len(x),), step / self.num_steps)) / self.num_steps
        return float(to_the_right(x).mean())


def iteration_flops(num_steps: int, num_trained: int) -> int:
    """FLOPs of one iteration, in forward passes of the whole batch.

    A rollout is ``num_steps`` of them; a trained step is a forward and a backward pass (3), and one more since the
    forward is run again for the backward (gradient checkpointing).
    """
    return num_steps + 4 * num_trained


def windows(sizes: tuple[int, ...] = (1, 4, 14, 25), *, num_steps: int = 25) -> pd.DataFrame:
    """What an iteration costs, counted, by the size of the window.

    Returns
    -------
    DataFrame
        Indexed by ``window``: ``flops`` of one iteration as torch counts them, ``predicted`` (``iteration_flops`` times
        the FLOPs of a forward pass), ``saved_bytes`` kept for one backward pass through the whole window without
        recomputation, and ``saved_bytes_recomputed`` with it.
    """
    rows = {}
    for size in sizes:
        training = WindowedTraining(plane_model(), size, num_steps=num_steps)
        batch = torch.zeros(NUM_GROUPS * GROUP_SIZE, 2)
        with torch.no_grad(), FlopCounterMode(display=False) as forward:
            training.model(batch, torch.zeros(len(batch)))
        with FlopCounterMode(display=False) as counter:
            training.step()
        samples, kept = training.rollout()
        rows[size] = {
            "flops": counter.get_total_flops(),
            "predicted": round(iteration_flops(num_steps, size) * forward.get_total_flops()),
        }
        for name, recompute in (("saved_bytes", False), ("saved_bytes_recomputed", True)):
            training.recompute = recompute
            known = [*training.model.parameters(), *training.model.buffers()]
            rows[size][name] = saved_bytes(partial(training.objective, samples, kept), known)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("window")


def rewarded(window: int, *, iterations: int, seeds: Sequence[int] = (0, 1, 2)) -> pd.Series[float]:
    """Mean reward after so many iterations from the same pretrained model: one number per seed."""
    found = {}
    for seed in seeds:
        training = WindowedTraining(pretrained(), window, seed=seed)
        for _ in range(iterations):
            training.step()
        found[seed] = training.mean_reward()
    return pd.Series(found, name=f"window {window}").rename_axis("seed")
