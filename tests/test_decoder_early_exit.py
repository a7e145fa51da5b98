"""Early exits: a model cut to a depth is the smaller model, and whole again afterwards."""

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
from effkit.decoder.early_exit import exit_at
from effkit.decoder.module_roles import layers

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
    with exit_at(whole, 2):
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
    with exit_at(whole, 1):
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
        with exit_at(model, 1):
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
    with pytest.raises(ValueError, match=f"depth is {depth}, expected 1 to {len(layers(model))}"):
        exit_at(model, depth).__enter__()
