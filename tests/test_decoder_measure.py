"""measure() of live tiny models: rows near the wall time, exact counts, and a model that comes back as it was."""

import copy

import numpy as np
import pytest
import torch
import transformers as hub
from moments import at_a_quiet_moment
from test_decoder_module_timers import MODELS

import effkit as ek
from effkit import decoder
from effkit.decoder.costs import PREFILL
from effkit.decoder.generating import make_inputs, prepared, setting_of
from effkit.decoder.module_roles import CROSS, CROSS_KV, ENCODER, FFN, OUTPUT, SELF

QUICK = {"num_steps": 4, "repeats": 1, "calibrated": False}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def speech():
    return ek.models.speech(hidden=32, encoder_layers=2, decoder_layers=3)


@pytest.fixture(scope="module")
def text():
    return ek.models.text(hidden=32, heads=2, layers=3)


@pytest.fixture(scope="module")
def base(text):
    return decoder.measure(text, num_steps=6, repeats=3)


def companions(account):
    return {one.title: one for one in account.companions}


@pytest.mark.parametrize("name", ["speech", "text"])
def test_rows_explain_the_wall_time_and_the_source_says_what_clocks_cost(name):
    def measured():
        return decoder.measure(MODELS[name](), num_steps=8, repeats=4, calibrated=False)

    account = at_a_quiet_moment(measured, lambda account: abs(account.residual) < 0.3 * account.total)
    assert abs(account.residual) < 0.3 * account.total, account
    assert (account.frame["value"] > 0).all()
    assert set(account.frame["basis"]) == {"measured"}
    coded = {ENCODER, CROSS_KV, CROSS} if name == "speech" else {PREFILL}
    assert {SELF, FFN, OUTPUT, "sampling and host"} | coded <= set(account.frame.index)
    number = len(account.calibration.observed.plain_ns)
    assert number > 4, "the one without clocks is run between those with them"
    assert f"the wall clock of {number} generations without clocks inside; clocks inside cost " in account.source
    beside = companions(account)
    assert beside["Time per token"].total == pytest.approx(account.total / 8, abs=1)
    assert beside["Tokens per second"].total == pytest.approx(8e9 / account.total, abs=1)
    assert beside["Prefill and decode"].total == account.frame["value"].sum()
    assert ("Real-time factor" in beside) is (name == "speech")
    assert not account.predicted


def test_the_model_comes_back_as_it_was(text):
    text.train()
    text.model.layers[1].eval()
    text.model.norm.forward = own = text.model.norm.forward
    modes = {name: module.training for name, module in text.named_modules()}
    before, how, config = copy.deepcopy(text.state_dict()), text.generation_config.to_dict(), text.config.to_dict()
    drawn = torch.get_rng_state()
    decoder.measure(text, num_steps=3, repeats=1, exit_layer=2)
    decoder.measure(text, num_beams=2, dtype="bfloat16", kv_heads=1, **QUICK)
    assert {name: module.training for name, module in text.named_modules()} == modes
    assert text.generation_config.to_dict() == how
    assert text.config.to_dict() == config
    assert all(torch.equal(value, before[name]) for name, value in text.state_dict().items())
    assert [name for name, module in text.named_modules() if "forward" in module.__dict__] == ["model.norm"]
    assert text.model.norm.__dict__.pop("forward") is own
    assert torch.equal(torch.get_rng_state(), drawn), "and so does chance"
    text.train()


def test_inputs_are_brought_to_batch_and_length(speech, text):
    given = {"input_features": torch.arange(12.0).reshape(2, 6, 1).expand(2, 6, 80), "attention_mask": torch.ones(2, 6)}
    made = make_inputs(speech, given, setting_of(speech, given, batch=3, input_length=8))
    assert made["input_features"].shape == (3, 8, 80)
    assert made["input_features"][:, :, 0].tolist() == [[*range(6), 0, 1], [*range(6, 12), 6, 7], [*range(6), 0, 1]]
    assert made["attention_mask"].shape == (3, 8)
    tokens = torch.arange(20).reshape(2, 10)
    assert setting_of(text, tokens).input_length == 10, "as it is given"
    assert make_inputs(text, tokens, setting_of(text, tokens, input_length=4))["input_ids"].tolist() == [[0, 1, 2, 3]]
    whisper = MODELS["whisper"]()
    sound = torch.randn(1, 80, 100)
    assert setting_of(whisper, sound).input_length == 100, "its last axis"
    assert make_inputs(whisper, sound, setting_of(whisper, sound, batch=2))["input_features"].shape == (2, 80, 100)


@pytest.mark.parametrize("given", ["tensor", "dict", "nothing"])
def test_a_measurement_says_what_it_was_given(text, given):
    tokens = torch.randint(4, 1000, (2, 9))
    inputs = {"tensor": tokens, "dict": {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}}.get(given)
    account = decoder.measure(text, inputs, batch=3, **QUICK)
    assert account.setting["batch"] == 3
    assert account.setting["input_length"] == (32 if given == "nothing" else 9)
    cells = account.setting["input_length"] + 3
    assert account.companion("Key-value cache").total == 2 * 3 * 3 * cells * 32 * 4


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_layers": 2},
        {"width": 64},
        {"cache": "off"},
        {"num_beams": 3},
        {"exit_layer": 1},
        {"dtype": "bfloat16"},
        {"batch": 2, "num_steps": 7},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["speech", "text"])
def test_other_settings_make_as_many_tokens_as_are_asked_for(name, changes):
    model = MODELS[name]()
    setting = setting_of(model, **{"num_steps": 5} | changes)
    made = prepared(model, None, setting).call().sequences
    prompt = 1 if name == "speech" else 32
    assert made.shape == (setting.batch, prompt + setting.num_steps)
    account = decoder.measure(model, repeats=1, calibrated=False, **{"num_steps": 5} | changes)
    assert account.setting == setting.plain()
    assert len(decoder.positions(account)) == setting.num_steps
    weights = account.companion("Weights").total
    kept = {"cache", "num_beams", "exit_layer", "batch"} & set(changes)
    assert (weights == sum(parameter.nbytes for parameter in model.parameters())) is bool(kept)


def test_a_cheaper_decoder_is_measured_as_cheaper():
    model = ek.models.text(hidden=32, heads=2, layers=12)
    base = decoder.measure(model, num_steps=6, repeats=2)
    less = decoder.measure(model, base=base, exit_layer=2, repeats=2)
    assert less.total < 0.7 * base.total
    assert less.frame.loc[SELF, "value"] < 0.4 * base.frame.loc[SELF, "value"]


def test_relative_to_a_base_what_is_not_given_stays(text, base):
    found = decoder.measure(text, base=base, batch=2, repeats=2)
    assert found.setting == base.setting | {"batch": 2}
    assert "relative to the base measured in turn" in found.source
    assert 0.3 < found.total / base.total < 3
    doubled = decoder.measure(text, base=copy.copy(base).__class__(**vars(base) | {"total": 10 * base.total}), batch=2)
    assert 4 < doubled.total / found.total < 25, "ten times the base's time is ten times the setting's"
    assert decoder.predict(found) is found, "at rest a prediction is what was measured"
    assert decoder.predict(found, batch=4).setting == found.setting | {"batch": 4}
    back = decoder.predict(found, batch=base.setting["batch"])
    assert back.low <= base.total * found.total / decoder.predict(base, batch=2).total <= back.high
    with pytest.raises(ValueError, match=r"give what measure\(\) returned without base="):
        decoder.roofline(found)


def test_without_calibration_nothing_can_be_predicted(text):
    account = decoder.measure(text, **QUICK)
    with pytest.raises(ValueError, match=r"carries no calibration; decoder\.measure\(\) makes one that does"):
        decoder.predict(account, batch=2)
    with pytest.raises(ValueError, match="carries no calibration"):
        decoder.measure(text, base=account)


def test_progress_counts_up_to_its_total_and_may_stop(text):
    seen = []
    decoder.measure(text, num_steps=3, repeats=2, progress=lambda *told: seen.append(told))
    assert seen == [(done, 48) for done in range(1, 49)], "sixteen settings, once untimed and twice timed"

    class Stop(Exception):
        pass

    def stop(done, total):
        if done == 6:
            raise Stop

    text.train()
    for changes in ({}, {"exit_layer": 1}):
        with pytest.raises(Stop):
            decoder.measure(text, num_steps=3, repeats=2, progress=stop, **changes)
        assert all(module.training for module in text.modules())
        assert not any("forward" in module.__dict__ for module in text.modules())
        assert len(text.model.layers) == text.config.num_hidden_layers == 3


def test_a_plain_step_is_called_token_by_token():
    called = []

    def step(token, cache):
        called.append((token, cache))
        return token + 1, (cache or 0) + 10

    told = []
    account = decoder.measure(step, 5, num_steps=4, batch=3, repeats=2, progress=lambda *one: told.append(one))
    assert called == 3 * [(5, None), (6, 10), (7, 20), (8, 30)]
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert list(account.frame.index) == ["first step", "later steps"]
    assert account.setting == {"num_steps": 4, "batch": 3}
    assert account.companion("Tokens per second").total == pytest.approx(12e9 / account.total, abs=1)
    assert len(decoder.positions(account)) == 4
    with pytest.raises(ValueError, match="carries no calibration"):
        decoder.predict(account, batch=2)


def test_positions_hold_the_prefill_in_the_first(base):
    table = decoder.positions(base)
    assert table.index.tolist() == [*range(1, 7)]
    assert table.index.name == "token"
    long = decoder.measure(ek.models.text(hidden=64, heads=2, layers=2), input_length=400, **QUICK)
    times = decoder.positions(long)["time_ns"]
    assert times.idxmax() == 1
    assert times.dtype == np.int64
    heard = decoder.measure(MODELS["speech"](), **QUICK)
    seen = heard.calibration.observed.watched[0]
    assert decoder.positions(heard)["time_ns"].sum() == seen.wall_ns - seen.start_ns, "the encoder's too"
    with pytest.raises(ValueError, match="steps were not timed"):
        decoder.positions(decoder.predict(base, batch=2))
    with pytest.raises(ValueError, match="steps were not timed"):
        decoder.positions(ek.Account.of("Time", "ns", {"a": 1}, total=1, source="here"))


@pytest.mark.parametrize(
    ("model", "given", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), {}, r"Linear has no generate\(\): give a transformers model .* step\(token"),
        (MODELS["text"], {"num_steps": 0}, "num_steps is a whole number from 1 on; given: 0"),
        (MODELS["text"], {"batch": 0}, "batch is a whole number from 1 on; given: 0"),
        (MODELS["text"], {"repeats": 0}, "repeats is a whole number from 1 on; given: 0"),
        (MODELS["gpt2"], {"num_steps": 1000}, "pass the model's 1024 positions; take at most 992"),
        (MODELS["whisper"], {"input_length": 101}, "passes the encoder's 50 positions"),
        (MODELS["text"], {"inputs": {"input_features": torch.ones(1)}}, "hold the tensor 'input_ids'; given: inp"),
        (MODELS["text"], {"weight_bits": 4}, "weight_bits is a prediction from bytes alone"),
        (MODELS["text"], {"layers": 2}, "no such knob: layers; the knobs are decoder_layers"),
        (lambda: lambda token, cache: token, {"inputs": 1}, r"a step returns \(token, cache\); given: int"),
        (lambda: lambda token, cache: (token, 1, 2), {"inputs": 1}, r"a step returns \(token, cache\); given: tuple"),
        (lambda: lambda token, cache: (token, cache), {"num_steps": 0}, "and batch >= 1; given: 0 and 1"),
        (lambda: lambda token, cache: (token, cache), {"dtype": "bfloat16"}, "is measured as it is, .* given: dtype"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_refused_in_words(model, given, message):
    with pytest.raises(ValueError, match=message):
        decoder.measure(model(), **given)


def test_inputs_that_cannot_be_made_up_are_asked_for():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = hub.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        hub.ViTConfig(**small, image_size=32, patch_size=16), hub.BertConfig(**small, vocab_size=60)
    )
    model = hub.VisionEncoderDecoderModel(config)
    model.generation_config.decoder_start_token_id = 1
    with pytest.raises(ValueError, match="takes pixel_values, which cannot be made up: give inputs="):
        decoder.measure(model, **QUICK)
    account = decoder.measure(model, torch.randn(1, 3, 32, 32), **QUICK)
    assert {ENCODER, SELF, CROSS} <= set(account.frame.index)
