"""The meter of steps, time, FLOPs and tokens to a target, on trainings whose counts a hand knows; and its text."""

import pandas as pd
import pytest
import torch

from lessons import corpora, meter


class Falling:
    """A loss of 10 that falls by `by` a step; every third step is of another phase and does twice the work."""

    def __init__(self, by=1.0):
        self.by, self.done = by, 0

    @property
    def phase(self):
        return "large" if self.done % 3 == 2 else "small"

    @property
    def num_tokens(self):
        return 20 if self.phase == "large" else 10

    def step(self):
        for _ in range(2 if self.phase == "large" else 1):
            torch.ones(4, 5) @ torch.ones(5, 6)
        self.done += 1

    def loss(self):
        return 10 - self.by * self.done


def test_steps_tokens_and_flops_of_every_phase_are_counted():
    found = meter.to_target(lambda seed: Falling(), 4.0, seeds=(0, 7), every=2)
    assert found.reached.to_dict() == {0: True, 7: True}
    rows = found.runs.loc[7]
    assert rows["num_steps"].to_dict() == {"small": 4, "large": 2}
    assert rows["num_tokens"].to_dict() == {"small": 40, "large": 40}
    assert rows["flops"].to_dict() == {"small": 4 * 240, "large": 2 * 480}
    assert (rows["dur_ns"] > 0).all()
    assert found.totals()["num_steps"].to_list() == [6, 6]
    assert found.curves[7].dropna().to_dict() == {0: 10, 2: 8, 4: 6, 6: 4}


def test_what_does_not_arrive_says_so():
    found = meter.to_target(lambda seed: Falling(by=1.0 if seed else 0.1), 4.0, seeds=(0, 1), every=5, max_steps=20)
    assert found.reached.to_dict() == {0: False, 1: True}
    assert found.totals()["num_steps"].to_list() == [20, 10], "looked at every fifth step"
    assert meter.summary({"a": found}).loc["a", "arrived"] == "1 of 2"


def test_times_less_pairs_the_seeds():
    slow = meter.to_target(lambda seed: Falling(by=0.5), 4.0, seeds=(0, 1), every=1)
    quick = meter.to_target(lambda seed: Falling(by=1.0 + seed), 4.0, seeds=(0, 1), every=1)
    assert meter.times_less(quick, slow).to_dict() == {"median": 3.0, "low": 2.0, "high": 4.0}


def test_the_account_is_of_the_median_seed():
    found = meter.to_target(lambda seed: Falling(by=(1.0, 2.0, 3.0)[seed]), 4.0, every=1)
    account = found.account("num_steps")
    assert account.total == 3
    assert account.closed().unit == "steps"
    assert [one.unit for one in account.companions] == ["ns", "FLOPs", "tokens"]


def test_settings_are_checked():
    for wrong in ({"every": 0}, {"max_steps": 0}, {"seeds": ()}):
        with pytest.raises(ValueError, match="expected at least 1 of each"):
            meter.to_target(lambda seed: Falling(), 1.0, **wrong)


def test_curves_are_means_over_seeds():
    found = meter.to_target(lambda seed: Falling(by=1.0 + seed), 8.0, seeds=(0, 1), every=1)
    expected = pd.Series([10.0, 8.5, 8.0], index=pd.Index([0, 1, 2], name="step"), name="way")
    pd.testing.assert_series_equal(meter.mean_curves({"way": found})["way"], expected)


def test_curves_are_drawn_with_their_seeds_and_target_and_without_the_untrained_loss():
    ways = {"one": meter.to_target(lambda seed: Falling(by=1.0 + seed), 6.0, seeds=(0, 1), every=1)}
    ax = meter.draw(ways, "nats", "Loss", 6.0)
    drawn = [line.get_ydata().tolist() for line in ax.lines if len(line.get_xdata()) > 2]
    assert drawn[0] == [9, 8, 7, 6], "the first seed, from the first step on"
    assert drawn[-1] == [8.5, 7, 7, 6], "the mean of those that still ran"
    assert ax.get_title(loc="left") == "Loss"
    assert "target" in [line.get_label() for line in ax.lines]


def test_text_is_there_and_its_pieces_are_its_own():
    text = corpora.english()
    assert len(text) > 300_000
    assert len(corpora.code()) > len(text)
    ids = corpora.encode("Az\u00e4")
    assert ids.tolist() == [65, 122, 63]
    train, held_out = corpora.split(torch.arange(100), held_out_frac=0.2)
    assert (len(train), held_out[0].item()) == (80, 80)
    spread = corpora.windows(torch.arange(100), 3, 10)
    assert spread[:, 0].tolist() == [0, 45, 90]
    drawn = corpora.windows(torch.arange(100), 50, 10, torch.Generator().manual_seed(0))
    assert (drawn.diff(dim=1) == 1).all()
    assert drawn.max() < 100
    with pytest.raises(ValueError, match="the text has 5 letters, expected at least the 10"):
        corpora.windows(torch.arange(5), 1, 10)
