"""rebalance(): as many parameters, but in the encoder, which runs once; static_decoding(): a cache that compiles."""

from __future__ import annotations

import warnings
from typing import Any

from transformers import CompileConfig, PreTrainedConfig
from transformers.models.auto import modeling_auto

from effkit.decoder.configurations import changed, sizes
from effkit.decoder.memory import count, num_parameters, without_memory


def model_class(config: PreTrainedConfig) -> Any:
    """The class of the model that generates with this configuration: speech to text, text to text, or text alone.
    ValueError when transformers has none."""
    for mapping in (
        modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING, modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING,
    ):  # fmt: skip
        for kind in type(config).__mro__:
            if kind in mapping:
                return mapping[kind]
    raise ValueError(
        f"config is a {type(config).__name__}, expected that of a model that generates text, such as WhisperConfig or "
        "LlamaConfig; give one of those."
    )


def parameters(config: PreTrainedConfig, encoder_layers: int | None = None, decoder_layers: int | None = None) -> int:
    """Number of parameters of the configuration's model, shared ones once; counted on the meta device, without memory.

    An encoder-decoder may be given other ``encoder_layers`` and ``decoder_layers`` than its configuration's.
    """
    return num_parameters(without_memory(model_class(config), config, encoder_layers, decoder_layers))


def rebalance(config: PreTrainedConfig, decoder_layers: int, *, tolerance_frac: float = 0.02) -> PreTrainedConfig:
    """A new configuration with another number of decoder layers and the encoder layers that keep its parameters.

    The encoder runs once and over all positions together, the decoder once per token: layers moved from it to the
    encoder shorten a generation (Canary, arXiv 2503.05931: 24/24 to 32/4). The result has to be trained anew. The other
    way, a T5 with more decoder than encoder layers, transformers 5.23 makes too small a cache for. ValueError when it
    is not an encoder-decoder, when its layers are not alike, or when no encoder layer would be left.

    Parameters
    ----------
    config
        An encoder-decoder's: Speech2Text, Whisper, Bart, Marian, T5, ... It stays as it is.
    decoder_layers
        Decoder layers to have.
    tolerance_frac
        Warns when the nearest number of parameters is further off than this; :func:`parameters` says how far.
    """
    if not getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"config is a {type(config).__name__}, expected an encoder-decoder's: a decoder alone has no encoder to "
            "move layers to; make it shallower with exit_at()."
        )
    if decoder_layers < 1:
        raise ValueError(f"decoder_layers is {decoder_layers}, expected at least 1: a decoder has to have a layer.")
    now, counted, budget = sizes(config), count(model_class(config), config), parameters(config)
    if budget != counted.total(now.encoder_layers, now.decoder_layers):
        raise ValueError(
            f"config is a {type(config).__name__} whose layers differ in size, expected layers all alike; choose the "
            "numbers of layers with parameters(config, encoder_layers, decoder_layers)."
        )
    encoder_layers = counted.encoder_layers_for(budget, decoder_layers)
    off_frac = counted.total(encoder_layers, decoder_layers) / budget - 1
    if abs(off_frac) > tolerance_frac:
        warnings.warn(
            f"{encoder_layers} encoder layers beside {decoder_layers} decoder layers come nearest, with "
            f"{off_frac:+.1%} parameters; another decoder_layers may come nearer.",
            stacklevel=2,
        )
    return changed(config, encoder_layers=encoder_layers, decoder_layers=decoder_layers)


def static_decoding(config: CompileConfig | None = None) -> dict[str, Any]:
    """Keywords of ``generate()`` for a cache of fixed size, so that transformers compiles the step of one token.

    ``model.generate(**inputs, max_new_tokens=200, **static_decoding())``. Compiling takes seconds to minutes at the
    first call, and again when a longer text needs a larger cache: warm up with the longest. transformers compiles on
    GPUs only; elsewhere it warns, and runs the static cache as it is.

    Parameters
    ----------
    config
        How to compile; ``CompileConfig()`` unless given: inductor, in its mode with CUDA graphs.
    """
    compile_config = CompileConfig() if config is None else config
    # a configuration with use_cache=False, as a training one has, would have the rest ignored
    return {"use_cache": True, "cache_implementation": "static", "compile_config": compile_config}
