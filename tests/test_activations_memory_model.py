"""Sliders over batch size and length: what the surface says off its grid is what a step there takes."""

import statistics
import time

import numpy as np
import pytest
import torch
from activation_models import TINY, batch_of, made_timeline, recorded_peak
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from effkit import activations
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import Levers, Size
from effkit.activations.memory_model import Surface

torch.set_num_threads(1)
OFF_THE_GRID = {"gpt": (7, 77), "text": (5, 51), "speech": (7, 100), "vision": (7, None)}


@pytest.fixture(scope="module")
def bases():
    found = {}
    for name in OFF_THE_GRID:
        model = TINY[name].build()
        make = lambda rows, cells, model=model: batch_of(model, rows, cells)  # noqa: E731
        base = activations.measure(model, make(*TINY[name].sizes[0]), repeats=1, make_batch=make)
        found[name] = model, base
    return found


# Made up


def made(rows, cells, ops=("mm", "relu", "adam")):
    size = 7 + 3 * rows + 5 * cells + 11 * rows * cells + 2 * cells**2 + 13 * rows * cells**2
    return made_timeline(ops, [(size, 0, 1, "workspace"), (100_000 * rows, 1, 2, "workspace")],
                         resident={"parameter": 1000})  # fmt: skip


GRID = [(rows, cells) for rows in (2, 16) for cells in (8, 20, 32)]
SURFACE = Surface.fit(GRID, [made(*size) for size in GRID])


@given(st.integers(1, 200), st.integers(1, 200))
def test_a_step_of_that_form_is_known_everywhere_and_its_peak_moves_between_operators(rows, cells):
    levels, op = SURFACE.peak(rows, cells)
    truth = made(rows, cells).levels().sum(axis=0)
    assert levels.sum() == pytest.approx(truth.max(), rel=1e-6)
    assert truth[op] == pytest.approx(truth.max(), rel=1e-6)
    assert (not SURFACE.doublings(rows, cells)) == (2 <= rows <= 16 and 8 <= cells <= 32)


def test_two_sizes_are_enough_without_a_sequence():
    surface = Surface.fit([(2, None), (8, None)], [made(2, 1), made(8, 1)])
    assert surface.peak(5, None)[0].sum() == pytest.approx(made(5, 1).levels().sum(axis=0).max())
    assert surface.amount(np.array([10.0, 40.0]), 5, None) == pytest.approx(25)
    assert not surface.doublings(5, None)
    assert surface.doublings(9, None)


def test_steps_of_other_operators_have_no_surface():
    with pytest.raises(ValueError, match="the step runs other operators at other sizes, so no one timeline fits"):
        Surface.fit([(2, None), (8, None)], [made(2, 1), made(8, 1, ops=("mm", "tanh", "adam"))])


# Real


@pytest.mark.parametrize("name", OFF_THE_GRID)
def test_a_slider_moved_off_the_grid_is_within_one_percent_of_a_real_step(bases, name):
    model, base = bases[name]
    rows, cells = OFF_THE_GRID[name]
    more = {"batch_size": rows} | ({"length": cells} if cells else {})
    guess = activations.predict(base, **more)
    forecaster = base.calibration.forecaster
    assert (rows, cells) not in forecaster.surface(Levers()).settings
    truth = recorded_peak(model, batch_of(model, rows, cells))
    assert guess.total == pytest.approx(truth, rel=0.01)
    assert guess.low <= truth <= guess.high
    assert guess.in_range
    assert guess.residual == 0


def test_once_fitted_a_slider_answers_at_once(bases):
    _, base = bases["gpt"]
    activations.predict(base, batch_size=5)
    times = []
    for rows in (3, 5, 6, 7, 9, 11, 13):
        began = time.perf_counter()
        activations.predict(base, batch_size=rows, length=40 + rows)
        times.append(time.perf_counter() - began)
    assert statistics.median(times) <= 0.025


def test_at_rest_the_prediction_is_the_measurement_itself(bases):
    _, base = bases["gpt"]
    assert activations.predict(base) is base
    assert activations.predict(base, **base.setting) is base
    for name, value in base.setting.items():
        assert activations.predict(base, **{name: value}) is base
    assert activations.predict(base, batch_size=None) is base


@settings(max_examples=25)
@given(st.integers(1, 40), st.integers(8, 120))
def test_more_rows_or_cells_take_more_memory(bases, rows, cells):
    _, base = bases["gpt"]
    here, more, longer = (activations.predict(base, batch_size=r, length=c).total
                          for r, c in ((rows, cells), (rows + 1, cells), (rows, cells + 1)))  # fmt: skip
    assert here <= more
    assert here <= longer


@settings(max_examples=25)
@given(st.integers(1, 60), st.integers(8, 200))
def test_predictions_explain_themselves(bases, rows, cells):
    _, base = bases["text"]
    guess = activations.predict(base, batch_size=rows, length=cells)
    if guess is base:
        return
    assert guess.residual == 0
    assert guess.low < guess.total < guess.high
    assert guess.frame["value"]["parameter"] == base.frame["value"]["parameter"]
    assert guess.frame["value"]["optimizer state"] == base.frame["value"]["optimizer state"]
    assert guess.in_range == (not base.calibration.forecaster.surface(Levers()).doublings(rows, cells))
    assert guess.setting["batch_size"] == rows


def test_the_surface_is_exact_where_it_was_fitted(bases):
    forecaster = bases["gpt"][1].calibration.forecaster
    surface = forecaster.surface(Levers())
    assert len(surface.settings) == 6
    for rows, cells in surface.settings:
        exact = forecaster.timeline(Size(rows, cells), Levers()).levels().sum(axis=0).max()
        assert surface.peak(rows, cells)[0].sum() == pytest.approx(exact, rel=1e-6)


class Positions(nn.Module):
    """Adds a position to each of 64 cells at most; longer batches do not fit."""

    def __init__(self):
        super().__init__()
        self.token, self.position = nn.Embedding(50, 32), nn.Parameter(torch.zeros(64, 32))
        self.head = nn.Linear(32, 50)

    def forward(self, tokens):
        return self.head(self.token(tokens) + self.position[: tokens.shape[1]]).square().mean()


def test_longer_than_the_model_has_positions_for_is_not_replayed():
    model, tokens = Positions(), torch.zeros(4, 64, dtype=torch.long)
    forecaster = Forecaster(model, tokens)
    assert max(cells for _, cells in forecaster.surface(Levers()).settings) == 64
    truth = recorded_peak(model, tokens.new_zeros(5, 50))
    assert sum(forecaster.peak(Size(5, 50), Levers()).rows.values()) == pytest.approx(truth, rel=0.01)
    assert not forecaster.peak(Size(5, 80), Levers()).covered


# The largest batch


@pytest.mark.parametrize("setting", [{}, {"checkpoint_every": 1}, {"micro_batches": 2}], ids=str)
def test_the_largest_batch_fits_and_one_row_more_does_not(bases, setting):
    model, base = bases["gpt"]
    budget = 3 * base.total
    most = activations.largest_batch(model, model.random_batch(4, 64), budget, **setting)
    levers = Levers(**setting)
    forecaster = Forecaster(model, model.random_batch(4, 64))
    fits, over = (int(forecaster.timeline(Size(rows, 64), levers).levels().sum(axis=0).max())
                  for rows in (most, most + levers.micro_batches))  # fmt: skip
    assert fits <= budget * 1.0001
    assert over > budget * 0.9999
    assert recorded_peak(model, model.random_batch(most, 64), levers) <= budget * 1.005
    assert recorded_peak(model, model.random_batch(most + levers.micro_batches, 64), levers) > 0.995 * budget
