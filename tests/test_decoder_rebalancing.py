"""Layers moved from decoder to encoder at as many parameters, counted again on real models."""

import warnings
from operator import attrgetter

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    CanaryConfig,
    CompileConfig,
    EncoderDecoderConfig,
    FSMTConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MarianConfig,
    MoonshineConfig,
    PreTrainedConfig,
    Speech2TextConfig,
    Speech2TextForConditionalGeneration,
    SwitchTransformersConfig,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from effkit import models
from effkit.decoder import module_roles
from effkit.decoder.configurations import changed, sizes
from effkit.decoder.rebalancing import model_class, parameters, rebalance, static_decoding

WIDE = {"d_model": 64, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256, "vocab_size": 100}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
CONFIGS = {
    "whisper": WhisperConfig(encoder_layers=24, decoder_layers=24, pad_token_id=0, **WIDE, **HEADS),
    "speech": Speech2TextConfig(encoder_layers=24, decoder_layers=24, conv_channels=64, **WIDE, **HEADS),
    "bart": BartConfig(encoder_layers=24, decoder_layers=24, **WIDE, **HEADS),
    "marian": MarianConfig(encoder_layers=24, decoder_layers=24, pad_token_id=0, **WIDE, **HEADS),
    "t5": T5Config(num_layers=24, num_decoder_layers=24, d_model=64, d_kv=32, num_heads=2, d_ff=256, vocab_size=100),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def real_parameters(config):
    return sum(parameter.numel() for parameter in model_class(config)(config).parameters())


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_model(name):
    config = CONFIGS[name]
    assert parameters(config, 3, 2) == real_parameters(rebalanced_to(config, 3, 2))
    assert parameters(config) == parameters(config, 24, 24)
    assert parameters(config, decoder_layers=23) < parameters(config) < parameters(config, encoder_layers=25)


def rebalanced_to(config, encoder_layers, decoder_layers):
    return changed(config, encoder_layers=encoder_layers, decoder_layers=decoder_layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_rebalanced_is_the_nearest_number_of_encoder_layers(name):
    config = CONFIGS[name]
    before = config.to_dict()
    moved = rebalance(config, 4)
    assert type(moved) is type(config)
    assert config.to_dict() == before
    assert sizes(moved).decoder_layers == 4
    num, budget = sizes(moved).encoder_layers, parameters(config)
    assert num > 24 + 20  # a decoder layer also has cross-attention
    off = [abs(parameters(config, other, 4) - budget) for other in (num - 1, num, num + 1)]
    assert min(off) == off[1]
    assert off[1] / budget <= 0.02
    model = model_class(moved)(moved)
    assert len(module_roles.layers(model)) == 4
    assert sum(parameter.numel() for parameter in model.parameters()) - budget in (off[1], -off[1])
    # what was not asked for stays: of the two numbers of layers and their aliases, only
    other = {key for key, value in moved.to_dict().items() if before.get(key) != value}
    assert other <= {"encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers", "num_hidden_layers"}


def test_at_its_own_depth_nothing_changes():
    for config in CONFIGS.values():
        assert rebalance(config, 24).to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("config", "encoder", "decoder"),
    [
        (FSMTConfig(src_vocab_size=50, tgt_vocab_size=50), "encoder_layers", "decoder_layers"),
        (MoonshineConfig(), "encoder_num_hidden_layers", "decoder_num_hidden_layers"),
        (EncoderDecoderConfig(encoder=BertConfig().to_dict(),
                              decoder=BertConfig(is_decoder=True, add_cross_attention=True).to_dict()),
         "encoder.num_hidden_layers", "decoder.num_hidden_layers"),
    ],
)  # fmt: skip
def test_other_families(config, encoder, decoder):
    moved = rebalance(config, 2)
    assert attrgetter(decoder)(moved) == 2
    assert attrgetter(encoder)(moved) > attrgetter(encoder)(config)
    assert parameters(moved) == pytest.approx(parameters(config), rel=0.02)


def test_canary_itself():
    """24/24 has 1.03 billion parameters; 32/4, as published, an eighth fewer, so that 37 layers would have fitted."""
    config = CanaryConfig()
    balanced, flash = parameters(config, 24, 24), parameters(config, 32, 4)
    assert balanced / 1e9 == pytest.approx(1.029, abs=0.0005)
    # the card of canary-1b-flash says 883 million, with a smaller vocabulary than this configuration's
    assert flash / 1e6 == pytest.approx(895, abs=0.5)
    config.encoder_config.num_hidden_layers = config.decoder_config.num_hidden_layers = 24
    moved = rebalance(config, 4)
    assert (moved.encoder_config.num_hidden_layers, moved.decoder_config.num_hidden_layers) == (37, 4)
    assert config.encoder_config.num_hidden_layers == 24
    assert parameters(moved) == pytest.approx(balanced, rel=0.01)


def test_live_models_and_classes():
    model = models.speech(encoder_layers=6, decoder_layers=6, hidden=32, vocabulary=50, device="cpu")
    assert parameters(model.config) == sum(parameter.numel() for parameter in model.parameters())
    assert rebalance(model.config, 2, tolerance_frac=1.0).encoder_layers == 11
    expected = {
        "whisper": WhisperForConditionalGeneration, "speech": Speech2TextForConditionalGeneration,
        "bart": BartForConditionalGeneration, "t5": T5ForConditionalGeneration,
    }  # fmt: skip
    assert {name: model_class(CONFIGS[name]) for name in expected} == expected
    assert model_class(LlamaConfig()) is LlamaForCausalLM


def test_far_from_the_budget_it_warns_and_does_not_raise():
    config = rebalanced_to(CONFIGS["bart"], 2, 2)
    with pytest.warns(UserWarning, match=r"3 encoder layers beside 1 decoder layers come nearest, with -4\.\d%"):
        moved = rebalance(config, 1, tolerance_frac=0.0)
    assert (moved.encoder_layers, moved.decoder_layers) == (3, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rebalance(config, 1, tolerance_frac=0.5)


@pytest.mark.parametrize(
    ("config", "decoder_layers", "sentence"),
    [
        (LlamaConfig(), 2, "config is a LlamaConfig, expected an encoder-decoder's"),
        (CONFIGS["bart"], 0, "decoder_layers is 0, expected at least 1"),
        (CONFIGS["bart"], 60, "decoder_layers=60 leave no encoder layer .* take at most 41"),
        (SwitchTransformersConfig(num_layers=4, d_model=32, d_ff=32, num_heads=2, d_kv=16, vocab_size=50), 2,
         "whose layers differ in size"),
        (PreTrainedConfig(is_encoder_decoder=True), 2, "its sizes are not known here"),
    ],
)  # fmt: skip
def test_what_cannot_be_rebalanced(config, decoder_layers, sentence):
    with pytest.raises(ValueError, match=sentence):
        rebalance(config, decoder_layers)


def test_the_most_decoder_layers_named_in_the_error_are_possible():
    config = CONFIGS["bart"]
    most = 41
    assert rebalance(config, most, tolerance_frac=1.0).encoder_layers >= 1
    with pytest.raises(ValueError, match=f"take at most {most}"):
        rebalance(config, most + 1)


def test_models_that_write_no_text_have_no_class():
    with pytest.raises(ValueError, match="config is a ViTConfig, expected that of a model that generates text"):
        model_class(ViTConfig())


def test_static_decoding_writes_the_same_text_through_a_compiled_step():
    model = models.text(layers=2, hidden=32, heads=2, vocabulary=50, device="cpu").eval()
    tokens = torch.randint(50, (1, 7), generator=torch.Generator().manual_seed(0))
    given = {
        "attention_mask": torch.ones_like(tokens), "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False,
        "pad_token_id": 0, "return_dict_in_generate": True,
    }  # fmt: skip
    plain = model.generate(tokens, use_cache=True, **given)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    config = CompileConfig(backend=backend, mode=None)
    config._compile_all_devices = True  # transformers compiles on GPUs only unless told so
    static = model.generate(tokens, **given, **static_decoding(config))
    assert torch.equal(static.sequences, plain.sequences)
    assert type(static.past_key_values).__name__ == "StaticCache"
    assert graphs
    assert static_decoding()["compile_config"].backend == "inductor"
    num = len(graphs)
    uncompiled = model.generate(tokens, **given, **static_decoding())
    assert torch.equal(uncompiled.sequences, plain.sequences)
    assert len(graphs) == num
