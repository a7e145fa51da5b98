"""Probing: what a saving in small steps says of large ones, on made-up times; and peaks of a real tiny model."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effkit.advice import probing
from effkit.advice.probing import PLAIN, Peaks, Saving, cut, parts, probes, rows_of, savings
from effkit.advice.step_hooks import gradients_to_none, nothing_recomputed, without_intervening

pytestmark = pytest.mark.usefixtures("one_thread", "small_heap")
PLAIN_NS = (400_000.0, 800_000.0)
STEPS_NS = (1_000_000, 1_200_000, 1_400_000)


def made(law, noise_frac=0.0, plain_ns=PLAIN_NS):
    return Saving(plain_ns, tuple(map(law, plain_ns)), noise_frac)


def encloses(saving, truth, steps_ns=STEPS_NS):
    middle, half = saving.over(steps_ns)
    return middle - half - 1 <= truth <= middle + half + 1


# What is saved in all steps


@pytest.mark.parametrize("rate", [0.2, 0.01, -0.2, 0.0])
def test_in_proportion_is_in_proportion(rate):
    middle, half = made(lambda ns: rate * ns).over(STEPS_NS)
    assert middle == pytest.approx(rate * sum(STEPS_NS))
    assert half == pytest.approx(probing._LEAST_DOUBT_FRAC * sum(STEPS_NS))


@pytest.mark.parametrize("fixed", [50_000, -50_000])
def test_a_fixed_part_is_in_the_band_and_so_is_the_other_reading(fixed):
    saving = made(lambda _: fixed)
    in_proportion = 2 * fixed / sum(PLAIN_NS) * sum(STEPS_NS)
    assert encloses(saving, 3 * fixed)
    assert encloses(saving, in_proportion)
    assert saving.over(STEPS_NS)[0] == pytest.approx((3 * fixed + in_proportion) / 2)


@given(
    st.integers(0, 100_000), st.floats(0, 0.5), st.sampled_from([1, -1]), st.integers(100_000, 900_000),
    st.lists(st.integers(1_000_000, 5_000_000), min_size=1, max_size=9),
)  # fmt: skip
def test_the_band_encloses_any_fixed_part_with_any_share(fixed, rate, sign, smallest, steps_ns):
    saving = made(lambda ns: sign * (fixed + rate * ns), plain_ns=(smallest, 2.0 * smallest))
    assert encloses(saving, sign * (fixed * len(steps_ns) + rate * sum(steps_ns)), steps_ns)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_fixed_cost_against_a_share_saved(sign):
    """Autocast: weights are cast once per step, whatever its size, and products are so much faster."""
    saving = made(lambda ns: sign * (0.4 * ns - 100_000))
    assert encloses(saving, sign * (0.4 * sum(STEPS_NS) - 100_000 * len(STEPS_NS)))


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=9), st.floats(-0.9, 0.9), st.floats(-0.9, 0.9))
def test_losses_are_savings_turned_round(steps_ns, first, second):
    saved = (first * PLAIN_NS[0], second * PLAIN_NS[1])
    gain, loss = (Saving(PLAIN_NS, tuple(sign * ns for ns in saved), 0.02).over(steps_ns) for sign in (1, -1))
    if sum(saved):
        assert gain[0] == pytest.approx(-loss[0], rel=1e-6, abs=1e-3)
        assert gain[1] == pytest.approx(loss[1], rel=1e-6, abs=1e-3)


def test_noise_widens_the_band_and_there_is_always_some():
    halves = [made(lambda ns: 0.1 * ns, noise).over(STEPS_NS)[1] for noise in (0.0, 0.001, 0.1)]
    wide = 2 * np.sqrt(np.pi / 2) * 0.1 * np.sqrt(2)
    assert halves == pytest.approx([0.03 * sum(STEPS_NS), 0.03 * sum(STEPS_NS), wide * sum(STEPS_NS)])


# Parts of batches


def test_rows_of_batches():
    assert rows_of(torch.ones(5, 2)) == 5
    assert rows_of({"a": torch.ones(5, 2), "b": (torch.ones(5), "word", 3, None)}) == 5
    assert rows_of({"a": torch.ones(5), "scale": torch.tensor(2.0)}) == 5
    assert rows_of([torch.ones(5), torch.ones(4)]) is None
    assert rows_of([torch.tensor(1.0)]) is None
    assert rows_of([]) is rows_of(None) is rows_of("words") is None


def test_cut_batches_are_views_with_everything_else_in_them():
    batch = {"a": torch.arange(10).reshape(5, 2), "b": (torch.arange(5), "word", torch.tensor(2.0)), "n": 3}
    few = cut(batch, 2)
    assert few["a"].tolist() == [[0, 1], [2, 3]]
    assert few["a"].data_ptr() == batch["a"].data_ptr()
    assert few["b"][0].tolist() == [0, 1]
    assert few["b"][1:] == ("word", batch["b"][2])
    assert few["n"] == 3
    assert batch["a"].shape == (5, 2)


@pytest.mark.parametrize(("rows", "expected"), [
    (2, [1, 2]), (3, [1, 2]), (4, [1, 3]), (5, [1, 4]), (6, [2, 4]), (9, [3, 6]), (10, [3, 7]), (64, [21, 43]),
])  # fmt: skip
def test_a_third_and_two_thirds(rows, expected):
    assert [rows_of(one) for one in parts(torch.ones(rows, 2))] == expected


@given(st.integers(2, 500))
def test_two_different_parts_of_any_batch_that_can_be_cut(rows):
    few, more = map(rows_of, parts(torch.ones(rows)))
    assert 1 <= few < more <= rows


@pytest.mark.parametrize("batch", [torch.ones(1, 4), torch.ones(0, 4), [torch.ones(5), torch.ones(4)], None, {}])
def test_what_cannot_be_cut(batch):
    assert parts(batch) == []


def test_probes_are_of_the_middling_batch():
    batches = [torch.full((6,), float(number)) for number in range(5)]
    few, whole = probes(batches, [50, 10, 30, 20, 40])
    assert few.tolist() == [2.0] * 2
    assert whole is batches[2]
    few, more = probes(batches, [50, 10, 30, 20, 40], whole=False)
    assert few.tolist() == [2.0] * 2
    assert more.tolist() == [2.0] * 4, "a whole one may not fit"


def test_where_nothing_can_be_cut_a_short_and_a_middling_batch_are_tried():
    batches = [torch.ones(1, number + 1) for number in range(3)]
    short, middling = probes(batches, [30, 10, 20])
    assert short is batches[1]
    assert middling is batches[2]
    assert probes([None], [5]) == [None, None]


# A world of known costs


@contextmanager
def halving(_):
    yield


def world(monkeypatch, law, spread=0.0):
    """Times by ``law(name, number)``, the second fastest ``spread`` more; the calls are run, and noted."""
    seen = {"ran": [], "repeats": None}

    def fake(calls, repeats, pick, enough):
        seen["repeats"] = repeats
        found = {}
        for key, call in calls.items():
            call()
            seen["ran"].append(key)
            ns = law(*key)
            found[key] = round(pick([round(ns * (1 + spread)), ns, round(ns * (1 + 2 * spread))]))
        return found

    monkeypatch.setattr(probing, "interleaved_ns", fake)
    return seen


def test_savings_in_a_fake_world(monkeypatch):
    def law(name, number):
        plain = (300_000, 500_000)[number]
        return {PLAIN: plain, "half": plain // 2, "slower": plain + 1000}[name]

    seen = world(monkeypatch, law, spread=0.04)
    found = savings(lambda _: None, torch.nn.Linear(1, 1), ["a", "b"], {"half": halving, "slower": halving})
    assert set(found) == {"half", "slower"}
    assert found["half"].plain_ns == (300_000, 500_000)
    assert found["half"].saved_ns == (150_000, 250_000)
    assert found["slower"].saved_ns == (-1000, -1000)
    assert found["half"].noise_frac == pytest.approx(1.4826 / np.sqrt(2) * 0.04 * 1.5 / 1.04, rel=0.02)
    assert found["half"].num_repeats == 3
    assert set(seen["ran"]) == {(name, i) for name in (PLAIN, "half", "slower") for i in (0, 1)}
    assert probing._FEWEST <= seen["repeats"] <= probing._MOST
    middle, half = found["half"].over([1_000_000])
    assert middle == pytest.approx(500_000)
    noise = found["half"].noise_frac * np.sqrt(2 / 3)
    assert half == pytest.approx(max(30_000, 2 * np.sqrt(np.pi / 2) * noise * 1_000_000))


@pytest.mark.parametrize(("spread", "fewest", "most"), [(0.0, 4, 4), (0.3, 8, 24)])
def test_it_stops_when_more_runs_do_not_narrow_the_band(monkeypatch, spread, fewest, most):
    """At the least doubt at once; where the machine is noisy, when the root of their number grows slowly."""
    draw = np.random.default_rng(0)
    monkeypatch.setattr("effkit.timing.elapsed_ns", lambda call: round(1e6 * (1 + spread * draw.random())))
    monkeypatch.setattr(probing, "elapsed_ns", lambda call: 1_000_000)
    saving = savings(lambda _: None, torch.nn.Linear(1, 1), ["few", "more"], {"half": halving})["half"]
    assert fewest <= saving.num_repeats <= most
    assert bool(saving.over([1_000_000])[1] == pytest.approx(30_000)) is (spread == 0)


def test_each_step_runs_inside_of_its_intervention(monkeypatch):
    world(monkeypatch, lambda *_: 1000)
    model, log = torch.nn.Linear(1, 1), []

    @contextmanager
    def noted(given_model):
        assert given_model is model
        log.append("in")
        yield
        log.append("out")

    savings(log.append, model, ["few", "more"], {"noted": noted})
    assert log == ["more", "few", "more", "in", "few", "out", "in", "more", "out"]


# Peaks


def stepping(model, update, none=True):
    def step(batch):
        update.zero_grad(set_to_none=none)
        model(batch).square().mean().backward()
        update.step()

    return step


def tiny(none=True):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(32, 128), torch.nn.Tanh(), torch.nn.Linear(128, 32))
    update = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    return Peaks(stepping(model, update, none), model, [update], let_go=none)


@pytest.mark.parametrize("none", [True, False])
def test_peaks_are_exact_where_they_are_linear_in_rows(none):
    peaks, full = tiny(none), torch.randn(300, 32)
    sizes = {rows: peaks.of(full[:rows].clone()) for rows in (100, 200, 300)}
    assert sizes[300] - sizes[200] == sizes[200] - sizes[100] > 100 * 4 * (128 + 32)
    tried = [full[:100].clone(), full[:200].clone()]
    guess, half = peaks.at_full(tried, full, without_intervening)
    assert guess == sizes[300] == peaks.of(full)
    assert half == round(0.01 * guess)


def test_a_peak_holds_what_is_there_all_through_the_step():
    """Parameters and momentum; the input; two activations, and a gradient of the larger one."""
    peaks, batch = tiny(), torch.randn(300, 32)
    parameters = sum(p.nbytes for p in peaks.model.parameters())
    activations = 300 * (128 + 32) * 4
    assert peaks.of(batch) > 2 * parameters + batch.nbytes + activations
    assert peaks.of(batch) == peaks.of(batch)


def test_letting_gradients_go_saves_their_bytes():
    peaks, full = tiny(none=False), torch.randn(300, 32)
    tried = parts(full)
    held = sum(p.nbytes for p in peaks.model.parameters())
    truth = peaks.of(full, gradients_to_none)
    assert 0 < peaks.of(full) - truth <= held
    guess, half = peaks.at_full([one.clone() for one in tried], full, gradients_to_none)
    assert abs(guess - truth) <= half


def test_two_parts_of_one_size_say_what_the_larger_one_says():
    assert probing._line([4, 4], [70, 90], 9) == 90
    assert probing._line([1, 3], [10, 30], 5) == 50


def test_an_intervention_is_off_again():
    peaks = tiny()
    before = peaks.of(torch.ones(10, 32))
    peaks.of(torch.ones(10, 32), nothing_recomputed)
    assert peaks.of(torch.ones(10, 32)) == before
