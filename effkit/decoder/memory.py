"""Bytes of weights and of the key-value cache, exactly: counted, and by formula."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from effkit.decoder import configurations, module_roles
from effkit.decoder.setting import DTYPES, Setting

_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")  # what configurations call their number


@dataclass(frozen=True)
class Parameters:
    """How many parameters a model has: ``fixed``, plus so many per layer.

    ``of_part`` are those of a decoder layer's parts that a token meets, and of the output layer, shared or not; those
    of cross-attention without its keys' and values', which are computed once; of experts, as many as it is sent to.
    """

    fixed: int
    per_encoder_layer: int
    per_decoder_layer: int
    of_part: Mapping[str, int]

    def total(self, encoder_layers: int, decoder_layers: int) -> int:
        return self.fixed + encoder_layers * self.per_encoder_layer + decoder_layers * self.per_decoder_layer

    def encoder_layers_for(self, total: int, decoder_layers: int) -> int:
        """The number of encoder layers that comes nearest to a total, 1 at least.

        Raises ValueError when the decoder layers alone are too many.
        """
        spare = total - self.fixed - decoder_layers * self.per_decoder_layer
        if spare < self.per_encoder_layer / 2:
            most = (2 * (total - self.fixed) - self.per_encoder_layer) // (2 * self.per_decoder_layer)
            raise ValueError(
                f"decoder_layers={decoder_layers} leave no encoder layer in {total:,} parameters; take at most {most}"
            )
        return max(1, round(spare / self.per_encoder_layer))


def count(kind: type, config: Any) -> Parameters:
    """Parameters of models of this class at any depth, counted on small ones without memory.

    Layers after the first of a stack are alike; the first may have more (T5's positions).
    """
    coded = bool(config.is_encoder_decoder)
    small, deep = (without_memory(kind, config, 1 if coded else None, depth) for depth in (1, 2))
    smallest = num_parameters(small)
    per_decoder = num_parameters(deep) - smallest
    per_encoder = num_parameters(without_memory(kind, config, 2, 1)) - smallest if coded else 0
    of_part = dict.fromkeys((module_roles.SELF, module_roles.CROSS, module_roles.CROSS_KV, module_roles.FFN), 0)
    for name, module in module_roles.of_layer(module_roles.layers(deep)[-1]):
        of_part[name] += num_parameters(module) - _idle(module, config)
    of_part[module_roles.CROSS] -= of_part[module_roles.CROSS_KV]
    output = small.get_output_embeddings()
    of_part[module_roles.OUTPUT] = num_parameters(output) if output is not None else 0
    return Parameters(smallest - per_encoder - per_decoder, per_encoder, per_decoder, of_part)


def without_memory(
    kind: type, config: Any, encoder_layers: int | None = None, decoder_layers: int | None = None
) -> Any:
    """A model of this class on the meta device; its configuration is a copy, for models write into theirs."""
    config = configurations.changed(config, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
    with torch.device("meta"):
        return kind(config)


def num_parameters(module: Any) -> int:
    """Shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def _idle(module: Any, config: Any) -> int:
    """Parameters of the experts that a token is not sent to."""
    each = getattr(config, "num_experts_per_tok", None)
    number = next((size for name in _EXPERTS if isinstance(size := getattr(config, name, None), int)), None)
    if not isinstance(each, int) or not number:
        return 0
    experts = [child for name, child in module.named_modules() if name.rpartition(".")[2] == "experts"]
    return sum(num_parameters(child) for child in experts) * max(0, number - each) // number


def in_weights(model: Any) -> int:
    """What a live model's parameters take [bytes], shared ones once."""
    return sum(parameter.nbytes for parameter in model.parameters())


class CacheBytes(NamedTuple):
    """Keys and values of self-attention, one per token so far, and of cross-attention, one per cell of the encoder."""

    self_attention: int
    cross_attention: int


def in_cache(cache: Any) -> CacheBytes:
    """What a transformers cache holds [bytes]; zeros for None."""
    own = getattr(cache, "self_attention_cache", cache)
    return CacheBytes(_held(own), _held(getattr(cache, "cross_attention_cache", None)))


def _held(cache: Any) -> int:
    layers = getattr(cache, "layers", None) or ()
    tensors = [getattr(layer, name, None) for layer in layers for name in ("keys", "values")]
    return sum(tensor.nbytes for tensor in tensors if isinstance(tensor, torch.Tensor))


def kv_cache_bytes(
    config: Any, batch: int, length: int, *, encoder_cells: int = 0, dtype: str = "float32"
) -> CacheBytes:
    """Size of a key-value cache: 2 · layers · batch · length · heads · head size · bytes of a value.

    Parameters
    ----------
    config
        A transformers configuration. Its key-value heads count for self-attention, its query heads for cross-attention.
    batch
        Sequences (beams count).
    length
        Tokens of each: prompt and generated ones, but for the last, which no step has read yet.
    encoder_cells
        Cells that the encoder puts out, for cross-attention.
    dtype
        Of the values.

    Examples
    --------
    >>> from transformers import LlamaConfig
    >>> kv_cache_bytes(LlamaConfig(), batch=1, length=4096, dtype="float16").self_attention / 2**30
    2.0
    """
    if batch < 1 or length < 0 or encoder_cells < 0:
        raise ValueError(f"a cache has batch >= 1 and lengths >= 0; given: {batch}, {length}, {encoder_cells}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype is one of {', '.join(DTYPES)}; given: {dtype!r}")
    sizes = configurations.sizes(config)
    per_head = 2 * sizes.decoder_layers * batch * sizes.head_dim * DTYPES[dtype]
    crossed = encoder_cells if config.is_encoder_decoder else 0
    return CacheBytes(per_head * sizes.kv_heads * length, per_head * sizes.heads * crossed)


@dataclass(frozen=True)
class StepSize:
    """What a step has to do with."""

    prompt_cells: int  # tokens before the first generated one
    read_bytes: int  # of weights and of keys and values, the mean over the steps


@dataclass(frozen=True)
class Memory:
    """What weights and cache of a model take at any setting [bytes]."""

    kind: type
    config: Any
    prompt_cells: int
    halvings: int | None  # of the input's length by the encoder's convolutions; None where that does not give its cells
    _counted: dict[tuple[int, int], Parameters] = field(default_factory=dict, repr=False, compare=False)

    def parameters(self, setting: Setting) -> Parameters:
        """Counted once for each width and number of heads."""
        key = (setting.width, setting.kv_heads)
        if key not in self._counted:
            self._counted[key] = count(self.kind, self._config(setting))
        return self._counted[key]

    def sizes(self, setting: Setting) -> configurations.Sizes:
        """Of the model at this setting."""
        return configurations.sizes(self._config(setting))

    def weight_bytes(self, setting: Setting) -> int:
        number = self.parameters(setting).total(setting.encoder_layers, setting.decoder_layers)
        return int(number * setting.bytes_per_weight)

    def prompt(self, setting: Setting) -> int:
        """Tokens before the first generated one."""
        return self.prompt_cells if setting.encoder_layers else setting.input_length

    def step_size(self, setting: Setting) -> StepSize:
        """What a step of this setting reads."""
        prompt = self.prompt(setting)
        of_part, cache = self.parameters(setting).of_part, self.cache(setting)
        layer = sum(of_part[part] for part in (module_roles.SELF, module_roles.CROSS, module_roles.FFN))
        weights = int((setting.depth * layer + of_part[module_roles.OUTPUT]) * setting.bytes_per_weight)
        last = prompt + setting.num_steps - 1
        mean = cache.self_attention * (prompt + last) // (2 * last)
        return StepSize(prompt, weights + mean + cache.cross_attention)

    def cache(self, setting: Setting) -> CacheBytes:
        if setting.cache == "off":
            return CacheBytes(0, 0)
        cells = self.encoder_cells(setting.input_length)
        length = self.prompt(setting) + setting.num_steps - 1
        return kv_cache_bytes(self._config(setting), setting.rows, length, encoder_cells=cells, dtype=setting.dtype)

    def _config(self, setting: Setting) -> Any:
        return configurations.changed(
            self.config, width=setting.width or None, kv_heads=setting.kv_heads, decoder_layers=setting.depth
        )

    def encoder_cells(self, length: int) -> int:
        for _ in range(self.halvings or 0):
            length = (length - 1) // 2 + 1
        return length


def halvings(length: int, cells: int) -> int | None:
    """How often ``length`` has to be halved, rounding up, to give ``cells``."""
    number = 0
    while length > cells:
        length, number = (length - 1) // 2 + 1, number + 1
    return number if length == cells else None
