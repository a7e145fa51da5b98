"""Alpha and bandwidth of made-up and of real links."""

import numpy as np
import pandas as pd
import pytest

from effkit.ranks import launching
from effkit.ranks.links import fit, link, links

SIZES = [2**power for power in range(10, 23)]
needs_links = pytest.mark.skipif(bool(launching.why_no_links()), reason=launching.why_no_links())


def measured(dur_ns, noise=0.0, repeats=5) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    rows = [(size, dur_ns(size) * np.exp(rng.normal(0, noise))) for _ in range(repeats) for size in SIZES]
    return pd.DataFrame(rows, columns=["size_bytes", "dur_ns"])


# made up


def test_one_line_is_fitted_as_one():
    """Four ranks on two nodes: 8 of the 12 messages cross, so 1 ns per message's byte are 8 GB/s."""
    seen = fit(measured(lambda size: 300_000 + size), 4, 2, nominal_bytes_per_s=8.1e9)
    assert seen.num_messages == 8
    assert len(seen.regimes) == 1
    assert seen.alpha_ns == pytest.approx(300_000)
    assert seen.bandwidth_bytes_per_s == pytest.approx(8e9)
    assert seen.error_frac < 1e-9
    assert seen.dur_ns(10_000).dur_ns == pytest.approx(310_000)
    assert seen.shaped
    assert repr(seen) == (
        "An all-to-all of 4 ranks (2 on a node), through one trunk limited to 8,100 MB/s:\n"
        "  all messages: 300.0 us and 8,000.0 MB/s, 98.8% of the limit\n"
        "  8 messages of 1.0 KiB to 4.0 MiB cross each time; held-out error 0.0%"
    )


def test_other_ranks_are_connected_alike():
    times = measured(lambda size: 300_000 + size)
    assert fit(times, 4, 2, 8e9).between == {"link_bytes_per_s": 8e9, "ranks_per_node": 2}
    assert fit(times, 2, 2).between == {"link_bytes_per_s": 0.0, "ranks_per_node": 0}  # of any number on one machine


def test_noise_does_not_make_two_regimes_and_is_told():
    seen = fit(measured(lambda size: 300_000 + size, noise=0.1, repeats=9), 2, 2)
    assert len(seen.regimes) == 1
    assert seen.num_messages == 2
    assert seen.bandwidth_bytes_per_s == pytest.approx(2e9, rel=0.1)
    assert 0.01 < seen.error_frac < 0.15
    assert seen.frame["spread_frac"].median() == pytest.approx(0.1, rel=0.5)
    assert "not limited" in repr(seen)


def test_small_and_large_messages_have_lines_of_their_own():
    seen = fit(measured(lambda size: 200_000 + size / 10 if size <= 2**16 else 1_000_000 + 2 * size), 2, 2)
    small, large = seen.regimes
    assert 2**16 < small.most_bytes < 2**17
    assert (small.alpha_ns, large.alpha_ns) == (pytest.approx(200_000), pytest.approx(1_000_000))
    assert (seen.alpha_ns, seen.bandwidth_bytes_per_s) == (pytest.approx(200_000), pytest.approx(1e9))
    assert "up to 90.5 KiB messages: 200.0 us" in repr(seen)
    assert seen.dur_ns(2**20).dur_ns == pytest.approx(1_000_000 + 2**21)


def test_held_out_sizes_were_not_seen():
    """A size that is off by itself is off when it is held out, and its neighbours hardly."""
    seen = fit(measured(lambda size: (300_000 + size) * (2 if size == 2**16 else 1)), 2, 2)
    errors = seen.frame["held_out_error"]
    assert errors[2**16] == pytest.approx(-0.5, abs=0.01)
    assert errors.isna().sum() == 2
    assert np.isnan(errors[[2**10, 2**22]]).all()
    assert seen.error_frac == pytest.approx(np.sqrt(np.nanmean(errors**2)))


def test_the_band_holds_two_standard_errors_and_no_floor():
    exact = fit(measured(lambda size: 300_000 + size), 2, 2)
    dur_ns, low_ns, high_ns, in_range = exact.dur_ns(2**20)
    assert (low_ns, high_ns) == (pytest.approx(dur_ns), pytest.approx(dur_ns))
    assert in_range
    noisy = fit(measured(lambda size: 300_000 + size, noise=0.2), 2, 2)
    told = noisy.dur_ns(2**20)
    half = 2 * np.hypot(noisy.error_frac, np.sqrt(np.pi / 2) * noisy.noise_frac)
    assert told.high_ns == pytest.approx(told.dur_ns * (1 + half))
    assert noisy.noise_frac == pytest.approx(0.2 / np.sqrt(5), rel=0.3)


def test_beyond_the_sizes_that_were_measured_the_band_widens_with_the_doublings():
    seen = fit(measured(lambda size: 300_000 + size, noise=0.1), 2, 2)
    inside, twice, four = (seen.dur_ns(2**power) for power in (22, 23, 24))
    wide = [(one.high_ns - one.dur_ns) / one.dur_ns for one in (inside, twice, four)]
    assert wide == pytest.approx([wide[0], 2 * wide[0], 3 * wide[0]])
    assert (inside.in_range, twice.in_range, seen.dur_ns(0).in_range) == (True, False, False)
    assert seen.dur_ns(1.04 * 2**22).in_range, "the default room of a hull"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: fit(measured(float)[:3], 2, 2), "takes 4 sizes or more; given: 3"),
        (lambda: fit(measured(lambda size: 1 + size), 2, 2).dur_ns(-1), "0 or more; given: -1"),
        (lambda: link(num_repeats=0), "num_repeats is a whole number from 1 on; given: 0"),
        (lambda: links(kinds="all-reduce"), "kinds are some of all-to-all, .*, in a list; given: 'all-reduce'"),
        (lambda: links(kinds=["all-reduce", "gather"]), "kinds are some of .*; given: .*'gather'"),
        (lambda: link(1), "num_ranks is 2 to 8"),
    ],
)
def test_what_cannot_be_is_refused(call, said):
    with pytest.raises(ValueError, match=said) as error:
        call()
    assert "\n" not in str(error.value)


# real


@needs_links
def test_a_limited_link_has_its_nominal_rate_and_ranks_of_a_node_do_not_use_it():
    """Were the messages within nodes to cross as well, 12 rather than 8, the rate would seem a third less."""
    seen = link(4, link_bytes_per_s=50e6, ranks_per_node=2, num_repeats=3)
    assert seen.num_messages == 8
    assert seen.bandwidth_bytes_per_s == pytest.approx(50e6, rel=0.1)
    largest = seen.frame.iloc[-1]
    assert seen.num_messages * seen.frame.index[-1] / largest["dur_ns"] * 1e9 == pytest.approx(50e6, rel=0.1)
    assert "(2 on a node), through one trunk limited to 50 MB/s" in repr(seen)
