"""GPT-2, a decoder-only language model with learned positions, for profiling."""

from __future__ import annotations

import torch
from transformers import GPT2LMHeadModel

from effkit.models.building import Knobs, random_tokens


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
