"""Angle concentration of hidden states beside the gradient that an example gives (GAIN-RL), and its sampler."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.nn import functional

from lessons import corpora


def concentration(hidden: torch.Tensor) -> torch.Tensor:
    """Mean cosine between the hidden states of different tokens of an example, in [-1, 1], shape (batch,).

    The angles of arXiv 2506.02281 within one segment: an example here has no prompt beside it.

    Parameters
    ----------
    hidden
        Shape (batch, tokens, width), at least 2 tokens.

    Raises
    ------
    ValueError
        For fewer tokens.
    """
    num = hidden.shape[1]
    if num < 2:
        raise ValueError(f"examples have {num} tokens, expected at least 2: an angle is between two")
    unit = functional.normalize(hidden, dim=-1)
    return (unit.sum(dim=1).square().sum(dim=-1) - num) / (num * (num - 1))


def language_model(text: torch.Tensor, *, num_steps: int = 150, length: int = 64, seed: int = 0) -> Any:
    """A GPT-2 of two layers and 64 numbers per letter, trained on a text for a moment (:func:`effkit.models.gpt`)."""
    from effkit import models

    model = models.gpt(
        layers=2, hidden=64, heads=4, vocabulary=corpora.VOCABULARY, max_input_cells=4 * length, device="cpu", seed=seed
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        batch = corpora.windows(text, 8, length, generator)
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    return model


def examples(model: Any, pieces: torch.Tensor) -> pd.DataFrame:
    """One row per example of shape (tokens,): what its hidden states say, and what its gradient is.

    Returns
    -------
    DataFrame
        ``concentration`` of the last layer's hidden states (one forward pass), ``loss`` [nats per token], and
        ``gradient_norm`` over all parameters.
    """
    rows = []
    for piece in pieces:
        model.zero_grad()
        made = model(input_ids=piece[None], labels=piece[None], output_hidden_states=True)
        made.loss.backward()
        rows.append({
            "concentration": concentration(made.hidden_states[-1].detach()).item(),
            "loss": made.loss.item(),
            "gradient_norm": _gradient_norm(model),
        })  # fmt: skip
    model.zero_grad()
    return pd.DataFrame(rows).rename_axis("example")


def _gradient_norm(model: Any) -> float:
    return float(torch.stack([one.grad.norm() for one in model.parameters() if one.grad is not None]).norm())


def moving_gaussian(num_items: int, mean: float, deviation: float) -> np.ndarray:
    """Chance of each place in a ranking to be sampled, a Gaussian around one place; sums to 1, shape (num_items,).

    Raises
    ------
    ValueError
        When there are no items, or the deviation is not positive.
    """
    if num_items < 1 or deviation <= 0:
        raise ValueError(f"{num_items} items and deviation {deviation}, expected both above 0")
    weight = np.exp(-0.5 * ((np.arange(num_items) - mean) / deviation) ** 2)
    return weight / weight.sum()


def curriculum(*, rank_noise: float = 0.2, seed: int = 0) -> pd.DataFrame:
    """The sampler at play with a learner that is assumed: it passes an item by how far its ability is beyond it.

    A thousand items lie evenly from easy (0) to hard (1). A learner of ability a passes item d with chance
    1 / (1 + exp(12 (d - a))); an item teaches by p (1 - p), the variance of its reward, and ability grows by 0.2 times
    the mean of that. The sampler knows the order up to noise, and its mean moves on as batches are passed, by a tanh of
    the accuracy. Both are after arXiv 2506.02281, in outline: constants and learner are ours.

    Returns
    -------
    DataFrame
        Indexed by ``epoch``: ability with ``uniform`` and ``moving Gaussian`` sampling.
    """
    num_items, num_epochs, batch_size = 1000, 40, 128
    rng = np.random.default_rng(seed)
    difficulty = np.linspace(0, 1, num_items)
    order = np.argsort(difficulty + rank_noise * rng.standard_normal(num_items))
    curves = {}
    for way in ("uniform", "moving Gaussian"):
        ability, mean, path = 0.0, 0.0, [0.0]
        for _ in range(num_epochs):
            chance = None if way == "uniform" else moving_gaussian(num_items, mean, num_items / 8)
            chosen = order[rng.choice(num_items, batch_size, p=chance)]
            passed = 1 / (1 + np.exp(12 * (difficulty[chosen] - ability)))
            ability += 0.2 * float((passed * (1 - passed)).mean())
            mean = min(num_items - 1.0, mean + num_items / 8 * max(0.0, np.tanh(2 * (passed.mean() - 0.5))))
            path.append(ability)
        curves[way] = path
    return pd.DataFrame(curves).rename_axis("epoch")
