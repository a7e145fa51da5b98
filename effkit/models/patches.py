"""A vision transformer, which cuts an image into patches, for profiling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import ViTConfig, ViTForImageClassification

from effkit.models.building import check_counts, check_heads, random_classes, ready


class Vision(ViTForImageClassification):
    """ViT (arXiv 2010.11929) that can make its own batches. Input cells are patches."""

    def random_batch(self, batch_size: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``pixel_values`` [B, channels, image, image] and ``labels`` [B]."""
        its: Any = self.config
        shape = (batch_size, its.num_channels, its.image_size, its.image_size)
        pixels, labels = random_classes(shape, its.num_labels, seed, next(self.parameters()))
        return {"pixel_values": pixels, "labels": labels}


def build(
    *,
    layers: int = 4,
    hidden: int = 128,
    ffn: int | None = None,
    heads: int = 4,
    image: int = 32,
    patch: int = 4,
    channels: int = 3,
    classes: int = 10,
    dropout: float = 0.0,
    attention: str = "sdpa",
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Vision:
    """A ViT image classifier from its configuration, in training mode, on the GPU where there is one.

    Parameters
    ----------
    layers, hidden, ffn, heads, classes
        Its size; ``ffn`` is 4 x hidden unless given.
    image, patch
        Side of the square image and of a patch [pixels]; (image / patch)² patches and one class token are its cells.
    channels
        Of the image.
    dropout
        0 keeps steps repeatable.
    attention
        ``"sdpa"`` or ``"eager"``.
    """
    check_counts(layers=layers, hidden=hidden, heads=heads, image=image, patch=patch, channels=channels)
    check_heads(hidden, heads)
    if image % patch:
        raise ValueError(f"image is a multiple of patch; given: {image} and {patch}")
    if classes < 2:
        raise ValueError(f"classes is at least 2 (one class is a regression to transformers); given: {classes}")
    configuration = ViTConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=4 * hidden if ffn is None else ffn,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        image_size=image,
        patch_size=patch,
        num_channels=channels,
        num_labels=classes,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    torch.manual_seed(seed)
    model: Any = Vision(configuration)
    model.loss_type = "ForImageClassification"  # transformers infers it from the class name, and ours is another
    return ready(model, device, dtype)
