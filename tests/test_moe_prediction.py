"""predict(), whatif(), best_degrees(), worth_balancing(), in a world whose costs are known: nothing is run."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from moe_world import COSTS, NUM_STEPS, measured, run_of, slower, truth

import effkit as ek
from effkit import moe
from effkit.account import Account
from effkit.moe import routing
from effkit.moe.calibration import calibrate, probes, total_ns
from effkit.moe.live import accounted
from effkit.moe.simulating import simulate

BASE = moe.Setting(num_tokens=256, hidden=128, ffn=256)


@pytest.fixture(scope="module")
def base():
    return measured(BASE, levers=("lsh", "bfloat16"))


UNSEEN = [
    {"num_tokens": 200}, {"num_tokens": 400}, {"hidden": 96}, {"ffn": 384}, {"top_k": 1}, {"top_k": 3},
    {"capacity_factor": 1.0}, {"capacity_factor": 1.25, "pad": True}, {"skew": 0.0}, {"skew": 1.5},
    {"num_chunks": 2}, {"num_chunks": 3, "num_chunks_backward": 2}, {"num_chunks": 4, "skew": 1.0}, {"num_experts": 12},
    {"placement": (1, 0, 1, 0, 1, 0, 1, 0)}, {"num_replicas": 2}, {"compress": "lsh", "num_clusters": 16},
    {"message_dtype": "bfloat16", "top_k": 1}, {"backward": False}, {"num_modalities": 2}, {"placement": "balanced"},
]  # fmt: skip


@pytest.mark.parametrize("change", UNSEEN, ids=str)
def test_a_setting_that_was_not_seen_is_predicted(base, change):
    guess, found = moe.predict(base, **change), truth(BASE.change(**change))
    receipt = ek.Receipt(guess, found)
    assert abs(receipt.error) < 0.03, receipt
    assert receipt.within_band
    exact = receipt.frame[receipt.frame["unit"].isin(["bytes", "tokens"])]
    assert len(exact) == 2
    assert (exact["error"] == 0).all()


def test_the_measured_setting_is_returned_as_it_is(base):
    assert moe.predict(base) is base
    assert moe.predict(base, num_tokens=256, skew=0.5) is base


def test_rows_are_predicted_too_and_close(base):
    guess, found = moe.predict(base, skew=1.5), truth(BASE.change(skew=1.5))
    guess.closed(1e-3)
    table = found.compare(guess)
    assert (table.loc[["experts", "dispatch moving", "combine moving"], "ratio"].sub(1).abs() < 0.05).all(), table
    assert guess.frame.loc["dispatch waiting", "value"] > base.frame.loc["dispatch waiting", "value"]


def test_what_the_calibration_has_not_seen_is_out_of_range(base):
    assert moe.predict(base, num_tokens=400).in_range
    assert not moe.predict(base, num_tokens=2048).in_range
    assert not moe.predict(base, num_chunks=8).in_range
    assert not moe.predict(base, dtype="bfloat16").in_range
    assert not moe.predict(base, num_ranks=4).in_range


def test_another_link_is_assumed_and_scales_what_moves(base):
    guess = moe.predict(base, link_bytes_per_s=50e6)
    assert not guess.in_range
    assert guess.frame.loc["dispatch moving", "basis"] == "assumed"
    assert guess.frame.loc["experts", "basis"] == "derived"
    half = truth(BASE, costs=COSTS.__class__(COSTS.phases, COSTS.moving * [1, 2, 1, 1]))
    assert guess.total == pytest.approx(half.total, rel=0.02)


def test_a_lever_whose_time_nobody_measured_is_refused():
    plain = measured(BASE)
    with pytest.raises(ValueError, match=r"compress='lsh' was not measured: measure\(..., levers=\('lsh',\)\)"):
        moe.predict(plain, compress="lsh")
    with pytest.raises(ValueError, match="no such knob: tokens"):
        moe.predict(plain, tokens=3)
    with pytest.raises(ValueError, match="9 experts cannot be shared equally by 2 ranks"):
        moe.predict(plain, num_experts=9)
    with pytest.raises(ValueError, match="carries no calibration"):
        moe.predict(truth(BASE), num_tokens=3)


def test_the_band_says_how_wrong_a_left_out_setting_was(base):
    guess = moe.predict(base, num_tokens=300)
    known = base.calibration
    assert guess.low < guess.total < guess.high
    assert guess.high - guess.total == pytest.approx(known.band_frac * guess.total, rel=1e-3)
    assert known.noise_frac == 0  # both rounds of this world are alike
    assert known.band_frac == pytest.approx(2 * known.error_frac)


def half_width(account):
    return (account.high - account.low) / 2 / account.total


def test_the_noise_of_a_step_is_less_than_that_of_one_round(base):
    """Of nine repeats a third."""
    known = replace(base.calibration, error_frac=0.0, noise_frac=0.12, walls_ns=[[1] * 3], num_steps=3)
    assert known.band_frac == pytest.approx(2 * (np.pi / 2) ** 0.5 * 0.12 / 3)


def slowed(run, factor):
    """The run, had every step taken ``factor(setting, round)`` times as long."""

    def longer(step):
        def times(rank):
            calls = [call._replace(start_ns=by(call.start_ns), end_ns=by(call.end_ns)) for call in rank.calls]
            phases = [(name, by(begin), by(end)) for name, begin, end in rank.phases]
            return type(rank)(by(rank.begin_ns), by(rank.turn_ns), by(rank.end_ns), phases, calls)

        by = partial(np.multiply, factor(run.settings[step.job], step.round))
        return step._replace(ranks=[times(rank) for rank in step.ranks])

    return replace(run, steps=[longer(step) for step in run.steps])


def calibrated(factor, levers=()):
    run = slowed(run_of(probes(BASE, 2, levers)), factor)
    return accounted(run, 0, calibrate(run))


def test_what_pieces_take_beyond_the_model_is_told_by_their_number():
    """The phases' own fit cannot take both: twice as many pieces are not twice as much of anything."""
    beyond = {1: 1.0, 2: 1.02, 4: 1.3}
    base = calibrated(lambda setting, _: np.mean([beyond[degree] for degree in setting.degrees]))
    for degree in (2, 4):
        found = beyond[degree] * truth(BASE.change(num_chunks=degree)).total
        assert moe.predict(base, num_chunks=degree).total == pytest.approx(found, rel=0.04)
    anchors = base.calibration.anchors
    assert sorted(anchors) == [1, 2, 4]
    assert anchors[2] < anchors[4]
    between = base.calibration.anchor(BASE.change(num_chunks=3))
    assert anchors[2] < between < anchors[4], "on the line between, and not beyond the last"
    assert base.calibration.anchor(BASE.change(num_chunks=8)) == anchors[4]


def test_what_differs_from_launch_to_launch_is_in_the_band_of_what_runs_in_pieces():
    """Ten percent slower in the second of two: a third may be as far from the mean of those two."""

    def factor(setting, launch):
        return 1.1 if launch and max(setting.degrees) > 1 else 1.0

    base = calibrated(factor)
    known = base.calibration
    assert known.noise_frac == 0
    assert known.launch_noise_frac == pytest.approx(1.4826 / 2**0.5 * 0.1 / 1.05 * 1.5**0.5, rel=0.01)
    plain, pieces = (half_width(moe.predict(base, **change)) for change in ({"num_tokens": 300}, {"num_chunks": 3}))
    assert plain == pytest.approx(2 * known.error_frac, rel=1e-3)
    assert pieces == pytest.approx(2 * np.hypot(known.pieces_error_frac, known.launch_noise_frac), rel=1e-3)
    moved = known.moved(run_of([BASE, BASE.change(num_chunks=2)]), 1, 1.0)
    assert half_width(moe.predict(replace(base, calibration=moved), num_tokens=300)) > plain, "its base is in pieces"


def test_a_band_is_as_wide_as_settings_of_its_kind_were_wrong():
    """What is in pieces may be modelled badly while whole exchanges are not; with a lever it may be either."""
    known = calibrated(lambda setting, _: 1.3 if setting.num_chunks == 2 else 1.0, levers=("lsh",))
    apart = replace(known.calibration, error_frac=0.01, pieces_error_frac=0.1, noise_frac=0.0, launch_noise_frac=0.0)
    base = replace(known, calibration=apart)
    changes = {"whole": {"num_tokens": 300}, "pieces": {"num_chunks": 2}, "lever": {"compress": "lsh"}}
    of = {name: half_width(moe.predict(base, **change)) for name, change in changes.items()}
    assert of["whole"] == pytest.approx(0.02, rel=1e-3)
    assert of["pieces"] == pytest.approx(0.2, rel=1e-3)
    assert of["lever"] == pytest.approx(2 * np.sqrt((0.01**2 + 0.1**2) / 2), rel=1e-3)
    assert known.calibration.pieces_error_frac > 3 * known.calibration.error_frac


def test_a_machine_whose_speed_drifts_makes_no_noise():
    known = calibrated(lambda _, launch: 1.0 + 0.2 * launch).calibration
    assert known.noise_frac == pytest.approx(0, abs=1e-6)
    assert known.launch_noise_frac == pytest.approx(0, abs=1e-6)


def test_another_round_is_run_where_it_makes_the_band_clearly_narrower(base):
    known = replace(base.calibration, walls_ns=[[1] * 2], num_steps=3)
    assert not replace(known, error_frac=0.03, noise_frac=0.01).shrinks
    assert replace(known, error_frac=0.01, noise_frac=0.05).shrinks


def test_combinations_that_no_run_had_are_another_regime(base):
    """LSH was run, and overlapped exchanges were; together they were not: 34% off where that was tried."""
    lsh, both = moe.predict(base, compress="lsh"), moe.predict(base, compress="lsh", num_chunks=2)
    assert lsh.in_range
    assert not both.in_range
    assert half_width(both) > 2.9 * half_width(lsh)
    assert not moe.predict(base, num_replicas=2).in_range
    assert moe.predict(base, num_chunks_backward=4).in_range


def test_the_band_widens_beyond_what_was_run(base):
    inside, beyond = moe.predict(base, num_tokens=300), moe.predict(base, num_tokens=2048)
    assert half_width(beyond) == pytest.approx(3 * half_width(inside), rel=0.02)  # two doublings of 2 x 256 tokens
    assert half_width(moe.predict(base, num_ranks=4)) >= 1.99 * half_width(inside)
    assert half_width(moe.predict(base, link_bytes_per_s=50e6)) == pytest.approx(2 * half_width(inside), rel=1e-2)


def test_a_lever_that_takes_longer_than_modelled_is_told_by_its_run():
    """Whatever the model misses of a lever, its run has seen: half as long again at its own size, and at others."""
    jobs = probes(BASE, 2, ("lsh",))
    run = run_of(jobs)
    (of_lever,) = (job for job, setting in enumerate(jobs) if setting.compress == "lsh")
    steps = [step if step.job != of_lever else stretched(step, 1.5) for step in run.steps]
    base = accounted(run, 0, calibrate(replace(run, steps=steps)))
    slow = 1.5 * truth(BASE.change(compress="lsh")).total
    assert moe.predict(base, compress="lsh").total == pytest.approx(slow, rel=1e-3)
    plain = moe.predict(measured(BASE), num_tokens=300).total
    assert moe.predict(base, num_tokens=300).total == pytest.approx(plain, rel=0.02)


def stretched(step, factor):
    """The same step where one more wait, that no cost explains, comes at the end."""
    wall = max(rank.end_ns for rank in step.ranks)
    return step._replace(ranks=[rank._replace(end_ns=rank.end_ns + round((factor - 1) * wall)) for rank in step.ranks])


def test_ranks_that_share_cores_wait_less_for_the_busiest():
    """Where all of a product's time is competition, the busiest rank alone is quick: the more uneven, the less."""
    experts = {
        key: np.array([0, 0, 0, 0, 0, 0, value[1]]) for key, value in COSTS.phases.items() if key[2] == "experts"
    }
    there = replace(COSTS, phases={**COSTS.phases, **experts})
    base = measured(BASE, costs=there)
    for skew in (0.0, 1.5):
        found = truth(BASE.change(skew=skew), costs=there)
        assert moe.predict(base, skew=skew).total == pytest.approx(found.total, rel=0.02)


@pytest.mark.parametrize("factor", [0.1, 1.0, 6.0])
def test_the_best_degrees_are_those_of_an_exhaustive_search(factor):
    there = slower(factor)
    base = measured(BASE.change(num_tokens=512), costs=there)
    setting = base.calibration.setting

    def time_ns(forward, backward):
        changed = setting.change(num_chunks=forward, num_chunks_backward=backward)
        return total_ns([simulate(changed, n, 2, 1, there) for n in range(NUM_STEPS)])

    chosen = moe.best_degrees(base, most=5)
    every = {(f, b): time_ns(f, b) for f in range(1, 6) for b in range(1, 6)}
    assert every[chosen] <= 1.02 * min(every.values()), (chosen, min(every, key=every.get))


def test_balance_is_worth_what_the_waiting_says(base):
    table = moe.worth_balancing(base)
    assert table.loc["now", "step_ns"] == base.total
    assert table.loc["now", "saved_ns"] == 0
    assert table.loc["perfect balance", "step_ns"] < base.total
    assert (table["saved_ns"] == base.total - table["step_ns"]).all()
    assert table.loc["capacity 1.0", "dropped_frac"] > 0
    assert (table.drop("capacity 1.0")["dropped_frac"] == 0).all()


def test_balance_of_ones_own_loads(base):
    own = np.full((2, 2, 8), 64)
    even = moe.worth_balancing(base, own)
    assert even.loc["perfect balance", "saved_ns"] == pytest.approx(0, abs=even.loc["now", "step_ns"] * 1e-6)
    own[:, :, 0] += 300
    uneven = moe.worth_balancing(base, own)
    assert uneven.loc["perfect balance", "saved_frac"] > 0.03
    with pytest.raises(ValueError, match="loads are tokens by step, rank and expert"):
        moe.worth_balancing(base, np.ones((2, 8)))


def test_the_timeline_of_a_prediction_and_of_a_measurement(base):
    for account in (base, moe.predict(base, num_chunks=4)):
        frame = moe.timeline(account)
        assert set(frame["rank"]) == {0, 1}
        assert (frame["end_ns"] > frame["start_ns"]).all()
        for _, rows in frame.groupby(["rank", "lane"]):
            assert (rows["start_ns"].to_numpy()[1:] >= rows["end_ns"].to_numpy()[:-1] - 1).all(), "lanes do not overlap"
        assert {"experts", "dispatch moving", "combine moving"} <= set(frame["what"])
    with pytest.raises(ValueError, match="no calibration"):
        moe.timeline(truth(BASE))


def test_sliders_rest_at_the_measurement_and_show_exact_bytes(base):
    panel = moe.whatif(base)
    assert panel.result is base
    panel.controls["num_tokens"].value = 192
    assert panel.result.total == moe.predict(base, num_tokens=192).total
    sent = panel.result.companions[1]
    assert isinstance(sent, Account)
    expected = [routing.traffic(BASE.change(num_tokens=192), 2, n) for n in range(NUM_STEPS)]
    rows = np.mean([traffic.moved[0, 1] + traffic.moved[1, 0] for traffic in expected])
    counts = 2 * 8 * BASE.num_experts
    each = 2 * rows * BASE.hidden * 4
    assert sent.total == round(each + counts) + round(each)
    panel.controls["num_replicas"].value = 7
    assert "cannot be shared equally" in panel.shown()


def test_a_run_of_one_setting_is_accounted_for():
    found = truth(BASE.change(num_chunks=4))
    found.closed(0.02)
    told = found.companions[0]
    assert told.frame.loc["dispatch hidden", "value"] > 0
    plain = truth(BASE).companions[0].frame["value"]
    assert plain["dispatch hidden"] == plain["combine hidden"] == 0


def test_the_time_of_ranks_that_are_several_on_a_node():
    four = run_of([BASE], num_ranks=4, ranks_per_node=2)
    one = run_of([BASE], num_ranks=4, ranks_per_node=1)
    assert total_ns(four.of_job(0)) < total_ns(one.of_job(0)), "bytes within a node do not take the link"
