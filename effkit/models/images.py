"""An image classifier for profiling: a vision transformer, which cuts an image into patches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ViTForImageClassification

from effkit.models.building import Knobs, random_classes


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
