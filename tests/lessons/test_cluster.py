"""Schedules of long and short sequences, and workers that wait: by hand, and where they are run."""

import math
import threading

import numpy as np
import pandas as pd
import pytest

from lessons.cluster import hybrid_parallel as hp
from lessons.cluster import workers

pytestmark = pytest.mark.usefixtures("one_thread")
COST = hp.SequenceCost(quadratic_ns=10.0, linear_ns=1000.0, fixed_ns=500.0, spread_frac=0.1, longest=1000)


def test_a_fit_finds_the_coefficients_that_made_the_times():
    lengths = [10, 20, 50, 100, 400]
    cost = hp.fit(lengths, [3 * s**2 + 700 * s + 9000 for s in lengths])
    assert (cost.quadratic_ns, cost.linear_ns, cost.fixed_ns) == pytest.approx((3, 700, 9000))
    assert cost.longest == 400
    assert cost.spread_frac < 1e-9


def test_a_fit_has_no_negative_coefficient():
    cost = hp.fit([10, 20, 40], [100, 110, 115])  # bends downwards
    assert min(cost.quadratic_ns, cost.linear_ns, cost.fixed_ns) >= 0


@pytest.mark.parametrize(("lengths", "times"), [([1, 2], [1, 2]), ([1, 2, 2], [1, 2, 3]), ([1, 2, 3], [0, 1, 2])])
def test_a_fit_that_cannot_be(lengths, times):
    with pytest.raises(ValueError, match="three different lengths"):
        hp.fit(lengths, times)


def test_ranks_that_share_a_sequence_share_all_but_its_fixed_cost():
    assert COST.time_ns(100) == 10 * 100**2 + 1000 * 100 + 500
    assert COST.time_ns(100, 4) == (10 * 100**2 + 1000 * 100) / 4 + 500


def test_lengths_are_skewed_and_the_longest_is_among_them():
    lengths = hp.skewed_lengths(101, median=100, longest=4000, seed=3)
    assert lengths.shape == (101,)
    assert lengths.max() == 4000
    assert lengths.min() >= 16
    assert np.median(lengths) < lengths.mean()
    assert (lengths == hp.skewed_lengths(101, median=100, longest=4000, seed=3)).all()


def test_a_mesh_cuts_everything_and_packs_rows_in_order():
    mesh = hp.mesh([90, 30, 60, 20], 4, 50)  # the longest needs 2 ranks: groups of 2, rows of 100
    assert set(mesh.pieces["shared_by"]) == {2}
    rows = mesh.pieces.drop_duplicates(["length", "window"]).groupby("window")["length"].apply(list)
    assert rows.tolist() == [[90], [30, 60], [20]]
    assert mesh.pieces.groupby("window")["rank"].apply(set).tolist() == [{0, 1}, {2, 3}, {0, 1}]
    assert mesh.moved_tokens == 200  # half of each sequence, on both ranks


def test_a_mesh_pays_the_fixed_cost_once_per_row():
    times = hp.mesh([90, 30, 60, 20], 4, 50).rank_ns(COST)
    work = {s: (10 * s**2 + 1000 * s) / 2 for s in (90, 30, 60, 20)}
    assert times[0] == times[1] == pytest.approx(work[90] + 500 + work[20] + 500)
    assert times[2] == times[3] == pytest.approx(work[30] + work[60] + 500)


def test_a_slow_link_is_hidden_until_it_is_not():
    mesh = hp.mesh([100], 2, 50)
    computing = (10 * 100**2 + 1000 * 100) / 2
    assert mesh.rank_ns(COST, 1.0)[0] == pytest.approx(computing + 500)  # moving 50 tokens x 1000 ns hides
    assert mesh.rank_ns(COST, 10.0)[0] == pytest.approx(10 * 1000 * 50 + 500)


def test_naive_evens_out_tokens_and_balanced_evens_out_time():
    lengths = [50, 10, 10, 10, 10, 10]
    naive, balanced = hp.naive(lengths, 2, 50), hp.balanced(lengths, 2, 50, COST)
    assert naive.pieces.groupby("rank")["length"].sum().tolist() == [50, 50]
    assert balanced.rank_ns(COST).max() <= naive.rank_ns(COST).max()
    assert naive.moved_tokens == balanced.moved_tokens == 0


@pytest.mark.parametrize("seed", range(4))
def test_every_schedule_computes_every_sequence_once(seed):
    lengths = hp.skewed_lengths(60, median=40, longest=800, seed=seed)
    for one in (hp.mesh(lengths, 16, 100), hp.naive(lengths, 16, 100), hp.balanced(lengths, 16, 100, COST)):
        p = one.pieces
        assert (p["length"] / p["shared_by"]).sum() == pytest.approx(lengths.sum())
        assert p["rank"].between(0, 15).all()
    balanced = hp.balanced(lengths, 16, 100, COST).pieces
    assert (balanced["shared_by"] == np.ceil(balanced["length"] / 100)).all()
    # greedy scheduling of work that is dealt dearest first: the last piece put anywhere went to the least loaded
    times = hp.balanced(lengths, 16, 100, COST).rank_ns(COST)
    assert times.max() <= times.mean() + COST.time_ns(100)


def test_a_prediction_closes_and_says_when_it_extrapolates():
    short, far = hp.naive([100, 200], 2, 2000), hp.naive([100, 1500], 2, 2000)
    step = hp.predict(short, COST).closed()
    assert step.total == COST.time_ns(200)
    assert step.frame.loc["computing", "value"] == round((COST.time_ns(100) + COST.time_ns(200)) / 2)
    assert (step.low, step.high) == (round(0.7 * step.total), round(1.3 * step.total))
    assert step.in_range
    assert not hp.predict(far, COST).in_range


def test_the_table_of_schedules_compares_with_the_shortest():
    lengths = [100] * 3 + [10] * 10
    table = hp.compare([hp.naive(lengths, 4, 100), hp.balanced(lengths, 4, 100, COST)], COST, 0.0)
    assert table["times_shortest"].min() == 1
    assert list(table.index) == [hp.NAIVE, hp.BALANCED]
    assert table["in_range"].all()
    assert not hp.compare([hp.naive([1500], 4, 2000)], COST, 0.0)["in_range"].any()


def test_what_moving_takes_is_bytes_over_flops():
    # 3 x 100 bytes at 10 bytes/s: 30 s; 6 x 5 FLOPs at 1 per s: 30 s
    assert hp.moving_frac(num_params=5, kv_bytes=100, flops_per_s=1, bytes_per_s=10) == 1
    with pytest.raises(ValueError, match="above 0"):
        hp.moving_frac(bytes_per_s=0)


@pytest.mark.parametrize(("lengths", "ranks", "capacity"), [([], 2, 10), ([0], 2, 10), ([30], 2, 10), ([5], 2, 0)])
def test_sequences_that_do_not_fit(lengths, ranks, capacity):
    for way in (hp.mesh, hp.naive):
        with pytest.raises(ValueError, match="the longest fits"):
            way(lengths, ranks, capacity)


def test_a_mesh_of_groups_that_do_not_divide_the_ranks():
    with pytest.raises(ValueError, match="no multiple of the 2"):
        hp.mesh([90], 3, 50)


def test_ranks_are_really_run_and_pieces_are_refused():
    from effkit import models

    model = models.text(layers=1, hidden=32, vocabulary=50, device="cpu")
    cost = hp.calibrate(model, (16, 32, 64, 96), repeats=1)
    assert cost.longest == 96
    assert cost.time_ns(64) > 0
    step = hp.measure(hp.naive([16, 16, 96], 2, 96), model, repeats=1).closed()
    assert set(step.frame["basis"]) == {"measured"}
    assert step.frame.loc["waiting", "value"] > 0
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="cuts sequences over ranks"):
        hp.measure(hp.naive([96], 2, 48), model)


QUICK = workers.Setting(num_workers=3, num_rounds=6, least_s=0.001, extra_s=0.002, seed=1)


def test_the_slowest_of_n_exponential_times_is_a_harmonic_number():
    setting = workers.Setting(num_workers=4, least_s=0.5, extra_s=2.0)
    assert setting.slowest_s == pytest.approx(0.5 + 2 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    drawn = np.random.default_rng(0).exponential(2.0, (200_000, 4)).max(axis=1).mean() + 0.5
    assert setting.slowest_s == pytest.approx(drawn, rel=0.01)


def test_predictions_close_and_waiting_alone_differs():
    together = workers.predict(QUICK, workers.SYNCHRONOUS).closed()
    alone = workers.predict(QUICK, workers.ASYNCHRONOUS).closed()
    assert together.frame.loc["simulating", "value"] == alone.frame.loc["simulating", "value"] == alone.total
    assert together.total == pytest.approx(1e9 * 3 * 6 * QUICK.slowest_s, rel=1e-9)
    assert together.total / alone.total == pytest.approx(QUICK.slowest_s / QUICK.mean_s)


def test_one_worker_waits_for_nobody():
    assert workers.worth((1, 8))["expected"].tolist() == pytest.approx([1, (0.02 + 0.02 * 761 / 280) / 0.04])


@pytest.mark.parametrize("mode", [workers.SYNCHRONOUS, workers.ASYNCHRONOUS])
def test_a_run_closes_and_leaves_no_thread(mode):
    before = threading.active_count()
    run = workers.measure(QUICK, mode).closed()
    assert threading.active_count() == before
    planned = QUICK.times_s()
    # every wait lasts at least as long as it was to; quick workers' shares differ when nobody waits
    least = planned[:, :6].sum() if mode == workers.SYNCHRONOUS else 18 * QUICK.least_s
    assert run.frame.loc["simulating", "value"] >= 1e9 * least * 0.99
    assert run.setting["mode"] == mode


def test_synchronous_transitions_are_of_the_policy_as_it_is():
    old = workers.measure(QUICK, workers.SYNCHRONOUS).companions[0]
    assert old.total == 0
    assert workers.measure(QUICK, workers.ASYNCHRONOUS).companions[0].total > 0


def test_bars_are_times_of_one_worker():
    runs = {mode: workers.predict(QUICK, mode) for mode in (workers.SYNCHRONOUS, workers.ASYNCHRONOUS)}
    table = workers.bars(runs, QUICK)
    assert isinstance(table, pd.DataFrame)
    assert len(table) == 4
    assert table["step_ns"].iloc[0] == pytest.approx(1e9 * 6 * QUICK.slowest_s)


def test_words_and_numbers_that_workers_refuse():
    with pytest.raises(ValueError, match="'synchronous' or 'asynchronous'"):
        workers.predict(QUICK, "both")
    with pytest.raises(ValueError, match="expected at least 1"):
        workers.Setting(num_workers=0)
    assert math.isclose(QUICK.mean_s, 0.003)
