"""A language model of letters that is trained in two seconds: what claims about formats and masks start from."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from effkit import models
from effkit.training import evaluating
from lessons import corpora
from lessons.meter import reproducible

WARM_UP_STEPS = 10
_BATCH, _LENGTH = 16, 32  # pieces per step, and letters of a piece


def untrained(seed: int = 0, *, layers: int = 2, hidden: int = 64, ffn: int = 128, heads: int = 4) -> nn.Module:
    """A Llama-like model over 128 letters, on the CPU; 99 thousand parameters unless its size is given.

    The matrices of its blocks begin with variance 1 / inputs, and the embedding with deviation 0.5: Llama's own 0.02
    is meant for thousands of channels, and at 64 of them every optimizer is slow to begin.
    """
    model = models.text(
        layers=layers, hidden=hidden, ffn=ffn, heads=heads, vocabulary=corpora.VOCABULARY, device="cpu", seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for layer in matrices(model).values():
        nn.init.normal_(layer.weight, std=layer.in_features**-0.5, generator=generator)
    embedding = model.get_input_embeddings().weight
    assert isinstance(embedding, torch.Tensor)
    nn.init.normal_(embedding, std=0.5, generator=generator)
    return model


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the blocks by name: not the embedding, and not the output layer."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.endswith("lm_head")
    }


def step_flops(text: torch.Tensor, make: Callable[[nn.Module], Sequence[torch.optim.Optimizer]]) -> int:
    """FLOPs of the products of one training step as torch counts them, those of the optimizer included."""
    model = untrained()
    with FlopCounterMode(display=False) as counter:
        train(model, text, 1, make(model))
    return int(counter.get_total_flops())


def adamw(model: nn.Module, lr: float = 3e-3) -> list[torch.optim.Optimizer]:
    """AdamW with its usual moments for every parameter."""
    return [torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)]


def train(
    model: nn.Module,
    text: torch.Tensor,
    num_steps: int,
    updates: Sequence[torch.optim.Optimizer],
    *,
    seed: int = 0,
    before_update: Callable[[int], None] | None = None,
    after_update: Callable[[int], None] | None = None,
) -> int:
    """Train in place on 16 pieces of 32 letters a step; the learning rate warms up, then falls linearly to a tenth.

    Parameters
    ----------
    text
        Letters as numbers, shape (letters,).
    updates
        Optimizers that share the parameters among them, at their highest learning rate.
    seed
        Decides which pieces are read: two trainings of one seed read the same ones.
    before_update, after_update
        Called with the number of the step before and after the optimizers move: for masks and decays.

    Returns
    -------
    int
        Median time of a step [ns].

    Raises
    ------
    ValueError
        When no step is asked for.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}, expected at least 1")
    generator = reproducible(seed)
    highest = [[group["lr"] for group in update.param_groups] for update in updates]
    times = []
    model.train()
    for step in range(num_steps):
        begin = time.perf_counter_ns()
        share = min((step + 1) / WARM_UP_STEPS, 1 - 0.9 * step / num_steps)
        for update, rates in zip(updates, highest, strict=True):
            for group, rate in zip(update.param_groups, rates, strict=True):
                group["lr"] = rate * share
        piece = corpora.windows(text, _BATCH, _LENGTH, generator)
        model.zero_grad()
        model(input_ids=piece, labels=piece).loss.backward()
        if before_update is not None:
            before_update(step)
        for update in updates:
            update.step()
        if after_update is not None:
            after_update(step)
        times.append(time.perf_counter_ns() - begin)
    return round(statistics.median(times))


def held_out_loss(
    model: nn.Module, text: torch.Tensor, *, around: Callable[[], AbstractContextManager[object]] = nullcontext
) -> float:
    """Mean loss per letter [nats] over 96 pieces that are spread evenly over a text, within a context."""
    piece = corpora.windows(text, 96, _LENGTH)
    with evaluating(model), around():
        return float(model(input_ids=piece, labels=piece).loss)
