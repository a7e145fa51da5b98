"""The live models that the notebooks profile: real architectures, built from configurations.

Weights are random and nothing is downloaded; torch and transformers are imported when the first model is built. Every
model is in training mode, makes its own batches (``model.random_batch(...)``), and ``model(**batch).loss`` is a scalar;
:func:`expert_parallel` is a layer of one, and its output is tokens. All take ``device`` (the GPU where there is one,
unless given), ``dtype`` of the weights (float32 unless given) and ``seed``: equal seeds are equal models.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from effkit.models.configured import Gpt, Text, Vision
    from effkit.models.moe import ExpertParallel
    from effkit.models.speech2text import Speech

__all__ = ["expert_parallel", "gpt", "speech", "text", "vision"]


def expert_parallel(
    hidden: int = 64, ffn: int = 128, num_experts: int = 8, top_k: int = 2, *, capacity_factor: float = 0.0,
    pad: bool = False, num_chunks: int = 1, num_chunks_backward: int = 0, compress: str = "none", num_hashes: int = 4,
    compensate: bool = False, message_dtype: str = "same", owner: Sequence[int] | None = None, group: Any = None,
    barriers: bool = False, device: str | None = None, dtype: torch.dtype | None = None, seed: int = 0,
) -> ExpertParallel:  # fmt: skip
    """An expert-parallel mixture of experts, to put into a model of your own.

    A layer, not a model: ``layer(x)`` takes tokens [num_tokens, hidden] and returns tokens of the same shape, no loss.
    The router is not pressed to balance its experts: add a loss for that to your own.

    Parameters
    ----------
    hidden, ffn, num_experts, top_k, capacity_factor, pad, compress, num_hashes, compensate, message_dtype
        As in :class:`effkit.moe.Setting`.
    num_chunks, num_chunks_backward
        Pieces of the exchange forward, and backward (0: as many).
    owner
        The rank that holds each expert, -1 for every rank; by default equal shares of neighbours.
    group
        Of torch.distributed; ``None`` where this process holds all experts.
    barriers
        Let the ranks meet before each exchange: to measure waiting, not to train.

    Examples
    --------
    >>> layer = expert_parallel(hidden=8, ffn=16, num_experts=4)
    >>> layer(**layer.random_batch(10)).shape
    torch.Size([10, 8])
    """
    knobs = locals()
    from effkit.models import moe

    return moe.ExpertParallel(**knobs)


def gpt(
    *, layers: int = 4, hidden: int = 128, ffn: int | None = None, heads: int = 4, vocabulary: int = 1000,
    max_input_cells: int = 1024, dropout: float = 0.0, attention: str = "sdpa", device: str | None = None,
    dtype: torch.dtype | None = None, seed: int = 0,
) -> Gpt:  # fmt: skip
    """A GPT-2, decoder-only language model with learned positions for rows of ``max_input_cells`` [tokens] at most.

    ``ffn`` is 4 x hidden unless given. ``dropout`` is of embeddings, attention and residuals; 0 keeps steps repeatable.
    ``attention`` is ``"sdpa"`` (scores are never stored) or ``"eager"`` (scores [B, heads, T, T] are stored).
    """
    return _built("configured.Gpt", **locals())


def speech(
    *, encoder_layers: int = 4, decoder_layers: int = 2, hidden: int = 128, ffn: int | None = None, heads: int = 2,
    vocabulary: int = 1000, max_input_cells: int = 6000, max_output_cells: int = 1024, dropout: float = 0.0,
    device: str | None = None, dtype: torch.dtype | None = None, seed: int = 0,
) -> Speech:  # fmt: skip
    """A Speech2Text encoder-decoder (arXiv 2010.05171).

    ``ffn`` is 4 x hidden unless given. It has positions for inputs of ``max_input_cells`` [10 ms frames] and outputs of
    ``max_output_cells`` [tokens]. ``dropout`` 0 keeps steps repeatable.
    """
    return _built("speech2text.Speech", **locals(), channels=2 * hidden)


def text(
    *, layers: int = 4, hidden: int = 128, ffn: int | None = None, heads: int = 4, kv_heads: int | None = None,
    vocabulary: int = 1000, max_input_cells: int = 8192, device: str | None = None, dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Text:  # fmt: skip
    """A Llama, decoder-only language model (arXiv 2302.13971), whose rows may hold several packed documents.

    ``ffn`` is 4 x hidden and ``kv_heads`` equals ``heads`` unless given; ``max_input_cells`` is the longest row
    [tokens].

    >>> text(layers=1, vocabulary=50).random_batch(2, length=8)["input_ids"].shape
    torch.Size([2, 8])
    """
    return _built("configured.Text", **locals())


def vision(
    *, layers: int = 4, hidden: int = 128, ffn: int | None = None, heads: int = 4, image: int = 32, patch: int = 4,
    channels: int = 3, classes: int = 10, dropout: float = 0.0, attention: str = "sdpa", device: str | None = None,
    dtype: torch.dtype | None = None, seed: int = 0,
) -> Vision:  # fmt: skip
    """A ViT image classifier (arXiv 2010.11929) of (``image`` / ``patch``)² patches and one class token.

    Images have ``image`` x ``image`` pixels and ``channels``. ``ffn`` is 4 x hidden unless given; ``dropout`` 0 keeps
    steps repeatable; ``attention`` is ``"sdpa"`` or ``"eager"``.
    """
    return _built("configured.Vision", **locals())


def _built(place: str, **knobs: Any) -> Any:
    """The model whose class is at ``place`` in this package, with these knobs."""
    module, kind = place.split(".")
    build = import_module("effkit.models.building").build
    return build(getattr(import_module(f"effkit.models.{module}"), kind), **knobs)


__dir__ = __all__.copy  # what a reader's Tab shows
