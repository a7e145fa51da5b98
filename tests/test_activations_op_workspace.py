"""What a replay cannot see is learned from two small steps: on timelines whose truth is known, and on real models."""

import numpy as np
import pytest
import torch
from activation_models import TINY, batch_of, made_timeline, recorded_peak

from effkit import activations, models
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import Levers
from effkit.activations.op_workspace import Workspace, fit, opaque, places

torch.set_num_threads(1)
WEIGHT = (((8, 8),),)


def step(rows, *, real, cells=6):
    """A convolution that allocates 1000 + 3 bytes per byte moved inside itself and keeps 64 + 2, a product, AdamW."""
    moved = 10 * rows * cells
    return made_timeline(
        ["convolution", "mm", "adam"],
        [(64 + 2 * moved if real else 0, 0, 2, "saved activation"), (8 * rows, 1, 2, "workspace")],
        moved=[moved, moved, 5], inside=[1000 + 3 * moved, 0, 0] if real else None,
        shapes=[((cells,),), ((cells, 2),), ()], weights=[*WEIGHT, (), ()],
    )  # fmt: skip


@pytest.fixture(scope="module")
def learned():
    return fit([step(rows, real=True) for rows in (2, 3)], [step(rows, real=False) for rows in (2, 3)])


@pytest.mark.parametrize("rows", [1, 2, 5, 400])
def test_lines_through_two_sizes_hold_at_any_other(learned, rows):
    seen, truth = learned.applied(step(rows, real=False)), step(rows, real=True)
    assert seen.inside_bytes.tolist() == truth.inside_bytes.tolist()
    assert seen.allocations["size_bytes"].tolist() == truth.allocations["size_bytes"].tolist()
    assert (seen.levels() == truth.levels()).all()


def test_another_length_goes_by_the_weights(learned):
    seen, truth = learned.applied(step(4, real=False, cells=11)), step(4, real=True, cells=11)
    assert (seen.levels() == truth.levels()).all()


def test_operators_that_hide_nothing_are_left_alone(learned):
    assert {key[0] if isinstance(key[0], str) else key[0].name for key in learned.outputs} == {"convolution"}
    other = made_timeline(["mm", "relu", "adam"], [(8, 0, 2, "workspace")], moved=[5, 6, 7])
    seen = learned.applied(other)
    assert seen.inside_bytes.tolist() == [0, 0, 0]
    assert seen.allocations["size_bytes"].tolist() == [8]


def test_nothing_learned_changes_nothing():
    timeline = step(3, real=False)
    assert (Workspace({}, {}).applied(timeline).levels() == timeline.levels()).all()


def test_a_size_is_never_negative():
    falling = fit([step(2, real=True), step(3, real=False)], [step(2, real=False), step(3, real=False)])
    assert (falling.applied(step(500, real=False)).inside_bytes >= 0).all()


def test_places_number_what_one_operator_made():
    assert places(np.array([0, 0, 0, 2, 2, 5])).tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize(
    ("ops", "blind"),
    [(["mm", "add"], False), (["convolution", "add"], True), (["mkldnn_rnn_layer_backward", "mm"], True),
     (["_cudnn_rnn", "mm"], True), (["lstm_cell"], True)],
)  # fmt: skip
def test_convolutions_and_recurrent_layers_are_opaque(ops, blind):
    assert opaque(made_timeline(ops, firsts=(0, 0, 0))) == blind


@pytest.mark.parametrize("name", ["convolutional", "recurrent"])
def test_two_small_steps_find_what_a_replay_misses(name):
    tiny = TINY[name]
    model = tiny.build()
    batch = batch_of(model, *tiny.sizes[2])
    truth = recorded_peak(model, batch)
    blind, taught, usual = (activations.forecast(model, batch, calibrate=which).total for which in (False, True, None))
    assert abs(taught / truth - 1) < 0.01 < abs(blind / truth - 1)
    assert usual == pytest.approx(taught, rel=0.005), "and is taught unless told otherwise"


def test_calibrating_leaves_the_model_alone():
    model = TINY["convolutional"].build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forecaster = Forecaster(model, model.random_batch(4))
    forecaster.calibrate(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert forecaster.workspace.inside
    assert forecaster.timeline(forecaster.size, Levers()).inside_bytes.any()


@pytest.mark.xfail(
    reason="its library's memory is no line of the bytes moved: 4% off at half the shortest calibrated length"
)
def test_a_recurrent_model_is_forecast_at_other_lengths_from_any_number_of_rows():
    model = models.recurrent(hidden=32, vocabulary=100, device="cpu")
    base = activations.measure(model, model.random_batch(12, 32), repeats=1, make_batch=model.random_batch)
    for rows, cells in ((6, 24), (5, 16), (8, 48)):
        truth = recorded_peak(model, model.random_batch(rows, cells))
        assert activations.predict(base, batch_size=rows, length=cells).total == pytest.approx(truth, rel=0.03)
