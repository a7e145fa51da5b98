"""A Lever's gain and its band, how Advice ranks and adds up, what a Study takes: on made-up accounts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit.account import Account
from effkit.advice import Study
from effkit.advice.levers import Advice, Lever, banded, ranked
from effkit.advice.overviews import NO_CEILINGS, Overview
from effkit.receipt import Receipt

STEP_NS = 1_000_000


def account(total=STEP_NS, unit="ns", **more):
    return Account.of("Time of one step", unit, {"all": total}, total=total, source="a formula", **more)


def lever(kind, gain, half_width=0.01, *, base=None, **more):
    base = base or account()
    total = base.total * (1 - gain)
    predicted = banded(base, {"left": round(total)}, total, half_width * base.total, "a formula")
    return Lever(kind, f"less {kind}", f"{kind} was seen", base, predicted, f"do({kind!r})", **more)


# One lever


def test_gain_and_band_are_shares_of_the_base():
    one = Lever("padding", "a", "b", account(1000), account(750, low=700, high=900), "c")
    assert one.gain_frac == pytest.approx(0.25)
    assert one.gain_band == pytest.approx((0.1, 0.3))  # the highest prediction is the least gain


@given(st.floats(-0.5, 0.9), st.floats(0, 0.4))
def test_the_band_encloses_the_gain(gain, half_width):
    one = lever("padding", gain, half_width)
    least, most = one.gain_band
    assert least <= one.gain_frac <= most
    assert most - least <= 2 * half_width + 2e-6


@pytest.mark.parametrize(("gain", "half_width", "helps"), [
    (0.10, 0.05, True), (0.10, 0.0, True), (0.10, 0.15, False), (0.10, 0.10, False), (-0.10, 0.05, False),
    (0.0, 0.0, False), (-0.01, 0.05, False),
])  # fmt: skip
def test_it_helps_only_if_its_band_leaves_out_no_gain(gain, half_width, helps):
    assert lever("padding", gain, half_width).helps is helps


def test_its_repr_tells_gain_band_and_every_side_effect():
    text = repr(lever("padding", 0.25, 0.05, side_effects=("the peak rises", "order changes")))
    assert text.splitlines() == [
        "less padding: saves 25% (band 20% to 30%)", "  padding was seen", "  but: the peak rises",
        "  but: order changes",
    ]  # fmt: skip


def test_without_a_use_apply_says_what_to_write():
    with pytest.raises(RuntimeError, match=r"“less padding” is a change of your code.*do\('padding'\)"):
        lever("padding", 0.2).apply()
    assert lever("padding", 0.2, use=lambda: "a loader").apply() == "a loader"


def test_without_something_live_it_cannot_be_measured():
    with pytest.raises(RuntimeError, match="nothing to measure “less padding” on: study a live model"):
        lever("padding", 0.2).measure()


def test_a_measurement_is_a_receipt_and_is_handed_to_keep():
    kept = []
    one = lever("padding", 0.2, 0.05, run=lambda: account(820_000), keep=kept.append)
    receipt = one.measure()
    assert kept == [receipt]
    assert isinstance(receipt, Receipt)
    assert receipt.predicted is one.predicted
    assert receipt.measured.total == 820_000
    assert receipt.within_band
    assert receipt.setting == {"lever": "less padding"}
    assert not lever("padding", 0.2, 0.05, run=lambda: account(900_000)).measure().within_band


def test_a_measurement_that_fails_leaves_no_receipt():
    kept = []

    def run():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        lever("padding", 0.2, run=run, keep=kept.append).measure()
    assert kept == []


# banded()


def test_a_prediction_has_the_form_of_its_base():
    base = account(1000, setting={"num_steps": 4})
    made = banded(base, {"left": 700}, 700.4, 50.6, "a formula", in_range=False)
    assert (made.title, made.unit, made.total, made.low, made.high) == (base.title, "ns", 700, 649, 751)
    assert made.setting == {"num_steps": 4}
    assert made.source == "a formula"
    assert not made.in_range
    assert set(made.frame["basis"]) == {"derived"}


@pytest.mark.parametrize(("total", "half_width", "expected"), [
    (10, 30, (0, 10, 40)), (-5, 2, (0, 0, 2)), (100, -3, (100, 100, 100)), (0, 0, (0, 0, 0)),
])  # fmt: skip
def test_no_prediction_falls_below_nothing(total, half_width, expected):
    made = banded(account(), {}, total, half_width, "a formula")
    assert (made.low, made.total, made.high) == expected


# Ranked


def test_the_best_comes_first_and_what_may_not_help_stands_apart():
    small, large, doubtful, harm = (
        lever("a", 0.1), lever("b", 0.4), lever("c", 0.3, 0.35), lever("d", -0.2)
    )  # fmt: skip
    advice = ranked("time", [small, doubtful, harm, large], notes=("a note",))
    assert list(advice) == [large, small]
    assert advice.rejected == (doubtful, harm)
    assert advice.goal == "time"
    assert advice.notes == ("a note",)
    assert (len(advice), advice[0], advice[-1], tuple(advice[:1])) == (2, large, small, (large,))
    assert large in advice
    assert harm not in advice


def test_levers_on_different_problems_act_on_what_the_others_leave():
    advice = ranked("time", [lever("a", 0.5), lever("b", 0.2)])
    assert advice.frame["after_those_above"].tolist() == pytest.approx([0.5, 0.1])
    assert advice.together == pytest.approx(0.6)


def test_levers_of_one_group_or_kind_are_not_added_twice():
    advice = ranked("time", [
        lever("a", 0.5, group="batches"), lever("b", 0.4, group="batches"), lever("c", 0.2), lever("c", 0.1),
    ])  # fmt: skip
    assert advice.frame["after_those_above"].tolist() == pytest.approx([0.5, 0.0, 0.1, 0.0])
    assert advice.together == pytest.approx(0.6)


@given(st.lists(st.tuples(st.floats(0.02, 0.95), st.sampled_from("abcd")), max_size=8))
def test_what_is_saved_one_after_another_sums_to_the_whole(given_levers):
    advice = ranked("time", [lever(kind, gain) for gain, kind in given_levers])
    frame = advice.frame
    assert frame["after_those_above"].sum() == pytest.approx(advice.together)
    assert 0 <= advice.together < 1
    assert advice.together >= max((one.gain_frac for one in advice), default=0) - 1e-9
    assert frame["gain_frac"].is_monotonic_decreasing


# As frames and pages


def test_nothing_helps():
    advice = ranked("time", [lever("a", 0.0)], notes=("within <budget>",))
    assert repr(advice) == "Advice for time: nothing here is predicted to help\n  within <budget>"
    assert "within &lt;budget&gt;" in advice._repr_html_()
    assert "<budget>" not in advice._repr_html_()
    assert advice.frame.empty
    assert advice.frame.index.name == "lever"
    assert set(advice.frame) == {"kind", "gain_frac", "least_frac", "most_frac", "after_those_above", "but"}
    assert advice.together == 0


def test_frame_has_one_row_per_lever():
    row = ranked("time", [lever("a", 0.25, 0.05, side_effects=("x", "y"))]).frame.loc["less a"]
    assert (row["kind"], row["but"]) == ("a", "x; y")
    assert row[["gain_frac", "least_frac", "most_frac"]].tolist() == pytest.approx([0.25, 0.2, 0.3])
    assert "gpu_hours" not in row
    assert "money" not in row


def test_hours_and_money_of_the_whole_run():
    base = account(3_600_000_000)  # 3.6 s a step, 1,000 steps an hour
    candidates = [lever("a", 0.5, base=base), lever("b", 0.2, base=base)]
    advice = ranked("cost", candidates, price_per_hour=2.5, num_steps=2000, num_devices=4)
    assert advice.frame["gpu_hours"].tolist() == pytest.approx([4.0, 1.6])
    assert advice.frame["money"].tolist() == pytest.approx([10.0, 4.0])
    assert "saved together: 4.8 GPU-hours over 2,000 steps, 12.00 at 2.50 an hour" in repr(advice)
    without = ranked("time", candidates, num_steps=2000)
    assert "money" not in without.frame
    assert repr(without).splitlines()[-1] == "  saved together: 1.2 GPU-hours over 2,000 steps"


def test_bytes_cost_no_hours():
    base = account(1 << 20, "bytes")
    advice = Advice("memory", (lever("a", 0.5, base=base),), price_per_hour=2.0, num_steps=100)
    assert "gpu_hours" not in advice.frame
    assert "hour" not in repr(advice)


def test_words_in_a_table_are_escaped():
    odd = replace(lever("a", 0.5, side_effects=("<i>slower</i>",)), name="<b>&", found="x < y")
    page = ranked("time", [odd], notes=("1 < 2",))._repr_html_()
    for text in ("&lt;b&gt;&amp;", "x &lt; y", "&lt;i&gt;slower&lt;/i&gt;", "1 &lt; 2"):
        assert text in page
    assert "<i>" not in page
    assert page.count("<tr>") == page.count("</tr>") == 2


def test_numbers_in_the_repr_follow_the_ranking():
    advice = ranked("time", [lever("a", 0.1), lever("b", 0.4)])
    lines = repr(advice).splitlines()
    assert lines[0] == "Advice for time: together 46% less"
    assert [line.strip()[:9] for line in lines if "saves" in line] == ["1. less b", "2. less a"]


# What a study takes, before it runs anything


class Still(Study):
    """Says what advise() hands on."""

    def __init__(self, *accounts):
        super().__init__("a thought")
        self.accounts, self.looked = accounts or (account(),), 0

    def _look(self):
        self.looked += 1
        return Overview(self.accounts, NO_CEILINGS, ("found <this>",), ("that & more",))

    def _advise(self, goal, budget_bytes, **more):
        return Advice(goal, (), notes=(repr(budget_bytes),), **more)


@pytest.mark.parametrize("goal", ["speed", "Time", "", None])
def test_another_goal(goal):
    with pytest.raises(ValueError, match=rf"goal is one of time, memory, cost; given: {goal!r}"):
        Still().advise(goal)


@pytest.mark.parametrize("name", ["budget_bytes", "price_per_hour", "num_steps", "num_devices"])
@pytest.mark.parametrize("value", [0, -2])
def test_numbers_are_positive(name, value):
    with pytest.raises(ValueError, match=rf"{name} is a (whole number from 1 on|number above 0, .*); given: {value}"):
        Still().advise(**{name: value})


@pytest.mark.parametrize("given", [{}, {"price_per_hour": 2.0}, {"num_steps": 5}])
def test_cost_wants_a_price_and_steps(given):
    with pytest.raises(ValueError, match=r"goal='cost' takes price_per_hour= and num_steps="):
        Still().advise("cost", **given)


def test_what_is_asked_for_is_handed_on():
    advice = Still().advise("cost", budget_bytes=7, price_per_hour=2.0, num_steps=5, num_devices=3)
    assert (advice.goal, advice.notes) == ("cost", ("7",))
    assert (advice.price_per_hour, advice.num_steps, advice.num_devices) == (2.0, 5, 3)
    assert Still().advise().goal == "time"


def test_one_looks_once():
    study = Still()
    assert study.overview() is study.overview()
    assert study.looked == 1


@pytest.mark.parametrize("other", [None, account(), "a study"])
def test_a_study_is_compared_with_a_study(other):
    with pytest.raises(TypeError, match=rf"compare\(\) takes another study; given: {type(other).__name__}"):
        Still().compare(other)


def test_compared_row_by_row():
    table = Still(account(1000)).compare(Still(account(600)))
    assert list(table) == ["before", "after", "difference", "ratio"]
    assert table.loc[("Time of one step", "all")].tolist() == [1000, 600, -400, 0.6]
    assert table.index.names == ["account", "item"]
    with pytest.raises(ValueError, match="no account in common: compare studies of one kind of run"):
        Still().compare(Still(account(5, "bytes")))


def test_a_page_without_memory_says_so():
    view = Still().overview()
    with pytest.raises(ValueError, match="memory is not visible in this study: that & more"):
        view.memory  # noqa: B018
    page = view._repr_html_()
    assert "found &lt;this&gt;" in page
    assert "<b>not visible</b>: that &amp; more" in page
