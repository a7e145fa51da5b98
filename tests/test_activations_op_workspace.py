"""What a replay cannot see is found by running operators alone: on timelines that are made up, and on real models."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from activation_models import TINY, batch_of, made_timeline, recorded_peak

from effkit import activations
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import Levers
from effkit.activations.op_workspace import Workspace, places
from lessons import small_models

torch.set_num_threads(1)
FLOAT = "torch.float32"


def looks(*shape):
    return ((shape, shape, FLOAT),)


def step(*, real, num=6):
    """A convolution that allocates 1000 bytes inside itself and returns 64 that no replay knows, a product, AdamW."""
    return made_timeline(
        ["convolution", "mm", "adam"],
        [(100 + 64 * real, 0, 2, "saved activation"), (8, 1, 2, "workspace")],
        moved=[10 * num, 10, 5], inside=[1000, 0, 12] if real else None,
        shapes=[looks(num, 2), looks(num, 3), looks(4)],
    )  # fmt: skip


def test_what_an_operator_hid_in_a_real_step_is_known_by_its_name_and_data_types():
    workspace = Workspace()
    workspace.watch(step(real=True), step(real=False))
    assert workspace.hidden == {("convolution", FLOAT): (1000, 60), ("mm", FLOAT): (0, 10), ("adam", FLOAT): (12, 5)}


def test_a_few_numbers_inside_an_operator_are_there_at_any_size():
    workspace = Workspace()
    workspace.watch(step(real=True), step(real=False))
    assert workspace.applied(step(real=False, num=9)).inside_bytes.tolist() == [64, 0, 12]


def test_what_was_run_alone_takes_the_place_of_what_a_replay_says():
    blind = step(real=False)
    signature = blind.signatures[0]
    seen = Workspace({signature: 1000}, {signature: (164,)}).applied(blind)
    assert seen.inside_bytes.tolist() == [1000, 0, 0]
    assert seen.allocations["size_bytes"].tolist() == [164, 8]


def test_nothing_learned_changes_nothing():
    timeline = step(real=False)
    assert (Workspace().applied(timeline).levels() == timeline.levels()).all()


def test_places_number_what_one_operator_made():
    assert places(np.array([0, 0, 0, 2, 2, 5])).tolist() == [0, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("name", ["convolutional", "recurrent"])
def test_operators_run_alone_find_what_a_replay_misses(name):
    tiny = TINY[name]
    model = tiny.build()
    batch = batch_of(model, *tiny.sizes[2])
    truth = recorded_peak(model, batch)
    blind, taught, usual = (activations.forecast(model, batch, calibrate=which).total for which in (False, True, None))
    assert abs(taught / truth - 1) < 0.001 < 0.01 < abs(blind / truth - 1)
    assert usual == taught, "and is taught unless told otherwise"


def test_a_forecast_leaves_the_model_and_the_random_state_alone():
    model = TINY["convolutional"].build()
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    forecaster = Forecaster(model, model.random_batch(4))
    random = torch.get_rng_state()
    timeline = forecaster.timeline(forecaster.size, Levers())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert timeline.inside_bytes.any()
    assert not forecaster.workspace.unknown


def test_after_a_measurement_operators_that_hide_nothing_are_not_run():
    model = TINY["vision"].build()
    workspace = activations.measure(model, model.random_batch(4), repeats=1).calibration.forecaster.workspace
    hiding = {kind for kind, (most, _) in workspace.hidden.items() if most > 64}
    assert {signature.kind for signature in workspace.inside} <= hiding
    assert len(workspace.hidden) > 3 * len({signature.kind for signature in workspace.inside})


def test_an_operator_that_cannot_be_run_alone_is_out_of_range(monkeypatch):
    arguments = Workspace._arguments

    def refused(workspace, signature, calls, real=False):
        if signature.name == "tanh":
            raise RuntimeError("not on zeros")
        return arguments(workspace, signature, calls, real)

    monkeypatch.setattr(Workspace, "_arguments", refused)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Tanh())
    found = activations.forecast(model, torch.randn(4, 6), loss=lambda output: output.square().mean())
    assert not found.in_range
    assert (found.high - found.low) / found.total == pytest.approx(0.6, rel=0.01), "as wide as where nothing was run"


def test_a_recurrent_model_is_forecast_at_other_lengths_from_any_number_of_rows():
    model = small_models.recurrent(hidden=32, vocabulary=100, device="cpu")
    base = activations.measure(model, model.random_batch(12, 32), repeats=1, make_batch=model.random_batch)
    for rows, cells in ((6, 24), (5, 16), (8, 48)):
        truth = recorded_peak(model, model.random_batch(rows, cells))
        assert activations.predict(base, batch_size=rows, length=cells).total == pytest.approx(truth, rel=0.03)
