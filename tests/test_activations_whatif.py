"""The sliders of the activation lab, without a browser."""

from dataclasses import fields

import pytest
import torch

from effkit import activations, models

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(gpt, batch):
    return activations.measure(gpt, batch, repeats=1, time_levers=True)


@pytest.fixture
def panel(base, gpt, batch):
    return activations.whatif(base, gpt, batch, repeats=1)


def test_every_slider_rests_on_the_measurement(panel, base):
    assert panel.setting.items() <= base.setting.items()
    assert base.setting.keys() - panel.setting.keys() == {field.name for field in fields(activations.Sharding)}
    assert panel.result is base
    assert panel.shown().startswith("Peak memory of one step: ")
    assert "measured. Move a control to ask what if." in panel.shown()


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_size", 7), ("length", 40), ("keep_frac", 5), ("micro_batches", 2), ("checkpoint_every", 1),
     ("compress", "int8"), ("offload_frac", 5), ("autocast", "bfloat16"), ("optimizer_states", "int8")],
)  # fmt: skip
def test_every_control_moves_the_result_and_the_text(panel, base, name, value):
    before = panel.shown()
    panel.controls[name].value = value
    assert panel.result.predicted
    assert panel.result.setting[name] == (value / 10 if name.endswith("_frac") else value)
    assert panel.result.total == activations.predict(base, **panel.setting).total
    assert panel.shown() != before
    assert "(predicted; band " in panel.shown()
    assert "Time of one step: " in panel.shown()
    panel.controls[name].value = round(base.setting[name] * 10) if name.endswith("_frac") else base.setting[name]
    assert panel.result is base
    assert panel.shown() == before


def test_a_lossy_lever_shows_its_gradient_error_beside_the_noise(panel):
    assert "Gradient" not in panel.shown()
    panel.controls["compress"].value = "int8"
    assert "Gradient error: " in panel.shown()
    assert "Gradient noise between half batches, as measured: " in panel.shown()
    error = panel.result.companion("Gradient error")
    noise = panel.result.companion("Gradient noise between half batches, as measured")
    assert 0 < error.total < 50_000 < noise.total, "int8 is far below the noise"
    panel.controls["autocast"].value = "bfloat16"
    both = panel.result.companion("Gradient error")
    assert both.total > error.total
    assert set(both.frame.index) == {"compress int8", "autocast bfloat16"}
    panel.controls["compress"].value = panel.controls["autocast"].value = "none"
    panel.controls["checkpoint_every"].value = 1
    assert "Gradient" not in panel.shown(), "recomputing loses nothing"


def test_a_setting_that_cannot_be_is_said_on_the_screen(panel):
    panel.controls["batch_size"].value = 2
    panel.controls["micro_batches"].value = 5
    assert panel.shown() == "a batch of 2 cannot be cut into 5 micro-batches: use fewer"
    with pytest.raises(ValueError, match="use fewer"):
        panel.measure()
    panel.controls["micro_batches"].value = 2
    assert panel.shown().startswith("Peak memory of one step: ")


def test_measuring_gives_a_receipt_of_the_setting_on_the_screen(panel):
    panel.controls["batch_size"].value = 6
    panel.controls["checkpoint_every"].value = 1
    panel.controls["compress"].value = "int8"
    receipt = panel.measure()
    assert panel.receipts == [receipt]
    assert abs(receipt.error) <= 0.01
    assert receipt.measured.residual == 0
    assert receipt.measured.setting == receipt.predicted.setting
    assert panel.shown().startswith("Receipt: predicted ")
    assert "inside the band" in panel.shown() or "outside the band" not in panel.shown()
    panel.controls["batch_size"].value = 5
    assert "Receipt" not in panel.shown()


def test_without_the_model_it_refuses_to_measure(base):
    panel = activations.whatif(base)
    panel.controls["batch_size"].value = 6
    assert panel.result.predicted
    with pytest.raises(RuntimeError, match="nothing to measure on: make this what-if with the live model"):
        panel.measure()
    assert panel.receipts == []


def test_a_model_without_a_sequence_has_no_slider_for_it():
    model = models.vision(layers=1, hidden=32, heads=2, image=16, device="cpu")
    base = activations.measure(model, model.random_batch(4), repeats=1)
    panel = activations.whatif(base)
    assert "length" not in panel.controls
    assert "keep_frac" not in panel.controls
    panel.controls["batch_size"].value = 9
    assert panel.result.setting["batch_size"] == 9
    assert "Time of one step" not in panel.shown(), "levers were not timed"
