"""Two models that no configuration of transformers makes as small: a residual network, and an LSTM.

As those of :mod:`effkit.models`: random weights, in training mode, ``model.random_batch(...)``, and
``model(**batch).loss`` is a scalar. Both take ``device``, ``dtype`` and ``seed``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional

from effkit import models
from effkit.models.building import check_counts, random_classes, random_tokens, ready


class Output(NamedTuple):
    """What a model of our own returns: ``loss`` (a scalar) and ``logits`` (its last axis is classes or tokens)."""

    loss: torch.Tensor
    logits: torch.Tensor


class Block(nn.Module):
    """Two 3x3 convolutions with batch normalisation around a shortcut (ResNet, arXiv 1512.03385, Figure 2).

    Where the shape changes the shortcut is a strided 1x1 convolution (option B of Section 4.1).
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(after)
        self.second = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if before != after or stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """[B, before, H, W] to [B, after, H / stride, W / stride]."""
        inner = functional.relu(self.first_norm(self.first(images)))
        return functional.relu(self.second_norm(self.second(inner)) + self.shortcut(images))


class Convolutional(nn.Module):
    """A stem, stages of residual blocks (the first of each later stage halves the side), a mean, a linear head."""

    def __init__(self, width: int, stages: int, blocks_per_stage: int, image: int, channels: int, classes: int) -> None:
        super().__init__()
        self.shape = (channels, image, image)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.ModuleList()
        before = width
        for stage in range(stages):
            for place in range(blocks_per_stage):
                after = width * 2**stage
                self.blocks.append(Block(before, after, stride=2 if stage and not place else 1))
                before = after
        self.head = nn.Linear(before, classes)

    def forward(self, pixel_values: torch.Tensor, labels: torch.Tensor) -> Output:
        """``pixel_values`` [B, channels, image, image] and ``labels`` [B] to a mean cross-entropy and logits."""
        features = self.stem(pixel_values)
        for block in self.blocks:
            features = block(features)
        logits = self.head(features.mean(dim=(2, 3)))
        return Output(functional.cross_entropy(logits, labels), logits)

    def random_batch(self, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``pixel_values`` [B, channels, image, image] and ``labels`` [B]."""
        pixels, labels = random_classes((batch_size, *self.shape), self.head.out_features, seed, self.head.weight)
        return {"pixel_values": pixels, "labels": labels}


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


def convolutional(
    *, width: int = 32, stages: int = 3, blocks_per_stage: int = 2, image: int = 32, channels: int = 3,
    classes: int = 10, device: str | None = None, dtype: torch.dtype | None = None, seed: int = 0,
) -> Convolutional:  # fmt: skip
    """A residual convolutional image classifier (ResNet, arXiv 1512.03385).

    Its first stage has ``width`` channels, and each later one twice as many on half the side; there are
    ``stages * blocks_per_stage`` residual blocks. Images have ``image`` x ``image`` pixels and ``channels``.

    >>> convolutional(image=16).random_batch(2)["pixel_values"].shape
    torch.Size([2, 3, 16, 16])
    """
    return _built(Convolutional, **locals())


def recurrent(
    *, layers: int = 2, hidden: int = 128, vocabulary: int = 1000, dropout: float = 0.0, device: str | None = None,
    dtype: torch.dtype | None = None, seed: int = 0,
) -> Recurrent:  # fmt: skip
    """An LSTM language model; embeddings are as wide as ``hidden``, and ``dropout`` is between layers.

    >>> recurrent(layers=1).random_batch(2, length=8)["input_ids"].shape
    torch.Size([2, 8])
    """
    return _built(Recurrent, **locals())


def build(name: str, **knobs: Any) -> Any:
    """The model of this name, of these two or of :mod:`effkit.models`."""
    of_lessons: dict[str, Any] = {"convolutional": convolutional, "recurrent": recurrent}
    return (of_lessons.get(name) or getattr(models, name))(**knobs)


def _built(kind: Any, *, device: str | None, dtype: torch.dtype | None, seed: int, **sizes: Any) -> Any:
    check_counts(**{name: size for name, size in sizes.items() if isinstance(size, int)})
    torch.manual_seed(seed)
    return ready(kind(**sizes), device, dtype)
