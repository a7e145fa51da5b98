"""Bytes of weights and of the key-value cache: the formulas against models that are built and caches that are left."""

import pytest
import torch
import transformers as hub
from test_decoder_module_timers import MODELS, SMALL, TINY

import effkit as ek
from effkit import decoder
from effkit.decoder import configurations, memory, module_roles
from effkit.decoder.generating import prepared, setting_of
from effkit.decoder.memory import CacheBytes, Memory, halvings, in_cache, kv_cache_bytes

pytestmark = pytest.mark.usefixtures("one_thread")


def weights_of(model):
    return sum(parameter.nbytes for parameter in model.parameters())


def memory_of(model, halved=None):
    return Memory(type(model), model.config, 1, halved)


def left_by(model, **changes):
    """The setting, and the cache that one generation leaves."""
    setting = setting_of(model, **changes)
    ready = prepared(model, None, setting)
    ready.model.eval()
    return setting, in_cache(ready.call().past_key_values)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("encoder_layers", "decoder_layers"), [(1, 3), (7, 1)])
def test_weights_are_those_of_a_model_that_is_built_so(name, encoder_layers, decoder_layers):
    model = MODELS[name]()
    coded = model.config.is_encoder_decoder
    setting = setting_of(model).change(decoder_layers=decoder_layers, encoder_layers=coded * encoder_layers)
    sizes = {"encoder_layers": encoder_layers} if coded else {}
    built = type(model)(configurations.changed(model.config, decoder_layers=decoder_layers, **sizes))
    assert memory_of(model).weight_bytes(setting) == weights_of(built)


@pytest.mark.parametrize("name", ["speech", "text", "bart", "t5", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_another_width_and_type(name, dtype):
    model = MODELS[name]()
    setting = setting_of(model).change(width=64, dtype=dtype)
    config = configurations.changed(model.config, width=64)
    counted = memory_of(model)
    assert counted.weight_bytes(setting) == weights_of(type(model)(config).to(getattr(torch, dtype)))
    times = 8 if dtype == "float32" else 4
    assert counted.weight_bytes(setting.change(weight_bits=4)) * times == counted.weight_bytes(setting)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_weights_and_cache_of_grouped_heads(kv_heads):
    model = ek.models.text(hidden=64, heads=4, layers=2)
    setting, left = left_by(model, num_steps=5, input_length=7, batch=3, kv_heads=kv_heads)
    built = ek.models.text(hidden=64, heads=4, layers=2, kv_heads=kv_heads)
    counted = memory_of(model)
    assert counted.weight_bytes(setting) == weights_of(built)
    assert left == counted.cache(setting) == CacheBytes(2 * 2 * 3 * (7 + 4) * 16 * kv_heads * 4, 0)


@pytest.mark.parametrize(
    "changes",
    [  # lengths around those at which a convolution that halves rounds
        {"input_length": 37, "num_steps": 3},
        {"input_length": 38, "num_steps": 1},
        {"input_length": 39, "batch": 3, "num_steps": 6},
        {"input_length": 41, "num_beams": 3, "num_steps": 4},
        {"input_length": 43, "exit_layer": 2, "num_steps": 4},
        {"input_length": 44, "dtype": "bfloat16", "batch": 2, "num_beams": 2, "num_steps": 5},
        {"input_length": 45, "width": 64, "decoder_layers": 2, "num_steps": 4},
        {"input_length": 46, "cache": "off", "num_steps": 3},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["speech", "text"])
def test_the_cache_is_the_one_that_generation_leaves(name, changes):
    model = MODELS[name]()
    setting, left = left_by(model, **changes)
    assert memory_of(model, 2 if name == "speech" else None).cache(setting) == left
    assert (left.self_attention > 0) is (changes.get("cache") != "off")
    assert (left.cross_attention > 0) is (name == "speech" and changes.get("cache") != "off")


@pytest.mark.parametrize("name", ["bart", "whisper", "t5", "gpt2", "mixtral", "qwen"])
@pytest.mark.parametrize("rows", [{"batch": 3}, {"num_beams": 2}])
def test_caches_of_other_models(name, rows):
    model = MODELS[name]()
    setting, left = left_by(model, num_steps=4, **rows)
    known = Memory(type(model), model.config, 1, int(name == "whisper")).cache(setting)
    if name == "whisper" and "num_beams" in rows:  # whose generate() gives back the chosen beams' part of it
        left = CacheBytes(2 * left.self_attention, 2 * left.cross_attention)
    assert known == left
    assert left.self_attention > 0


def test_a_decoder_deeper_than_its_encoder_has_a_cache_for_every_layer():
    """transformers counts the layers of T5's cache by its encoder's."""
    model = MODELS["t5"]()
    for encoder_layers, decoder_layers in ((1, 3), (2, 5), (4, 2)):
        setting, left = left_by(model, num_steps=4, encoder_layers=encoder_layers, decoder_layers=decoder_layers)
        assert left == Memory(type(model), model.config, 1, 0).cache(setting)


@pytest.mark.parametrize("name", ["speech", "text", "whisper"])
def test_what_measuring_finds_is_what_predicting_says(name):
    model = MODELS[name]()
    base = decoder.measure(model, num_steps=4, repeats=1)
    for changes in ({"batch": 3}, {"num_steps": 7, "exit_layer": 1}, {"decoder_layers": 2, "dtype": "bfloat16"},
                    *([{"input_length": 23}] if name != "whisper" else [])):  # fmt: skip
        guess = decoder.predict(base, **changes)
        found = decoder.measure(model, base=base, repeats=1, **changes)
        receipt = ek.Receipt(guess, found).frame
        exact = receipt[receipt["unit"] == "bytes"]
        assert len(exact) == 2
        assert (exact["error"] == 0).all(), (changes, receipt)
        assert (exact["measured"] > 0).all()


def test_the_cells_of_an_encoder_are_found_with_an_exit_too():
    model = MODELS["speech"]()
    base = decoder.measure(model, num_steps=4, repeats=1, exit_layer=1, input_length=45)
    assert base.calibration.memory.halvings == 2
    guess = decoder.predict(base, num_steps=6)
    cache = guess.companion("Key-value cache")
    assert cache.total == sum(left_by(model, num_steps=6, exit_layer=1, input_length=45)[1])


def test_a_published_cache():
    # Llama 2 7B: 0.5 MiB per token in half precision; 70B shares 8 heads among 64
    seven = kv_cache_bytes(hub.LlamaConfig(), 1, 1, dtype="float16")
    assert seven == CacheBytes(2**19, 0)
    seventy = hub.LlamaConfig(hidden_size=8192, num_hidden_layers=80, num_attention_heads=64, num_key_value_heads=8)
    assert kv_cache_bytes(seventy, 1, 1, dtype="float16").self_attention == 2 * 80 * 8 * 128 * 2


def test_cross_attention_holds_the_encoders_cells_for_all_heads():
    config = hub.BartConfig(**TINY)
    assert kv_cache_bytes(config, 2, 5, encoder_cells=7) == CacheBytes(2 * 3 * 2 * 5 * 32 * 4, 2 * 3 * 2 * 7 * 32 * 4)
    alone = hub.Qwen2Config(**SMALL)
    assert kv_cache_bytes(alone, 2, 5, encoder_cells=7).cross_attention == 0, "it has none"


@pytest.mark.parametrize(("cells", "number"), [(37, 0), (19, 1), (10, 2), (5, 3), (11, None), (9, None), (38, None)])
def test_how_often_an_input_is_halved(cells, number):
    assert halvings(37, cells) == number
    if number is not None:
        assert Memory(object, None, 1, number).encoder_cells(37) == cells


def test_a_token_meets_only_the_experts_that_it_is_sent_to():
    one, four = (
        memory.count(hub.MixtralForCausalLM, hub.MixtralConfig(**SMALL, num_local_experts=n, num_experts_per_tok=1))
        for n in (1, 4)
    )
    expert = 3 * 32 * 48
    assert one.of_part[module_roles.FFN] == expert + 32, "its matrices, and a row of the router"
    assert four.of_part[module_roles.FFN] == expert + 4 * 32
    assert four.per_decoder_layer - one.per_decoder_layer == 3 * expert + 3 * 32, "memory holds all of them"


def test_parts_of_a_layer_and_what_a_step_reads():
    model = MODELS["speech"]()
    known = memory_of(model, 2)
    parts = known.parameters(setting_of(model)).of_part
    layer = model.model.decoder.layers[0]
    attention = sum(parameter.numel() for parameter in layer.self_attn.parameters())
    assert parts[module_roles.SELF] == attention == 4 * (32 * 32 + 32)
    assert parts[module_roles.CROSS_KV] == parts[module_roles.CROSS] == attention // 2
    assert parts[module_roles.FFN] == sum(p.numel() for one in (layer.fc1, layer.fc2) for p in one.parameters())
    setting = setting_of(model, input_length=40, num_steps=3)
    # three layers of 2.5 parts and the output; keys and values of 1, 2, 3 cells so far: 2 on average; 10 encoder cells
    weights = 3 * (parts[module_roles.SELF] * 3 // 2 + parts[module_roles.FFN]) + parts[module_roles.OUTPUT]
    assert known.step_size(setting) == memory.StepSize(1, 4 * (weights + 2 * 3 * 32 * (2 + 10)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch": 0}, "batch >= 1 and lengths >= 0; given: 0, 5, 0"),
        ({"length": -1}, "given: 1, -1, 0"),
        ({"encoder_cells": -2}, "given: 1, 5, -2"),
        ({"dtype": "int8"}, "dtype is one of float32, bfloat16, float16; given: 'int8'"),
    ],
)
def test_caches_that_cannot_be_are_refused_in_words(changes, message):
    with pytest.raises(ValueError, match=message):
        kv_cache_bytes(**{"config": hub.BartConfig(**TINY), "batch": 1, "length": 5} | changes)


def test_sizes_that_cannot_be_are_refused_in_words():
    text, speech = MODELS["text"](), MODELS["speech"]()
    with pytest.raises(ValueError, match="encoder_layers=3 needs an encoder-decoder; LlamaConfig is decoder-only"):
        configurations.changed(text.config, encoder_layers=3)
    known = memory_of(speech).parameters(setting_of(speech))
    with pytest.raises(ValueError, match=r"decoder_layers=50 leave no encoder layer in .* parameters; take at most 4"):
        known.encoder_layers_for(known.total(2, 3), 50)
    assert known.encoder_layers_for(known.total(2, 3), 4) == 1
    with pytest.raises(ValueError, match=r"ResNetConfig has none of d_model, .*: its sizes are not known here"):
        configurations.sizes(hub.ResNetConfig())
