"""The live models that the notebooks profile: real architectures, built from configurations.

Weights are random and nothing is downloaded. transformers is imported when the first model from it is built (it takes
seconds). Every model makes its own batches (``model.random_batch(...)``), and ``model(**batch).loss`` is a scalar;
:func:`expert_parallel` is a layer of one, and its output is tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effkit.models.decoder_only import Text
    from effkit.models.encoder_decoder import Speech
    from effkit.models.gpt2 import Gpt
    from effkit.models.long_short_term import Recurrent
    from effkit.models.moe import ExpertParallel
    from effkit.models.patches import Vision
    from effkit.models.residual import Convolutional

__all__ = ["convolutional", "expert_parallel", "gpt", "recurrent", "speech", "text", "vision"]


def convolutional(**configuration: Any) -> Convolutional:
    """A residual convolutional image classifier; see :func:`effkit.models.residual.build` for the keywords."""
    from effkit.models import residual

    return residual.build(**configuration)


def expert_parallel(**configuration: Any) -> ExpertParallel:
    """An expert-parallel mixture of experts; see :func:`effkit.models.moe.build` for the keywords.

    A layer, not a model: ``layer(x)`` takes tokens [num_tokens, hidden] and returns tokens of the same shape, no loss.
    """
    from effkit.models import moe

    return moe.build(**configuration)


def gpt(**configuration: Any) -> Gpt:
    """A GPT-2 decoder-only language model; see :func:`effkit.models.gpt2.build` for the keywords."""
    from effkit.models import gpt2

    return gpt2.build(**configuration)


def recurrent(**configuration: Any) -> Recurrent:
    """An LSTM language model; see :func:`effkit.models.long_short_term.build` for the keywords."""
    from effkit.models import long_short_term

    return long_short_term.build(**configuration)


def speech(**configuration: Any) -> Speech:
    """A Speech2Text encoder-decoder; see :func:`effkit.models.encoder_decoder.build` for the keywords."""
    from effkit.models import encoder_decoder

    return encoder_decoder.build(**configuration)


def text(**configuration: Any) -> Text:
    """A Llama-like decoder-only language model; see :func:`effkit.models.decoder_only.build` for the keywords."""
    from effkit.models import decoder_only

    return decoder_only.build(**configuration)


def vision(**configuration: Any) -> Vision:
    """A ViT image classifier; see :func:`effkit.models.patches.build` for the keywords."""
    from effkit.models import patches

    return patches.build(**configuration)
