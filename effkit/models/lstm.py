"""A language model on a long short-term memory, for profiling."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from effkit.models.building import Output, random_tokens


class Recurrent(nn.Module):
    """Embedding, LSTM (torch.nn.LSTM, whose kernel is cuDNN's on a GPU), linear head. Input cells are tokens."""

    def __init__(self, layers: int, hidden: int, vocabulary: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.lstm = nn.LSTM(hidden, hidden, layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor) -> Output:
        """``input_ids`` and ``labels`` [B, T] to a mean cross-entropy of each next token and logits [B, T, V]."""
        hidden, _ = self.lstm(self.embedding(input_ids))
        logits = self.head(hidden)
        return Output(functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)

    def random_batch(self, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels`` [B, T]; ``length`` is T [tokens]."""
        return random_tokens(self.embedding.num_embeddings, batch_size, length, seed, self.head.weight.device)
