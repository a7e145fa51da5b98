"""Models for profiling: GPT-2; Llama, whose rows may hold several packed documents; and a vision transformer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GPT2LMHeadModel, LlamaForCausalLM, ViTForImageClassification

from effkit.models.building import Knobs, random_classes, random_tokens


class Gpt(GPT2LMHeadModel):
    """GPT-2 (Radford et al., 2019) that can make its own batches. Input cells are tokens."""

    knobs = Knobs(
        {"layers": "n_layer", "hidden": "n_embd", "ffn": "n_inner", "heads": "n_head", "vocabulary": "vocab_size",
         "max_input_cells": "n_positions", "dropout": "resid_pdrop embd_pdrop attn_pdrop",
         "attention": "attn_implementation"},
        {"bos_token_id": 0, "eos_token_id": 0, "use_cache": False},
        loss="ForCausalLM",
    )  # fmt: skip

    def random_batch(self, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels`` [B, T]; ``length`` is T [tokens]."""
        return random_tokens(self.config.vocab_size, batch_size, length, seed, self.device)


class Text(LlamaForCausalLM):
    """Llama (arXiv 2302.13971) that can make its own batches, packed or not. Input cells are tokens."""

    knobs = Knobs(
        {"layers": "num_hidden_layers", "hidden": "hidden_size", "ffn": "intermediate_size",
         "heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "vocabulary": "vocab_size",
         "max_input_cells": "max_position_embeddings"},
        {"use_cache": False, "attn_implementation": "sdpa"},
        loss="ForCausalLM",
    )  # fmt: skip

    def make_batch(self, rows: Sequence[Any], lengths: Any) -> dict[str, torch.Tensor]:
        """Random ``input_ids``, ``labels``, ``position_ids`` [B, T]; ``attention_mask`` [B, T], [B, 1, T, T] if packed.

        ``rows`` are the example indices of each row, ``lengths`` a frame with ``input_length`` [tokens]. Rows that hold
        several documents are packed: positions begin anew at each document and a dense block-diagonal mask keeps the
        documents apart. Rows are padded to the longest.
        """
        documents = [lengths["input_length"].to_numpy()[row] for row in rows]
        longest = max(int(document.sum()) for document in documents)
        # which document each cell belongs to; -1 for padding
        owner = torch.full((len(rows), longest), -1)
        position = torch.zeros((len(rows), longest), dtype=torch.long)
        for r, document in enumerate(documents):
            end = int(document.sum())
            owner[r, :end] = torch.repeat_interleave(torch.arange(len(document)), torch.as_tensor(document))
            position[r, :end] = torch.cat([torch.arange(int(n)) for n in document])
        generator = torch.Generator().manual_seed(int(rows[0][0]))
        tokens = torch.randint(4, self.config.vocab_size, owner.shape, generator=generator)
        mask: torch.Tensor = (owner >= 0).long()
        if any(len(row) > 1 for row in rows):
            same = (owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, :, None]
            mask = same & torch.ones(longest, longest, dtype=torch.bool).tril()
            mask[..., 0] |= owner < 0  # padding sees one cell, since softmax over none is not a number
            mask = mask[:, None]
        batch = {
            "input_ids": tokens.masked_fill(owner < 0, 0),
            "labels": tokens.masked_fill((owner < 0) | (position == 0), -100),
            "position_ids": position,
            "attention_mask": mask,
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def random_batch(self, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels`` [B, T], without padding; ``length`` is T [tokens]."""
        return random_tokens(self.config.vocab_size, batch_size, length, seed, self.device)


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
