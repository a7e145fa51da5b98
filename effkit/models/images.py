"""Image classifiers for profiling: a vision transformer, which cuts an image into patches, and a residual network."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import ViTForImageClassification

from effkit.models.building import Knobs, Output, random_classes


class Vision(ViTForImageClassification):
    """ViT (arXiv 2010.11929) that can make its own batches. Input cells are patches."""

    knobs = Knobs(
        {"layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
         "heads": "num_attention_heads", "image": "image_size", "patch": "patch_size", "channels": "num_channels",
         "classes": "num_labels", "dropout": "hidden_dropout_prob attention_probs_dropout_prob",
         "attention": "attn_implementation"},
        {},
        loss="ForImageClassification",
    )  # fmt: skip

    def __init__(self, config: Any) -> None:
        if config.image_size % config.patch_size:
            raise ValueError(f"image is a multiple of patch; given: {config.image_size} and {config.patch_size}")
        if config.num_labels < 2:
            raise ValueError(f"classes is at least 2 (one is a regression to transformers); given: {config.num_labels}")
        super().__init__(config)

    def random_batch(self, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``pixel_values`` [B, channels, image, image] and ``labels`` [B]."""
        its: Any = self.config
        shape = (batch_size, its.num_channels, its.image_size, its.image_size)
        pixels, labels = random_classes(shape, its.num_labels, seed, next(self.parameters()))
        return {"pixel_values": pixels, "labels": labels}


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
