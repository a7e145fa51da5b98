"""Depth exits: one model at several depths, restored afterwards; trained for all of them or for one."""

import copy

import pytest
import torch
from transformers import (
    CanaryConfig,
    CanaryForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from effkit import models
from effkit.decoder import nesting

pytestmark = pytest.mark.usefixtures("one_thread")


def text(**sizes):
    return models.text(**{"layers": 4, "hidden": 32, "heads": 2, "vocabulary": 60, "device": "cpu", **sizes}).eval()


def speech(**sizes):
    given = {"encoder_layers": 3, "decoder_layers": 2, "hidden": 32, "vocabulary": 60, "device": "cpu", **sizes}
    return models.speech(**given).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "num_heads": 2, "d_ff": 64, "vocab_size": 60}
    config = T5Config(num_layers=3, num_decoder_layers=3, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config).eval()


def qwen():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    return Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=3, vocab_size=60, **sizes)).eval()


def canary():
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    encoder = {**sizes, "model_type": "parakeet_encoder", "subsampling_conv_channels": 16}
    decoder = {**sizes, "vocab_size": 60, "num_key_value_heads": 2, "head_dim": 16}
    config = CanaryConfig(vocab_size=60, encoder_config=encoder, decoder_config=decoder)
    return CanaryForConditionalGeneration(config).eval()


def generated(model, **keywords):
    inputs = model.random_batch(2, 32)
    inputs.pop("labels")
    with torch.no_grad():
        return model.generate(
            **inputs, attention_mask=torch.ones(2, 32, dtype=torch.long), max_new_tokens=6, min_new_tokens=6,
            do_sample=False, pad_token_id=1, return_dict_in_generate=True, **keywords,
        )  # fmt: skip


@pytest.mark.parametrize(
    "cache", [{"use_cache": False}, {"use_cache": True}, {"use_cache": True, "cache_implementation": "static"}]
)
def test_a_cut_text_model_is_the_model_built_with_fewer_layers(cache):
    whole, small = text(), text(layers=2)
    small.load_state_dict({name: whole.state_dict()[name] for name in small.state_dict()})
    with nesting.exit_at(whole, 2):
        assert torch.equal(whole(**whole.random_batch(1, 9)).logits, small(**small.random_batch(1, 9)).logits)
        cut = generated(whole, **cache)
    assert torch.equal(cut.sequences, generated(small, **cache).sequences)
    assert not torch.equal(cut.sequences, generated(whole, **cache).sequences)
    if cache["use_cache"]:
        assert len(cut.past_key_values.layers) == 2


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_cut_speech_model_keeps_its_encoder(use_cache):
    whole, small = speech(), speech(decoder_layers=1)
    small.load_state_dict({name: whole.state_dict()[name] for name in small.state_dict()})
    with nesting.exit_at(whole, 1):
        assert torch.equal(whole(**whole.random_batch(1, 32)).logits, small(**small.random_batch(1, 32)).logits)
        cut = generated(whole, use_cache=use_cache)
        assert len(whole.get_encoder().layers) == 3
    assert torch.equal(cut.sequences, generated(small, use_cache=use_cache).sequences)
    assert not use_cache or len(cut.past_key_values.self_attention_cache.layers) == 1


@pytest.mark.parametrize("make", [text, speech, t5, qwen, canary])
def test_everything_is_restored_also_after_an_error(make):
    model = make()
    modules, configuration = list(model.modules()), copy.deepcopy(model.config.to_dict())
    names = [name for name, _ in model.named_parameters()]

    def stopped():
        with nesting.exit_at(model, 1):
            assert len(list(model.parameters())) < len(names)
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        stopped()
    assert [name for name, _ in model.named_parameters()] == names
    assert all(one is other for one, other in zip(model.modules(), modules, strict=True))
    assert model.config.to_dict() == configuration


@pytest.mark.parametrize(("make", "depth"), [(text, 0), (text, 5), (speech, 3)])
def test_depths_that_are_not_there(make, depth):
    model = make()
    with pytest.raises(ValueError, match=f"depth is {depth}, expected 1 to {len(nesting.layers(model))}"):
        nesting.exit_at(model, depth).__enter__()
    with pytest.raises(ValueError, match="the decoder layers of this"):
        nesting.exits(model, [depth])


def test_exits_count_the_bytes_that_a_depth_uses():
    model = text()
    table = nesting.exits(model, batch=2, input_length=10, num_steps=4, repeats=1)
    assert table.index.tolist() == [1, 2, 3, 4]
    # keys and values of 10 + 4 - 1 tokens (the last is never read), 32 wide, 4 bytes each, two rows
    assert table["cache_bytes"].tolist() == [depth * 2 * 2 * 13 * 32 * 4 for depth in (1, 2, 3, 4)]
    layer_bytes = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert table["weight_bytes"].diff().dropna().unique().tolist() == [layer_bytes]
    assert table["weight_bytes"][4] == sum(parameter.nbytes for parameter in model.parameters())
    assert table["agreement_frac"][4] == 1
    assert table["agreement_frac"].between(0, 1).all()
    assert table["agreement_frac"][1] < 1
    assert (table["token_ns"] > 0).all()
    assert not model.training


def test_exits_of_encoder_decoders():
    model = speech()
    model.train()
    table = nesting.exits(model, [1, 2], input_length=32, num_steps=5, repeats=1)
    # of each layer: 5 tokens (the first starts it, the last is never read), and 32 / 4 cells that the encoder made
    assert table["cache_bytes"].tolist() == [depth * 2 * (5 + 8) * 32 * 4 for depth in (1, 2)]
    assert table["agreement_frac"][2] == 1
    assert model.training
    assert nesting.exits(t5(), [1, 3], input_length=8, num_steps=3, repeats=1)["agreement_frac"][3] == 1


def test_fewer_layers_take_less_time():
    table = nesting.exits(text(layers=12), [1, 12], input_length=8, num_steps=10, repeats=3)
    assert table["token_ns"][1] * 2 < table["token_ns"][12]  # about 8 in fact


def test_nested_training_makes_all_depths_usable():
    table = nesting.train_nested(num_steps=60)
    assert table.index.tolist() == [1, 2, 3, 4]
    cut = table.loc[:3]
    assert (cut["nested_loss"] < 0.95 * cut["full_only_loss"]).all()
    assert table["full_only_loss"].is_monotonic_decreasing
    whole = table["full_only_loss"][4]
    assert table["full_only_loss"][1] > 1.3 * whole
    assert table["nested_loss"][1] < 1.3 * whole
    assert table["full_only_loss"][4] < table.attrs["guessing_loss"] / 2  # it did learn


def test_nested_training_repeats_and_trains_the_given_model():
    tables = []
    for _ in range(2):
        model = text()
        before = model.lm_head.weight.clone()
        tables.append(nesting.train_nested(model, [1, 4], num_steps=3, seed=1))
        assert not torch.equal(model.lm_head.weight, before)
    assert tables[0].equals(tables[1])
    assert tables[0].index.tolist() == [1, 4]
    with pytest.raises(ValueError, match="expected a decoder-only language model"):
        nesting.train_nested(speech())


def test_models_without_input_are_refused():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=60, pad_token_id=0, **sizes)
    with pytest.raises(ValueError, match="takes input_features, expected tokens"):
        nesting.exits(WhisperForConditionalGeneration(config))
    with pytest.raises(ValueError, match="expected at least 1 each"):
        nesting.exits(text(), num_steps=0)
