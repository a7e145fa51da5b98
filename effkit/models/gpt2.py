"""GPT-2, a decoder-only language model with learned positions, for profiling."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from effkit.models.building import check_counts, check_heads, random_tokens, ready


class Gpt(GPT2LMHeadModel):
    """GPT-2 (Radford et al., 2019) that can make its own batches. Input cells are tokens."""

    def random_batch(self, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels`` [B, T]; ``length`` is T [tokens]."""
        return random_tokens(self.config.vocab_size, batch_size, length, seed, self.device)


def build(
    *,
    layers: int = 4,
    hidden: int = 128,
    ffn: int | None = None,
    heads: int = 4,
    vocabulary: int = 1000,
    max_input_cells: int = 1024,
    dropout: float = 0.0,
    attention: str = "sdpa",
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Gpt:
    """A GPT-2 model from its configuration, in training mode, on the GPU where there is one.

    Parameters
    ----------
    layers, hidden, ffn, heads, vocabulary
        Its size; ``ffn`` is 4 x hidden unless given.
    max_input_cells
        Longest row that it has positions for [tokens].
    dropout
        Of embeddings, attention and residuals; 0 keeps steps repeatable.
    attention
        ``"sdpa"`` (scores are never stored) or ``"eager"`` (scores [B, heads, T, T] are stored).
    """
    check_counts(layers=layers, hidden=hidden, heads=heads, vocabulary=vocabulary, max_input_cells=max_input_cells)
    check_heads(hidden, heads)
    configuration = GPT2Config(
        vocab_size=vocabulary,
        n_positions=max_input_cells,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        n_inner=4 * hidden if ffn is None else ffn,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
        attn_implementation=attention,  # type: ignore[call-arg]
    )
    torch.manual_seed(seed)
    model: Any = Gpt(configuration)
    model.loss_type = "ForCausalLM"  # transformers infers it from the class name, and ours is another
    return ready(model, device, dtype)
