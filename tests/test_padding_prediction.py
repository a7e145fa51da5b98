"""predict(): from one measured account to another setting. The measurement here is made up; nothing runs torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_padding_planning import spread

from effkit.account import Account
from effkit.padding import fit_memory, plan, predict, whatif
from effkit.padding.accounting import EPOCH_TIME, companions, epoch_rows, setting_of
from effkit.padding.calibration import Calibration, fit_cost

TRUE_TIME = np.array([1e6, 900, 400, 0.03, 0.8])  # c0, BT, BU, BT², BUT [ns]
TRUE_PEAK = np.array([2e8, 3e4, 2e4, 0, 20])  # fixed, BT, BU, BUT, BT² [bytes]


def measured(strategy="random", noise=0.02, noise_frac=0.01, lengths=None, **limits):
    """What measure() would return had these steps been run: every batch of the plan, with noise on the times."""
    made = plan(spread(640) if lengths is None else lengths, strategy, **(limits or {"batch_size": 8}))
    steps = made.frame[["num_rows", "input_length", "output_length"]]
    rows, t, u = (steps[name].to_numpy(dtype=float) for name in steps)
    parts = np.stack([np.ones_like(t), rows * t, rows * u, rows * t * t, rows * u * t], axis=1)
    times = parts @ TRUE_TIME * np.exp(np.random.default_rng(0).normal(0, noise, len(t)))
    peaks = np.stack([np.ones_like(t), rows * t, rows * u, rows * u * t, rows * t * t], axis=1) @ TRUE_PEAK
    steps = steps.assign(dur_ns=times, peak_bytes=peaks, whole=True, times_ns=[[time] for time in times])
    cost, memory = fit_cost(steps), fit_memory(steps.rename(columns={"num_rows": "batch_size"}))
    told, epoch_ns, num_steps = epoch_rows(made, cost)
    return Account.of(
        EPOCH_TIME, "ns", told, total=int(times.sum()), source="a clock that was made up", basis="derived",
        setting=setting_of(made),
        companions=companions(made, num_steps, int(peaks.max()), ("shapes", "count", "counter")),
        calibration=Calibration(made, cost, memory, steps, noise_frac, times.sum() / epoch_ns),
    )  # fmt: skip


BASE = measured()
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "strategy": st.sampled_from(["random", "sorted", "bucket", "bucket2d", "optimal", "token_budget"]),
        "batch_size": st.integers(2, 40),  # batches of one cannot be dealt to ranks that do not divide their number
        "num_buckets": st.integers(1, 12),
        "num_output_buckets": st.integers(1, 4),
        "max_length": st.integers(50, 600),
        "world_size": st.integers(1, 8),
        "seed": st.integers(0, 3),
    },
)


def cells(account):
    return account.companion("Input cells of one epoch")


def steps(account):
    return account.companion("Steps of one epoch")


def peak(account):
    return account.companion("Peak memory")


# At rest


def test_with_no_change_the_prediction_is_the_measurement():
    assert predict(BASE) is BASE


@pytest.mark.parametrize(
    "base", [BASE, measured("bucket", batch_size=8, num_buckets=5), measured("sorted", batch_size=4)]
)
def test_the_measured_setting_given_explicitly_is_the_measurement(base):
    assert predict(base, **base.setting) is base
    for name, value in base.setting.items():
        assert predict(base, **{name: value}) is base


def test_a_knob_that_the_strategy_has_no_use_for_changes_nothing():
    assert predict(BASE, num_buckets=17, num_output_buckets=3, quadratic=None) is BASE


# Away from it


def dealt(setting):
    """The prediction, unless the examples cannot be dealt out to the ranks evenly."""
    try:
        return predict(BASE, **setting)
    except ValueError as error:
        assert "cannot be dealt" in str(error)  # noqa: PT017
        assume(False)


@settings(max_examples=40)
@given(SETTINGS)
def test_cells_and_steps_are_those_of_the_plan(setting):
    result = dealt(setting)
    lengths = spread(640)
    kept = lengths[lengths["input_length"] <= setting.get("max_length", 600)].reset_index(drop=True)
    strategy, size = setting.get("strategy", "random"), setting.get("batch_size", 8)
    limits = {"batch_size": size}
    if strategy == "token_budget":
        limits = {"max_input_cells": size * int(kept["input_length"].max())}
    names = ("num_buckets", "num_output_buckets", "seed")
    made = plan(kept, strategy, **limits, **{name: setting[name] for name in names if name in setting})
    assert cells(result).frame["value"].to_dict() == made.account().frame["value"].to_dict()
    assert cells(result).total == made.account().total
    assert steps(result).total == len(made.batch_sampler(0, setting.get("world_size", 1)))


@settings(max_examples=40)
@given(SETTINGS)
def test_bands_enclose_and_rows_explain(setting):
    result = dealt(setting)
    if result is BASE:
        return
    assert result.predicted
    assert result.low < result.total < result.high
    assert (result.frame["value"] >= 0).all()
    assert abs(result.residual) <= 0.02 * result.total  # what the anchor adds
    for exact in (cells(result), steps(result)):
        assert exact.low == exact.total == exact.high
    assert peak(result).low <= peak(result).total <= peak(result).high


def test_a_better_plan_is_predicted_as_the_truth_has_it():
    result = predict(BASE, strategy="bucket", num_buckets=6)
    truth = measured("bucket", batch_size=8, num_buckets=6)
    assert truth.total < 0.8 * BASE.total
    assert result.total == pytest.approx(truth.total, rel=0.02)
    assert result.low <= truth.total <= result.high
    assert peak(result).total == pytest.approx(peak(truth).total, rel=0.01)
    assert cells(result).total == cells(truth).total
    assert result.in_range


def test_bands_widen_with_the_noise():
    bases = [measured(noise=n, noise_frac=f) for n, f in ((0.0, 0.0), (0.0, 0.02), (0.05, 0.02), (0.05, 0.9))]
    results = [predict(base, strategy="sorted") for base in bases]
    widths = [(one.high - one.low) / one.total for one in results]
    assert widths == sorted(widths)
    assert widths[0] < 1e-6 < widths[1] < widths[2] < widths[3]


def test_twice_the_cost_is_twice_the_time():
    calibration = BASE.calibration
    cost = replace(calibration.cost, coefficients=tuple(2 * c for c in calibration.cost.coefficients))
    dearer = replace(BASE, calibration=replace(calibration, cost=cost))
    one, two = (predict(base, strategy="bucket", num_buckets=4) for base in (BASE, dearer))
    assert two.total == pytest.approx(2 * one.total, abs=1)
    assert two.frame["value"].to_numpy() == pytest.approx(2 * one.frame["value"].to_numpy(), abs=2)
    assert cells(two).total == cells(one).total


def test_the_anchor_scales_the_total():
    anchored = replace(BASE, calibration=replace(BASE.calibration, anchor=1.25 * BASE.calibration.anchor))
    totals = [predict(base, strategy="sorted").total for base in (BASE, anchored)]
    assert totals[1] == pytest.approx(1.25 * totals[0], rel=1e-6)


def test_leaving_long_examples_out():
    shorter = predict(BASE, max_length=120)
    assert cells(shorter).frame.loc["real", "value"] == spread(640).query("input_length <= 120")["input_length"].sum()
    assert shorter.total < BASE.total
    assert peak(shorter).total < peak(BASE).total


def test_no_example_gets_longer_than_it_is():
    longer = predict(BASE, max_length=10 * BASE.setting["max_length"])
    assert cells(longer).total == cells(BASE).total
    assert steps(longer).total == steps(BASE).total
    assert longer.total == pytest.approx(BASE.total, rel=1e-6)


@pytest.mark.parametrize("strategy", ["random", "sorted", "bucket", "bucket2d", "optimal", "token_budget"])
@pytest.mark.parametrize("memory_bytes", [230_000_000, 500_000_000, 2_000_000_000])
def test_a_memory_budget_decides_the_batches_and_is_kept(strategy, memory_bytes):
    result = predict(BASE, strategy=strategy, memory_bytes=memory_bytes, num_buckets=5)
    assert peak(result).total <= memory_bytes
    assert "batch_size" not in result.setting
    if memory_bytes > 10 * peak(BASE).total:
        assert steps(result).total < steps(BASE).total


def test_more_memory_means_fewer_steps():
    counts = [
        steps(predict(BASE, strategy="bucket2d", num_buckets=5, memory_bytes=budget)).total
        for budget in (230_000_000, 300_000_000, 500_000_000, 2_000_000_000)
    ]
    assert counts == sorted(set(counts), reverse=True)


def test_ranks_wait_for_each_other_and_were_not_measured():
    alone, shared = predict(BASE, strategy="bucket"), predict(BASE, strategy="bucket", world_size=4)
    assert "waiting" not in alone.frame.index
    assert shared.frame.loc["waiting", "value"] > 0
    assert alone.total / 4 < shared.total < alone.total
    assert alone.in_range
    assert not shared.in_range
    assert steps(alone).total / 4 <= steps(shared).total < steps(alone).total


def test_larger_batches_than_measured_are_out_of_range():
    assert predict(BASE, batch_size=4).in_range
    assert not predict(BASE, batch_size=80).in_range
    assert not peak(predict(BASE, batch_size=80)).in_range


def test_other_costs_of_packing_were_not_measured():
    lengths = spread(640)[["input_length"]].assign(output_length=1)
    base = measured(lengths=lengths)
    cost = replace(base.calibration.cost, attention="block_mask")  # the same, had packed rows been measured
    of_packed = replace(base, calibration=replace(base.calibration, cost=cost))
    unseen, seen = (predict(one, strategy="pack", max_input_cells=600, batch_size=1) for one in (base, of_packed))
    assert not unseen.in_range
    assert not peak(unseen).in_range
    assert half_width(unseen) == pytest.approx(3 * half_width(seen), rel=1e-6)
    assert predict(base, strategy="sorted").in_range
    assert not predict(of_packed, strategy="sorted").in_range


def half_width(account):
    return (account.high - account.low) / 2 / account.total


def test_the_band_widens_with_the_doublings_beyond_what_was_measured():
    cells = BASE.calibration.cost.largest[2]
    for size in (7, 16, 32):
        frame = plan(spread(640), "random", batch_size=size).frame
        doublings = max(0.0, np.log2((frame["num_rows"] * frame["input_length"]).max() / cells))
        assert (doublings > 0.5) == (size > 8)
        expected = (1 + doublings) * BASE.calibration.trust(frame).band_frac
        assert half_width(predict(BASE, batch_size=size)) == pytest.approx(expected, rel=1e-6)


def test_noise_in_an_epoch_is_less_than_in_one_step():
    """Every repeat of every step tells something of the epoch: a hundred times, a tenth of the noise."""
    calibration, frame = BASE.calibration, BASE.calibration.plan.frame
    cost = calibration.cost
    sure = replace(cost, left_out=(cost.coefficients,) * cost.num_steps)
    exact = replace(calibration, cost=sure, noise_frac=0.2)
    repeats = 100
    often = replace(exact, steps=exact.steps.assign(times_ns=[[1] * repeats] * len(exact.steps)))
    assert exact.trust(frame).band_frac == pytest.approx(2 * np.sqrt(np.pi / 2) * 0.2 / np.sqrt(len(exact.steps)))
    assert often.trust(frame).band_frac == pytest.approx(exact.trust(frame).band_frac / 10)


# Pure


@settings(max_examples=20)
@given(SETTINGS)
def test_predicting_changes_nothing(setting):
    calibration, frame = BASE.calibration, BASE.calibration.steps.copy()
    kept = (calibration.plan, calibration.cost, calibration.memory, calibration.noise_frac, calibration.anchor)
    random_state = np.random.get_state()[1].copy()  # noqa: NPY002
    first, second = predict(BASE, **setting), predict(BASE, **setting)
    assert (np.random.get_state()[1] == random_state).all()  # noqa: NPY002
    assert BASE.calibration is calibration
    now = (calibration.plan, calibration.cost, calibration.memory, calibration.noise_frac, calibration.anchor)
    assert all(one is other for one, other in zip(kept, now, strict=True))
    pd.testing.assert_frame_equal(calibration.steps, frame)
    assert repr(first) == repr(second)
    assert (first.total, first.low, first.high) == (second.total, second.low, second.high)


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match="no such knob: batchsize; the knobs are strategy, batch_size"):
        predict(BASE, batchsize=4)
    with pytest.raises(ValueError, match="unknown strategy 'best'; choose one of random"):
        predict(BASE, strategy="best")
    with pytest.raises(ValueError, match="no example is 2 cells or shorter: raise max_length"):
        predict(BASE, max_length=2)
    with pytest.raises(ValueError, match="raise it or filter the list"):
        predict(BASE, strategy="bucket", memory_bytes=1000)
    with pytest.raises(ValueError, match=r"padding\.measure\(\) makes one"):
        predict(replace(BASE, calibration=None))


# Known defects


def test_sizes_per_bucket_survive_another_world_size():
    base = measured("bucket", batch_size=[12, 8, 4], num_buckets=3)
    assert cells(predict(base, world_size=2)).total == cells(base).total


def test_a_numpy_batch_size_is_a_batch_size():
    base = measured("random", batch_size=np.int64(8))
    assert cells(predict(base, strategy="sorted")).total == cells(predict(BASE, strategy="sorted")).total


def test_the_exact_steps_are_those_that_the_sampler_takes():
    result = predict(BASE, strategy="bucket", num_buckets=6, world_size=4)
    made = plan(spread(640), "bucket", batch_size=8, num_buckets=6)
    assert steps(result).total == len(made.batch_sampler(0, 4))


# The sliders


@pytest.mark.parametrize(
    ("strategy", "limits"),
    [
        ("random", {"batch_size": 8}),
        ("bucket", {"batch_size": 8, "num_buckets": 3}),
        ("random", {"max_input_cells": 9000}),
    ],
)
def test_every_slider_rests_on_the_measurement(strategy, limits):
    base = measured(strategy, **limits)
    panel = whatif(base)
    assert predict(base, **panel.setting) is base
    panel.controls["max_length"].value -= 1
    panel.controls["max_length"].value += 1
    assert panel.result is base


def test_a_memory_budget_in_mebibytes_decides_the_batches():
    panel = whatif(measured("bucket", batch_size=8, num_buckets=3))
    budget = panel.controls["memory_bytes"]
    budget.value = budget.max
    assert panel.setting["memory_bytes"] == budget.max * 2**20
    assert panel.result.setting["memory_bytes"] == budget.max * 2**20
    assert "batch_size" not in panel.result.setting
    assert peak(panel.result).total <= budget.max * 2**20
