"""A decoder-only language model whose rows may hold several packed documents, for profiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effkit.models.building import check_heads, random_tokens, ready


class Text(LlamaForCausalLM):
    """Llama (arXiv 2302.13971) that can make its own batches, packed or not. Input cells are tokens."""

    def make_batch(self, rows: Sequence[Any], lengths: Any) -> dict[str, torch.Tensor]:
        """A batch of random tokens, padded to its longest row.

        Rows that hold several documents are packed: positions begin anew at each document and a dense
        block-diagonal mask keeps the documents apart.

        Parameters
        ----------
        rows
            Example indices of each row.
        lengths
            Frame with ``input_length`` [tokens].

        Returns
        -------
        dict
            ``input_ids``, ``labels``, ``position_ids`` [B, T]; ``attention_mask`` [B, T], or [B, 1, T, T] when packed.
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


def build(
    *,
    layers: int = 4,
    hidden: int = 128,
    ffn: int | None = None,
    heads: int = 4,
    kv_heads: int | None = None,
    vocabulary: int = 1000,
    max_input_cells: int = 8192,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Text:
    """A Llama model from its configuration, in training mode, on the GPU where there is one.

    Parameters
    ----------
    layers, hidden, ffn, heads, kv_heads, vocabulary
        Its size; ``ffn`` is 4 x hidden and ``kv_heads`` equals ``heads`` unless given.
    max_input_cells
        Longest row [tokens].
    """
    check_heads(hidden, heads)
    configuration = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden if ffn is None else ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads or heads,
        max_position_embeddings=max_input_cells,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    torch.manual_seed(seed)
    model: Any = Text(configuration)
    model.loss_type = "ForCausalLM"  # transformers infers it from the class name, and ours is another
    return ready(model, device, dtype)
