"""Knobs, bands and calibrations: the same words and the same arithmetic in all four analyses."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest

from effkit import Account, activations, decoder, lab, moe, padding
from effkit.activations import levers


@dataclass(frozen=True)
class Knobs:
    """One knob of each kind."""

    rows: int = lab.whole(4)
    skew: float = lab.number(0.5)
    kept_frac: float = lab.share(1.0, positive=True)
    cache: str = lab.one_of("on", words=("off", "on"))
    backward: bool = lab.flag(True)

    def __post_init__(self) -> None:
        lab.check(self)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rows": 0}, "rows is a whole number from 1 on; given: 0"),
        ({"rows": 1.5}, r"rows is a whole number from 1 on; given: 1\.5"),
        ({"rows": True}, "rows is a whole number from 1 on; given: True"),
        ({"rows": "4"}, "rows is a whole number from 1 on; given: '4'"),
        ({"skew": -1}, "skew is a number from 0 on; given: -1"),
        ({"skew": math.nan}, "skew is a number from 0 on; given: nan"),
        ({"skew": "half"}, "skew is a number from 0 on; given: 'half'"),
        ({"kept_frac": 0.0}, r"kept_frac is a share in \(0, 1\]; given: 0\.0"),
        ({"kept_frac": 1.1}, r"kept_frac is a share in \(0, 1\]; given: 1\.1"),
        ({"cache": "full"}, "cache is one of off, on; given: 'full'"),
        ({"cache": ["on"]}, r"cache is one of off, on; given: \['on'\]"),
        ({"backward": "yes"}, "backward is True or False; given: 'yes'"),
        ({"row": 2}, "no such knob: row; the knobs are rows, skew, kept_frac, cache, backward"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_one_sentence(changes, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}$"):
        lab.changed(Knobs(), changes)


def test_none_leaves_a_knob_as_it_is():
    assert lab.changed(Knobs(rows=2), {"rows": None, "skew": 1.0}) == Knobs(rows=2, skew=1.0)


def test_numbers_of_numpy_become_numbers_of_python():
    knobs = Knobs(rows=np.int64(3), skew=np.float64(0.25), backward=np.bool_(False))
    assert [type(value) for value in (knobs.rows, knobs.skew, knobs.backward)] == [int, float, bool]
    assert knobs == Knobs(rows=3, skew=0.25, backward=False)


@pytest.mark.parametrize("wrong", [1.5, True, "2"])
def test_the_labs_refuse_half_a_token_in_the_same_words(wrong):
    calls = {
        "num_tokens": lambda: moe.Setting(num_tokens=wrong),
        "num_steps": lambda: decoder.Setting(2, num_steps=wrong),
        "micro_batches": lambda: activations.Levers(micro_batches=wrong),
        "batch_size": lambda: levers.complete({"batch_size": 4, "micro_batches": 1}, {"batch_size": wrong}),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=rf"^{name} is a whole number from 1 on; given: {wrong!r}$"):
            call()


@pytest.mark.parametrize("analysis", [activations, decoder, moe, padding], ids=lambda module: module.__name__)
def test_an_account_without_calibration_is_refused_in_the_same_sentence(analysis):
    account = Account.of("Time of one step", "ns", {"step": 7}, total=7, source="a clock")
    name = analysis.__name__.removeprefix("effkit.")
    with pytest.raises(ValueError, match=rf"^this account carries no calibration; {name}\.measure\(\) makes one"):
        analysis.predict(account, num_steps=3)
    with pytest.raises(TypeError, match=rf"^base is an Account, of {name}\.measure\(\); given: dict$"):
        analysis.predict({}, num_steps=3)


def test_a_band_is_two_standard_errors_of_error_and_of_a_figures_noise():
    assert lab.Trust(0.05).band_frac == pytest.approx(0.10)
    assert lab.Trust(0.0, 0.03).band_frac == pytest.approx(2 * 0.03 * math.sqrt(math.pi / 2))
    medians = np.median(np.random.default_rng(0).normal(1, 0.03, (20_000, 25)), axis=1)
    assert lab.Trust(0.0, 0.03, num_repeats=25).band_frac == pytest.approx(2 * medians.std(), rel=0.05)
    assert lab.Trust(0.03, 0.04, num_repeats=math.pi / 2).band_frac == pytest.approx(0.10)
    assert lab.Trust(0.0, 0.0, least_frac=0.02).band_frac == 0.02


def test_a_band_widens_with_the_distance_and_in_a_regime_that_no_run_has_seen():
    trust = lab.Trust(0.05)
    assert trust.beyond(0.0) == trust.band_frac
    assert trust.beyond(2.0) == pytest.approx(3 * trust.band_frac)
    assert trust.beyond(1.0, seen=False) == pytest.approx(6 * trust.band_frac)
    assert lab.Trust(0.0).beyond(0.0, seen=False) == 0.3, "nothing was measured there"


def test_noise_is_the_standard_deviation_of_repeats_whatever_disturbs_one_or_drifts():
    draw = np.random.default_rng(0)
    for count in (2, 5):
        times = 100 * (1 + 0.03 * draw.standard_normal((400, count)))
        assert lab.noise(times) == pytest.approx(0.03, rel=0.1)
        assert lab.noise(times * (1 + np.arange(400))[:, None]) == pytest.approx(0.03, rel=0.1), "runs of any length"
    drifting = np.linspace(100, 120, 200) * (1 + 0.01 * draw.standard_normal(200))
    drifting[50] *= 3
    assert lab.noise([drifting]) == pytest.approx(0.01, rel=0.2)
    assert lab.noise([[5.0], []]) == 0


def test_an_interval_is_rounded_outwards_and_never_negative():
    assert lab.interval(100, 10.2) == {"low": 89, "high": 111}
    assert lab.interval(100, 150) == {"low": 0, "high": 250}
    banded = lab.banded(Account.of("Time", "ns", {"step": 100}, total=100, source="a clock"), 0.102)
    assert (banded.low, banded.high) == (89, 111)


def test_a_hull_covers_what_lies_between_runs_and_no_more():
    hull = lab.Hull.of([{"rows": 2, "cells": 10}, {"rows": 8, "cells": 5}])
    assert hull.covers({"rows": 8, "cells": 5})
    assert not hull.covers({"rows": 9, "cells": 5})
    assert not hull.covers({"rows": 1, "cells": 5})
    assert lab.Hull(hull.low, hull.high, room=1.25).covers({"rows": 10, "cells": 4})
    assert hull.doublings({"rows": 8.3, "cells": 4.9}) == 0, "a twentieth more is the same size"
    assert hull.doublings({"rows": 32, "cells": 5}) == 2
    assert hull.doublings({"rows": 1, "cells": 20}) == 1
    assert lab.Hull.of([{"skew": 0.0}]).doublings({"skew": 0.7}) == 1


def test_rms_is_the_root_of_the_mean_square_and_zero_of_nothing():
    assert lab.rms([0.3, -0.4]) == pytest.approx(math.sqrt(0.125))
    assert lab.rms([]) == 0
