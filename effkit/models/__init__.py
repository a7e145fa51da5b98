"""The live models that the notebooks profile: real architectures from transformers, built from configurations.

Weights are random and nothing is downloaded. transformers is imported when the first model is built (it takes seconds).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from effkit.models.decoder_only import Text
    from effkit.models.encoder_decoder import Speech

__all__ = ["speech", "text"]


def speech(**configuration: Any) -> Speech:
    """A Speech2Text encoder-decoder; see :func:`effkit.models.encoder_decoder.build` for the keywords."""
    from effkit.models import encoder_decoder

    return encoder_decoder.build(**configuration)


def text(**configuration: Any) -> Text:
    """A Llama-like decoder-only language model; see :func:`effkit.models.decoder_only.build` for the keywords."""
    from effkit.models import decoder_only

    return decoder_only.build(**configuration)
