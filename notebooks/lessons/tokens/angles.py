"""Angle concentration of hidden states beside the gradient that an example gives (GAIN-RL)."""

from __future__ import annotations

from typing import Any

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
