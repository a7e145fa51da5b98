"""A model at a setting, with inputs, ready to generate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from effkit.arguments import checked_model, described
from effkit.decoder import configurations
from effkit.decoder.early_exit import exit_at
from effkit.decoder.setting import DTYPES, Setting

_NEVER = 10**9  # no vocabulary has it
_DEFAULT_LENGTH = {"input_features": 400, "input_ids": 32}
# What a setting can change about the model itself
_SIZES = ("encoder_layers", "decoder_layers", "width", "kv_heads")


@dataclass(frozen=True, eq=False)
class Ready:
    """A model, the setting, and the call that generates with it."""

    model: Any
    setting: Setting
    call: Callable[[], Any]


def setting_of(model: Any, inputs: Any = None, **changes: Any) -> Setting:
    """How this model generates from these inputs as it is, with changes. ValueError when it cannot generate, or a
    change is not possible."""
    if not callable(getattr(model, "generate", None)) or not hasattr(model, "config"):
        raise ValueError(
            f"{described(model)} has no generate(): give a transformers model that generates, or a function "
            "step(token, cache) -> (token, cache)"
        )
    checked_model(model)
    sizes, name = configurations.sizes(model.config), model.main_input_name
    own_length = None if inputs is None else _named(inputs, name)[name].shape[_length_axis(model, name)]
    length = changes.pop("input_length", None) or own_length
    if not length:  # Whisper takes inputs of one length only
        whisper = hasattr(model.config, "num_mel_bins")
        length = 2 * int(model.config.max_source_positions) if whisper else _DEFAULT_LENGTH.get(name, 0)
    own_sizes = {size: getattr(sizes, size) for size in _SIZES}
    setting = Setting(**own_sizes, input_length=length, dtype=str(model.dtype).removeprefix("torch."))
    return checked(model, setting.change(**changes))


def checked(model: Any, setting: Setting) -> Setting:
    """The setting, if the model's positions suffice for it."""
    prompt = 1 if model.config.is_encoder_decoder else setting.input_length
    configurations.check_positions(configurations.sizes(model.config), prompt, setting.num_steps)
    longest = getattr(model.config, "max_source_positions", None)
    if isinstance(longest, int) and model.config.is_encoder_decoder and setting.input_length > 2 * longest:
        raise ValueError(f"input_length={setting.input_length} passes the encoder's {longest} positions; take less")
    return setting


def prepared(model: Any, inputs: Any, setting: Setting, built: dict[Any, Any] | None = None) -> Ready:
    """The model at this setting: itself where its sizes are those, otherwise built anew with random weights, or taken
    from those that were ``built`` before. ValueError when it cannot be run this way, and says why."""
    checked_model(model)
    if setting.weight_bits not in (0, 8 * DTYPES[setting.dtype]):
        raise ValueError("weight_bits is a prediction from bytes alone; nothing here runs on weights of fewer bits")
    ready = _sized(model, setting, {} if built is None else built)
    batch = make_inputs(ready, inputs, setting)
    how = generation_config(ready, setting)

    def call() -> Any:
        exited = exit_at(ready, setting.exit_layer) if setting.exit_layer else nullcontext()
        with torch.no_grad(), _quiet(), exited:
            return ready.generate(**batch, **_own_cache(ready, setting), generation_config=how)

    return Ready(ready, setting, call)


def _own_cache(model: Any, setting: Setting) -> dict[str, Any]:
    """Where transformers would count the cache's layers by the encoder, as it does for T5, one that grows by itself."""
    counted = getattr(model.config, "num_hidden_layers", None)
    grows = setting.cache == "on" and setting.compiled == "off" and setting.encoder_layers > 0
    if not grows or not isinstance(counted, int) or counted >= setting.depth:
        return {}
    from transformers import DynamicCache, EncoderDecoderCache

    return {"past_key_values": EncoderDecoderCache(DynamicCache(), DynamicCache())}


def _sized(model: Any, setting: Setting, before: dict[Any, Any]) -> Any:
    sizes = configurations.sizes(model.config)
    changes = {name: size for name in _SIZES if (size := getattr(setting, name)) not in (0, getattr(sizes, name))}
    dtype = getattr(torch, setting.dtype)
    if not changes and model.dtype == dtype:
        return model
    key = (*changes.items(), setting.dtype)
    if key not in before:
        config = configurations.changed(model.config, **changes)
        with torch.random.fork_rng():
            built = type(model)(config).to(device=next(model.parameters()).device, dtype=dtype)
        before[key] = built.eval()
        before[key].generation_config = copy.deepcopy(model.generation_config)
    return before[key]


def generation_config(model: Any, setting: Setting) -> Any:
    """Greedy (or beam) search over exactly ``num_steps`` tokens: the end token is one that never comes, since None
    would be filled in from the model's own."""
    how = copy.deepcopy(model.generation_config)
    changes: dict[str, Any] = {
        "max_new_tokens": setting.num_steps, "min_new_tokens": None, "max_length": None, "min_length": 0,
        "eos_token_id": _NEVER, "forced_eos_token_id": None, "pad_token_id": how.pad_token_id or 0, "do_sample": False,
        "num_beams": setting.num_beams, "use_cache": setting.cache == "on", "return_dict_in_generate": True,
    }  # fmt: skip
    if setting.compiled == "on":
        from transformers import CompileConfig

        changes |= {"cache_implementation": "static", "compile_config": CompileConfig(mode="default")}
        # transformers compiles by itself on accelerators only, unless told
        changes["compile_config"]._compile_all_devices = True
    for name, value in changes.items():
        setattr(how, name, value)
    return how


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers warns, at every call, of the end token that never comes."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def make_inputs(model: Any, inputs: Any, setting: Setting) -> dict[str, torch.Tensor]:
    """Keyword arguments of ``generate``: those given, brought to the setting's batch and length, or random ones.

    Rows are repeated in turn or cut, and so is the length. Raises ValueError when none are given for a model whose
    inputs cannot be made up.
    """
    name, device = model.main_input_name, next(model.parameters()).device
    if inputs is None:
        return {key: tensor.to(device) for key, tensor in _random(model, name, setting).items()}
    named, axis = _named(inputs, name), _length_axis(model, name)
    before = named[name].shape
    fitted = {}
    for key, value in named.items():
        if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == before[0]:
            value = _fitted(value, 0, setting.batch)
            along = axis if key == name else 1
            if value.dim() > 1 and value.shape[along] == before[axis]:
                value = _fitted(value, along, setting.input_length)
            value = value.to(device, model.dtype) if value.is_floating_point() else value.to(device)
        fitted[key] = value
    return fitted


def _fitted(tensor: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    index = torch.arange(size, device=tensor.device) % tensor.shape[axis]
    return tensor.index_select(axis, index)


def _named(inputs: Any, name: str) -> Mapping[str, Any]:
    named = inputs if isinstance(inputs, Mapping) else {name: inputs}
    if not isinstance(named.get(name), torch.Tensor):
        raise ValueError(f"inputs of generate() hold the tensor {name!r}; given: {', '.join(map(str, named))}")
    return named


def _length_axis(model: Any, name: str) -> int:
    return -1 if name == "input_features" and hasattr(model.config, "num_mel_bins") else 1


def _random(model: Any, name: str, setting: Setting) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (setting.batch, setting.input_length)
    if name == "input_ids":
        tokens = torch.randint(min(4, model.config.vocab_size - 1), model.config.vocab_size, size, generator=generator)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    bins = getattr(model.config, "input_feat_per_channel", None) or getattr(model.config, "num_mel_bins", None)
    if name != "input_features" or bins is None:
        raise ValueError(f"{type(model).__name__} takes {name}, which cannot be made up: give inputs=")
    shape = (*size, bins) if _length_axis(model, name) == 1 else (size[0], bins, size[1])
    return {"input_features": torch.randn(shape, generator=generator).to(model.dtype)}
