"""A speech encoder-decoder with batches of any lengths, for profiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Speech2TextForConditionalGeneration

from effkit.models.building import Knobs, check_counts

NUM_MEL_BINS = 80


class Speech(Speech2TextForConditionalGeneration):
    """Speech2Text (fairseq S2T, arXiv 2010.05171) that can make its own batches.

    Input cells are 10 ms frames of 80 mel bins, which two strided convolutions bring to a quarter; output cells are
    tokens.
    """

    knobs = Knobs(
        {"encoder_layers": "encoder_layers", "decoder_layers": "decoder_layers", "hidden": "d_model",
         "ffn": "encoder_ffn_dim decoder_ffn_dim", "heads": "encoder_attention_heads decoder_attention_heads",
         "vocabulary": "vocab_size", "max_input_cells": "max_source_positions",
         "max_output_cells": "max_target_positions", "dropout": "dropout attention_dropout activation_dropout",
         "channels": "conv_channels"},
        {"input_feat_per_channel": NUM_MEL_BINS, "use_cache": False},
    )  # fmt: skip

    def make_batch(self, rows: Sequence[Any], lengths: Any) -> dict[str, torch.Tensor]:
        """Random ``input_features`` [B, T, 80], ``attention_mask`` [B, T], ``labels`` [B, U] (padded with -100).

        ``rows`` are the example indices of each row, one each (ValueError for packed rows); ``lengths`` is a frame with
        ``input_length`` and ``output_length`` [cells]; without the second, a sixteenth of the first, as in speech.
        """
        if any(len(row) != 1 for row in rows):
            raise ValueError("a speech model takes one example per row: its convolutions would mix packed neighbours")
        indices = np.concatenate(list(rows))
        frames = torch.as_tensor(lengths["input_length"].to_numpy()[indices])
        known = "output_length" in lengths
        tokens = torch.as_tensor(lengths["output_length"].to_numpy()[indices]) if known else (frames // 16).clamp(min=2)
        generator = torch.Generator().manual_seed(int(indices[0]))
        features = torch.randn(len(indices), int(frames.max()), NUM_MEL_BINS, generator=generator)
        labels = torch.randint(4, self.config.vocab_size, (len(indices), int(tokens.max())), generator=generator)
        mask = torch.arange(int(frames.max())) < frames[:, None]
        labels[torch.arange(int(tokens.max())) >= tokens[:, None]] = -100
        batch = {"input_features": features * mask[..., None], "attention_mask": mask.long(), "labels": labels}
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def random_batch(self, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``input_features`` [B, T, 80] and ``labels`` [B, U], without padding.

        ``length`` is T [10 ms frames]; U is a sixteenth of it, as in speech, and at least 2 [tokens].
        """
        check_counts(batch_size=batch_size, length=length)
        generator = torch.Generator().manual_seed(seed)
        features = torch.randn(batch_size, length, NUM_MEL_BINS, generator=generator)
        tokens = max(length // 16, 2)
        labels = torch.randint(4, self.config.vocab_size, (batch_size, tokens), generator=generator)
        return {"input_features": features.to(self.device, self.dtype), "labels": labels.to(self.device)}
