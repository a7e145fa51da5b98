"""Predictions of generations, in a world with known costs and from plain arithmetic."""

from dataclasses import replace

import pytest
from decoder_world import measured

import effkit as ek
from effkit import decoder
from effkit.decoder import live
from effkit.decoder.calibration import helps, lattice
from effkit.decoder.setting import Setting

SPEECH = Setting(
    decoder_layers=8, encoder_layers=8, width=64, batch=1, num_steps=40, input_length=400, kv_heads=2
)  # fmt: skip
TEXT = Setting(decoder_layers=8, width=64, batch=2, num_steps=30, input_length=48, kv_heads=4)


@pytest.fixture(scope="module")
def speech():
    return ek.models.speech(encoder_layers=8, decoder_layers=8, hidden=64)


@pytest.fixture(scope="module")
def text():
    return ek.models.text(layers=8, hidden=64)


@pytest.fixture(scope="module")
def world(speech):
    return measured(speech, SPEECH)


def test_at_rest_the_prediction_is_the_measurement(world):
    base, _ = world
    assert decoder.predict(base) is base
    assert decoder.predict(base, batch=1, num_steps=40) is base


@pytest.mark.parametrize(
    "changes",
    [
        {"decoder_layers": 2},
        {"decoder_layers": 24, "batch": 16},
        {"decoder_layers": 4, "batch": 3, "num_steps": 70},
        {"encoder_layers": 16, "input_length": 600},
        {"encoder_layers": 2, "decoder_layers": 12, "batch": 32, "num_steps": 20},
        {"num_steps": 1},
    ],
)
def test_unseen_settings_of_a_world_that_is_as_the_model_says(world, changes):
    base, truth = world
    guess = decoder.predict(base, **changes)
    setting = Setting(**guess.setting)
    assert guess.total == pytest.approx(truth(setting), rel=0.02)
    assert guess.low < truth(setting) < guess.high
    assert guess.in_range
    assert abs(guess.residual) <= len(guess.frame)


def test_a_decoder_only_world(text):
    base, truth = measured(text, TEXT)
    for changes in ({"decoder_layers": 3, "batch": 8}, {"input_length": 90, "num_steps": 50}, {"batch": 1}):
        guess = decoder.predict(base, **changes)
        assert guess.total == pytest.approx(truth(Setting(**guess.setting)), rel=0.03), changes
        assert "encoder" not in guess.frame.index


def test_parts_that_did_not_change_keep_their_time(world):
    base, _ = world
    guess = decoder.predict(base, encoder_layers=4)
    table = base.compare(guess)
    assert table.loc["self-attention", "ratio"] == pytest.approx(1, abs=0.02)
    assert table.loc["encoder", "ratio"] < 0.7


@pytest.mark.parametrize(
    ("changes", "in_range", "wider"),
    [
        ({"decoder_layers": 24}, True, 1),
        ({"decoder_layers": 48}, False, 2),
        ({"batch": 128}, False, 3),
        ({"num_steps": 80}, True, 1),
        ({"num_steps": 160}, False, 2),
        ({"input_length": 1600}, False, 2),
        ({"exit_layer": 4}, True, 1),
        ({"exit_layer": 1}, False, 2),
        ({"width": 128}, False, 0),
        ({"cache": "off"}, False, 0),
        ({"num_beams": 2}, False, 0),
        ({"compiled": "on"}, False, 0),
    ],
)
def test_what_no_run_has_seen_is_out_of_range_and_has_a_wider_band(world, changes, in_range, wider):
    """Twice as wide a doubling beyond the probes; in a regime that none of them had, wide whatever they say."""
    base, _ = world
    guess = decoder.predict(base, **changes)
    assert guess.in_range is in_range
    width = guess.high / guess.total - 1
    assert width == pytest.approx(wider * base.calibration.trust.band_frac if wider else 0.3, rel=0.02)
    assert ("outside the calibrated range" in repr(guess)) is not in_range


def test_with_parameters_held_layers_move(world, speech):
    base, _ = world
    guess = decoder.predict(base, decoder_layers=2, hold_parameters="on")
    assert guess.setting["encoder_layers"] > 12
    before, after = base.companion("Weights").total, guess.companion("Weights").total
    assert after == pytest.approx(before, rel=0.02)
    altered = ek.models.speech(encoder_layers=guess.setting["encoder_layers"], decoder_layers=2, hidden=64)
    assert after == sum(parameter.nbytes for parameter in altered.parameters())
    with pytest.raises(ValueError, match=r"leave no encoder layer .* take at most 1[0-9]"):
        decoder.predict(base, decoder_layers=40, hold_parameters="on")


def test_levers_move_time_the_way_they_must(world, text):
    base, _ = world
    total = base.total
    assert decoder.predict(base, cache="off").total > 2 * total, "every position anew"
    beams, rows = (decoder.predict(base, **four).frame["value"] for four in ({"num_beams": 4}, {"batch": 4}))
    assert beams.drop("encoder").sum() > rows.drop("encoder").sum(), "and the cache is reordered"
    assert decoder.predict(base, compiled="on").total < 0.5 * total, "launches are most of it"
    assert decoder.predict(base, exit_layer=4).total < 0.7 * total
    assert decoder.predict(base, exit_layer=4).companion("Weights").total == base.companion("Weights").total
    assert decoder.predict(base, width=128).total > total
    assert decoder.predict(base, weight_bits=8).companion("Weights").total * 4 == base.companion("Weights").total
    assert decoder.predict(base, cache="off").companion("Key-value cache").total == 0


def test_fewer_key_value_heads_shrink_the_cache_alone(text):
    base, _ = measured(text, TEXT)
    guess = decoder.predict(base, kv_heads=1)
    assert guess.companion("Key-value cache").total * 4 == base.companion("Key-value cache").total
    assert guess.total <= base.total * 1.01
    with pytest.raises(ValueError, match="kv_heads divides the 4 query heads; given: 3"):
        decoder.predict(base, kv_heads=3)


def test_companions_say_the_same_thing_in_other_units(world):
    base, _ = world
    guess = decoder.predict(base, batch=8)
    assert guess.companion("Time per token").total == pytest.approx(guess.total / 40, abs=1)
    assert guess.companion("Tokens per second").total == pytest.approx(320 / guess.total * 1e9, abs=1)
    assert guess.companion("Real-time factor").total == pytest.approx(8 * 4.0 / guess.total * 1e12, rel=1e-3)
    phases = guess.companion("Prefill and decode")
    assert phases.total == pytest.approx(guess.total, rel=1e-6)
    share = guess.companion("Decoder's share of the time").total / 1e6
    assert share == pytest.approx(1 - guess.share["encoder"], abs=1e-5)
    for one in guess.companions:
        assert one.low <= one.total <= one.high


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": 3}, "no such knob: layers; the knobs are decoder_layers"),
        ({"num_steps": 0}, "num_steps is a whole number from 1 on; given: 0"),
        ({"num_steps": 2000}, "pass the model's 1024 positions; take at most 1023"),
        ({"exit_layer": 9}, "behind the last of 8 decoder layers"),
        ({"cache": "maybe"}, "cache is one of off, on"),
        ({"width": 70}, "no whole number of heads: take a multiple of 32"),
        ({"kv_heads": 1}, "needs a model with grouped heads"),
        ({"weight_bits": 5}, "weight_bits is one of 0, 2, 3, 4, 8, 16, 32; given: 5"),
    ],
)
def test_settings_that_cannot_be_are_refused_in_words(world, changes, message):
    base, _ = world
    with pytest.raises(ValueError, match=message):
        decoder.predict(base, **changes)


def test_a_base_without_calibration_is_refused():
    plain = ek.Account.of("Time", "ns", {"a": 1}, total=1, source="here")
    with pytest.raises(ValueError, match="no calibration"):
        decoder.predict(plain, batch=2)


def test_the_panel_rests_at_the_measurement_and_moves(world):
    base, _ = world
    panel = decoder.whatif(base)
    assert panel.result is base
    panel.controls["decoder_layers"].value = 2
    assert panel.result.total == decoder.predict(base, decoder_layers=2).total
    panel.controls["hold_parameters"].value = "on"
    assert panel.result.setting["encoder_layers"] > 12
    assert "Real-time factor" in panel.shown()
    panel.controls["width"].value = 96
    assert "outside the calibrated range" in panel.shown()


def test_noise_widens_the_band(world):
    base, _ = world
    noisy = replace(base, calibration=replace(base.calibration, noise_frac=0.1))
    calm, wide = (decoder.predict(one, batch=2) for one in (base, noisy))
    assert wide.total == calm.total
    assert wide.high - wide.total > 2 * (calm.high - calm.total)


def test_one_more_repeat_helps_while_repeats_lie_apart(speech, world):
    base, _ = world
    nodes = lattice(speech, base.calibration.setting)
    calm = [replace(run, plain_ns=run.plain_ns[:1] * 2) for run in base.calibration.runs]
    noisy = [replace(run, plain_ns=(run.plain_ns[0], round(1.2 * run.plain_ns[0]))) for run in calm]
    assert not helps(calm, nodes)
    assert helps(noisy, nodes)


@pytest.mark.parametrize(("more", "expected"), [(False, 3), (True, 5)])
def test_repeats_end_when_one_more_does_not_help(speech, monkeypatch, more, expected):
    monkeypatch.setattr(live, "helps", lambda runs, nodes: more)
    told = []
    base = decoder.measure(speech, num_steps=3, repeats=5, progress=lambda *now: told.append(now))
    num_settings = len(base.calibration.runs)
    assert told[-1] == (num_settings * (1 + expected), num_settings * 6)
    assert f"{len(base.calibration.runs[0].plain_ns)} generations" in base.source
    assert {len(run.plain_ns) for run in base.calibration.runs[1:]} == {expected}
    assert len(base.calibration.runs[0].plain_ns) > expected, "the base is run between the others"
