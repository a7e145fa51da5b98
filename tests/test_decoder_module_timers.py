"""Parts of a generation, told by clocks around modules: with a clock that counts calls, exactly."""

import pytest
import torch
import transformers as hub
from torch import nn

import effkit as ek
from effkit.decoder import module_roles, module_timers
from effkit.decoder.generating import prepared, setting_of
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, FFN, OUTPUT, SELF
from effkit.training import evaluating


class Ticks:
    """A clock that goes on by one with every reading."""

    def __init__(self):
        self.now = 0

    def mark(self):
        self.now += 1
        return self.now

    def ns(self, marks):
        return module_timers.np.asarray(marks) - marks[0]


TINY = {"d_model": 32, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "encoder_layers": 2, "decoder_layers": 3,
        "encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 60, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}  # fmt: skip
SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 60,
         "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
MODELS = {
    "speech": lambda: ek.models.speech(hidden=32, encoder_layers=2, decoder_layers=3),
    "text": lambda: ek.models.text(hidden=32, heads=2, layers=3),
    "bart": lambda: hub.BartForConditionalGeneration(hub.BartConfig(**TINY)),
    "whisper": lambda: hub.WhisperForConditionalGeneration(
        hub.WhisperConfig(**TINY | {"vocab_size": 51865}, max_source_positions=50)
    ),
    "t5": lambda: hub.T5ForConditionalGeneration(
        hub.T5Config(d_model=32, d_ff=48, d_kv=16, num_layers=3, num_heads=2, vocab_size=60, decoder_start_token_id=0)
    ),
    "gpt2": lambda: hub.GPT2LMHeadModel(
        hub.GPT2Config(n_embd=32, n_layer=3, n_head=2, vocab_size=60, bos_token_id=1, eos_token_id=2)
    ),
    "mixtral": lambda: hub.MixtralForCausalLM(hub.MixtralConfig(**SMALL, num_local_experts=2)),
    "qwen": lambda: hub.Qwen2ForCausalLM(hub.Qwen2Config(**SMALL)),
}


def watched(model, num_steps=4, clock=None, **changes):
    setting = setting_of(model, num_steps=num_steps, **changes)
    ready = prepared(model, None, setting)
    with evaluating(ready.model):
        return module_timers.watch(ready.model, ready.call, clock)


@pytest.mark.parametrize("name", MODELS)
def test_the_parts_of_every_step_sum_to_the_whole(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    seen = watched(model)
    coded = model.config.is_encoder_decoder
    assert len(seen.steps) == 4
    assert list(seen.steps.columns) == list(module_timers.OF_STEP)
    assert seen.wall_ns == seen.encoder_ns + int(seen.steps.to_numpy().sum()) + seen.start_ns
    assert seen.start_ns > 0
    assert (seen.encoder_ns > seen.encoder_layers_ns > 0) is coded
    parts = {SELF, FFN, OUTPUT, EMBEDDING} | ({CROSS} if coded else set())
    assert (seen.steps[list(parts)] > 0).all(axis=None), "every step has every part"
    assert (seen.steps >= 0).all(axis=None)
    assert seen.steps[BETWEEN].iloc[0] == 0
    assert (seen.steps[BETWEEN].iloc[1:] > 0).all()


@pytest.mark.parametrize("name", ["speech", "bart", "whisper", "t5"])
def test_keys_and_values_of_cross_attention_are_computed_once(name):
    seen = watched(MODELS[name]())
    assert seen.steps[CROSS_KV].iloc[0] > 0
    assert (seen.steps[CROSS_KV].iloc[1:] == 0).all()


def test_each_layer_has_its_own_clock():
    """A clock that ticks at every reading counts the readings inside: two for each module inside a part."""
    model = MODELS["speech"]()
    three = watched(model, clock=Ticks()).steps.iloc[1]
    six = watched(model, clock=Ticks(), decoder_layers=6).steps.iloc[1]
    for part in (SELF, CROSS, FFN):
        assert six[part] == 2 * three[part] > 0
    assert six[OUTPUT] == three[OUTPUT]
    # fc1 and fc2 are one span: from the begin of the first to the end of the second
    assert three[FFN] == 3 * three[SELF]


def test_the_model_is_given_back_as_it_was():
    model = MODELS["text"]()
    own = model.model.layers[0].mlp.forward
    model.model.layers[0].mlp.forward = own  # somebody else's wrapper
    watched(model)
    assert model.model.layers[0].mlp.__dict__["forward"] is own
    assert sum("forward" in module.__dict__ for module in model.modules()) == 1


def test_a_generation_that_fails_leaves_no_clocks_behind():
    model = MODELS["text"]()

    def fail():
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        module_timers.watch(model, fail)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_generation_of_another_model_is_refused():
    with pytest.raises(ValueError, match="never ran the model"):
        module_timers.watch(MODELS["text"](), lambda: None)


def test_a_model_without_layers_is_refused():
    model = MODELS["text"]()
    model.model.layers = nn.Sequential(*model.model.layers)
    with pytest.raises(ValueError, match="no list of like decoder layers"):
        module_roles.layers(model)
