"""The sizes of a generating model, read from a transformers configuration and written to a changed copy."""

from __future__ import annotations

import copy
import math
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

# What configurations call the same thing; the first name that one has counts. A dot leads into a part's own.
_ENCODER_LAYERS = ("encoder_layers", "num_encoder_layers", "encoder_num_hidden_layers",
                   "encoder_config.num_hidden_layers", "encoder.num_hidden_layers", "num_layers")  # fmt: skip
_DECODER_LAYERS = ("decoder_layers", "num_decoder_layers", "decoder_num_hidden_layers",
                   "decoder_config.num_hidden_layers", "decoder.num_hidden_layers", "num_hidden_layers")  # fmt: skip
_WIDTH = ("d_model", "hidden_size", "n_embd", "decoder_config.hidden_size", "decoder.hidden_size")
_ALONG_WIDTH = ("encoder_ffn_dim", "decoder_ffn_dim", "intermediate_size", "d_ff", "n_inner", "conv_channels",
                "encoder_attention_heads", "decoder_attention_heads", "num_attention_heads", "num_heads",
                "num_key_value_heads")  # fmt: skip
_HEADS = ("decoder_attention_heads", "num_heads", "num_attention_heads", "decoder_num_attention_heads",
          "decoder_config.num_attention_heads", "decoder.num_attention_heads")  # fmt: skip
_FFN = ("decoder_ffn_dim", "intermediate_size", "d_ff", "n_inner", "ffn_dim")
_POSITIONS = ("max_target_positions", "max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Sizes:
    """Counts of layers and heads, and numbers of values."""

    encoder_layers: int  # 0 without an encoder
    decoder_layers: int
    width: int  # per token
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int  # inside the decoder's feed-forward
    positions: int | None  # longest sequence of the decoder [tokens], None where nothing limits it


def sizes(config: Any) -> Sizes:
    """The sizes in a configuration. ValueError when it names its layers or its width in no known way."""
    wide, heads = _read(config, _WIDTH), _read(config, _HEADS)
    limits = [getattr(config, name, None) for name in _POSITIONS]
    return Sizes(
        encoder_layers=_read(config, _ENCODER_LAYERS) if config.is_encoder_decoder else 0,
        decoder_layers=_read(config, _DECODER_LAYERS), width=wide, heads=heads,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or wide // heads),
        ffn=next((int(size) for name in _FFN if (size := getattr(config, name, None))), 4 * wide),
        positions=next((int(limit) for limit in limits if isinstance(limit, int) and limit > 0), None),
    )  # fmt: skip


def changed(
    config: Any, *, encoder_layers: int | None = None, decoder_layers: int | None = None,
    width: int | None = None, kv_heads: int | None = None,
) -> Any:  # fmt: skip
    """A copy with these sizes; feed-forward and number of heads go with the width, the heads' own size stays.
    ValueError for a size that the model does not have, or that its heads cannot share."""
    new, now = copy.deepcopy(config), sizes(config)
    kind = type(config).__name__
    if encoder_layers not in (None, now.encoder_layers):
        if not config.is_encoder_decoder:
            raise ValueError(f"encoder_layers={encoder_layers} needs an encoder-decoder; {kind} is decoder-only")
        _set_layers(new, _name(config, _ENCODER_LAYERS), encoder_layers or 0)
        # some keep the encoder's once more, under the general name; elsewhere that is an alias, or the total
        if config.__dict__.get("num_hidden_layers") == now.encoder_layers:
            new.num_hidden_layers = encoder_layers
    if decoder_layers not in (None, now.decoder_layers):
        _set_layers(new, _name(config, _DECODER_LAYERS), decoder_layers or 0)
    if width not in (None, now.width):
        _set_width(new, _name(config, _WIDTH), now.width, width or 0)
    if kv_heads not in (None, now.kv_heads):
        if not isinstance(getattr(config, "num_key_value_heads", None), int):
            raise ValueError(f"kv_heads={kv_heads} needs a model with grouped heads; {kind} has none")
        if sizes(new).heads % (kv_heads or 1):
            raise ValueError(f"kv_heads divides the {sizes(new).heads} query heads; given: {kv_heads}")
        new.num_key_value_heads = kv_heads
    return new


def check_positions(sizes: Sizes, prompt_cells: int, num_steps: int) -> None:
    """Raise ValueError when a prompt and the tokens after it pass the model's positions."""
    if sizes.positions is not None and prompt_cells + num_steps > sizes.positions:
        raise ValueError(
            f"num_steps={num_steps} after {prompt_cells} tokens of prompt pass the model's {sizes.positions} "
            f"positions; take at most {sizes.positions - prompt_cells}"
        )


def _set_layers(config: Any, name: str, number: int) -> None:
    above, _, last = name.rpartition(".")  # a dotted name leads into a part's own
    owner = attrgetter(above)(config) if above else config
    setattr(owner, last, number)
    if kinds := getattr(owner, "layer_types", None):
        owner.layer_types = [kinds[i % len(kinds)] for i in range(number)]


def _set_width(config: Any, name: str, before: int, width: int) -> None:
    if "." in name:
        raise ValueError(f"{type(config).__name__} keeps its sizes in parts of its own; change its width by hand")
    along = {key: size for key in _ALONG_WIDTH if isinstance(size := getattr(config, key, None), int)}
    if any(size * width % before for size in along.values()):
        step = before // math.gcd(before, *along.values())
        raise ValueError(f"a width of {width} gives no whole number of heads: take a multiple of {step}")
    setattr(config, name, width)
    for key, size in along.items():
        setattr(config, key, size * width // before)


def _read(config: Any, names: tuple[str, ...]) -> int:
    return int(attrgetter(_name(config, names))(config))


def _name(config: Any, names: tuple[str, ...]) -> str:
    for name in names:
        with suppress(AttributeError):
            if isinstance(attrgetter(name)(config), int):
                return name
    raise ValueError(f"{type(config).__name__} has none of {', '.join(names)}: its sizes are not known here")
