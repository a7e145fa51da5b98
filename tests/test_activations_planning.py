"""front(), cheapest(): combinations of levers, none of which on the front is beaten by another."""

from itertools import pairwise

import pytest
import torch
from activation_models import recorded_peak
from torch import nn

from effkit import activations
from effkit.activations.levers import Levers
from effkit.activations.on_ranks import TIME
from effkit.activations.planning import POSITIONS, cheapest, front

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base(gpt, batch):
    return activations.measure(gpt, batch, repeats=1, time_levers=True)


FEW = ("checkpoint", "micro_batches", "compress", "optimizer_states")


@pytest.fixture(scope="module")
def table(base):
    return front(base, levers=FEW)


def test_none_on_the_front_is_beaten_and_all_off_it_are(table):
    best, rest = table[table["on_front"]], table[~table["on_front"]]
    assert len(best) >= 2
    for one, other in pairwise(best.itertuples()):
        assert other.step_ns >= one.step_ns
        assert other.peak_bytes < one.peak_bytes
    for one in rest.itertuples():
        assert ((table["step_ns"] <= one.step_ns) & (table["peak_bytes"] <= one.peak_bytes)).sum() > 1


def test_the_front_begins_with_the_quickest_and_ends_with_the_smallest(table):
    best = table[table["on_front"]]
    assert best["step_ns"].iloc[0] == table["step_ns"].min()
    assert best["peak_bytes"].iloc[-1] == table["peak_bytes"].min()
    assert table["step_ns"].is_monotonic_increasing
    assert "plain" in set(table["setting"])
    assert table["setting"].is_unique


def test_every_row_is_what_predict_says(base, table):
    for row in table.itertuples():
        said = activations.predict(base, **table.attrs["settings"][row.setting])
        assert said.total == row.peak_bytes
        if said is not base:
            assert said.companion(TIME).total == row.step_ns
        assert Levers(**table.attrs["settings"][row.setting]).lossless == row.lossless


def test_lossless_leaves_out_what_changes_gradients(base, table):
    exact = front(base, levers=(*FEW, "autocast"), lossless=True)
    assert exact["lossless"].all()
    assert not table["lossless"].all()
    words = " ".join(exact["setting"])
    assert "compress" not in words
    assert "autocast" not in words
    assert "optimizer_states" not in words
    assert len(exact) > 1


def test_only_the_levers_asked_for_are_combined(base):
    words = " ".join(front(base, levers=["micro_batches"])["setting"])
    assert "micro_batches" in words
    assert "checkpoint" not in words


def test_no_more_parts_than_rows(gpt):
    base = activations.measure(gpt, gpt.random_batch(2, 32), repeats=1, time_levers=True)
    assert "micro_batches=4" not in " ".join(front(base, levers=["micro_batches"])["setting"])


@pytest.mark.parametrize("share", [1.1, 0.8, 0.5])
def test_the_cheapest_fits_and_is_the_quickest_that_does(gpt, batch, base, table, share):
    budget = int(share * base.total)
    found = cheapest(base, budget, levers=FEW)
    assert (found.high or found.total) <= budget
    changes = {name: found.setting[name] for name in vars(Levers())}
    assert recorded_peak(gpt, batch, Levers(**changes)) <= budget
    step_ns = found.companion(TIME).total
    safely = table[table["peak_bytes"] * 1.02 <= budget]
    assert step_ns <= safely["step_ns"].min()


def test_the_cheapest_may_be_asked_to_be_lossless(base):
    found = cheapest(base, int(0.8 * base.total), lossless=True)
    assert Levers(**{name: found.setting[name] for name in vars(Levers())}).lossless


def test_a_budget_that_nothing_fits_names_the_smallest(base, table):
    smallest = table.loc[table["peak_bytes"].idxmin(), "setting"]
    with pytest.raises(ValueError, match=r"no combination of these levers fits into 1,?000 B: the smallest, ") as told:
        cheapest(base, 1000, levers=FEW)
    assert smallest in str(told.value)
    assert "use a smaller batch" in str(told.value)


def test_an_unknown_lever_is_refused(base):
    with pytest.raises(ValueError, match="no such lever: magic; there are checkpoint, micro_batches"):
        front(base, levers=["magic"])


@pytest.mark.parametrize("search", [front, lambda base: cheapest(base, 10**9)])
def test_levers_that_were_not_timed_have_no_front(gpt, batch, search):
    base = activations.measure(gpt, batch, repeats=1)
    with pytest.raises(ValueError, match=r"the time of levers was not measured: measure\(\.\.\., time_levers=True\)"):
        search(base)


def test_every_position_is_a_lever_setting():
    for positions in POSITIONS.values():
        assert all(Levers(**position).changed for position in positions)


def test_micro_batches_are_lossless_only_where_the_gradient_stays():
    def contrastive(y):
        return nn.functional.cross_entropy(y @ y.T, torch.arange(len(y)))

    def square(y):
        return y.square().mean()

    plain = nn.Sequential(nn.Linear(6, 16), nn.Dropout(0.5), nn.Linear(16, 6))
    norms = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 6))
    for model, loss, lossless in [(plain, square, True), (norms, square, False), (plain, contrastive, False)]:
        torch.manual_seed(0)
        base = activations.measure(model, torch.randn(8, 6), loss=loss, repeats=1, time_levers=True)
        table = activations.front(base, levers=["micro_batches"], lossless=True)
        assert table["setting"].str.contains("micro").any() == lossless
        assert (base.calibration.parts_error < 1e-5) == lossless
