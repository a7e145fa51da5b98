"""A language model that trains in a second: the next letter from the few before it, for experiments on data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from lessons import corpora

CONTEXT = 8
_LN2 = 0.6931471805599453


class NextLetter(nn.Module):
    """A neural n-gram model (after Bengio et al., JMLR 3, 2003): embeddings, one hidden layer, a softmax.

    Parameters
    ----------
    vocabulary
        Different tokens; letters unless said otherwise.
    context
        Tokens that it sees.
    embedding, hidden
        Widths.
    """

    def __init__(
        self, vocabulary: int = corpora.VOCABULARY, context: int = CONTEXT, embedding: int = 16, hidden: int = 128
    ) -> None:
        super().__init__()
        self.context = context
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.hidden = nn.Linear(context * embedding, hidden)
        self.output = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, context) -> logits (batch, vocabulary)."""
        return self.output(torch.relu(self.hidden(self.embedding(tokens).flatten(1))))


def draw(
    sources: Sequence[torch.Tensor], shares: Sequence[float], num: int, length: int, generator: torch.Generator
) -> torch.Tensor:
    """Pieces of several texts, each text in its share, shape (num, length).

    Raises
    ------
    ValueError
        When there are not as many shares as texts, or a text that is to be drawn from is shorter than one piece.
    """
    if len(sources) != len(shares):
        raise ValueError(f"{len(sources)} texts and {len(shares)} shares, expected one for each")
    counts = torch.bincount(
        torch.multinomial(torch.tensor(shares, dtype=torch.float64), num, replacement=True, generator=generator),
        minlength=len(sources),
    ).tolist()
    short = [len(ids) for ids, count in zip(sources, counts, strict=True) if count and len(ids) < length]
    if short:
        raise ValueError(f"a text has {short[0]} tokens, expected at least the {length} of one piece")
    pieces = []
    for ids, count in zip(sources, counts, strict=True):
        starts = torch.randint(0, max(len(ids) - length + 1, 1), (count, 1), generator=generator)
        pieces.append(ids[starts + torch.arange(length)])
    return torch.cat(pieces)


def step(model: NextLetter, optimizer: torch.optim.Optimizer, pieces: torch.Tensor) -> None:
    """One update on pieces of shape (batch, context + 1), by the loss of the last token of each."""
    loss = functional.cross_entropy(model(pieces[:, :-1]), pieces[:, -1])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def optimizer_of(model: nn.Module, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW without decay of weights, as all trainings here."""
    return torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.0, fused=True)


def train(
    model: NextLetter,
    sources: Sequence[torch.Tensor],
    shares: Sequence[float] | None = None,
    *,
    num_steps: int,
    learning_rate: float = 1e-2,
    batch_size: int = 128,
    seed: int = 0,
) -> NextLetter:
    """Train it in place on texts in their shares (equal ones, if none are given), at a constant rate; returns it."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = optimizer_of(model, learning_rate)
    shares = [1.0] * len(sources) if shares is None else shares
    for _ in range(num_steps):
        step(model, optimizer, draw(sources, shares, batch_size, model.context + 1, generator))
    return model


@torch.no_grad()
def bits(model: NextLetter, ids: torch.Tensor, num: int = 4000) -> float:
    """Bits per token that it needs for a text, at evenly spread places."""
    starts = torch.linspace(0, len(ids) - model.context - 1, num).long()
    pieces = ids[starts[:, None] + torch.arange(model.context + 1)]
    return functional.cross_entropy(model(pieces[:, :-1]), pieces[:, -1]).item() / _LN2
