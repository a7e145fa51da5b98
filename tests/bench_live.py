"""What a reader waits for when something is measured live, each beside its bar: ``make bench``, on an idle machine."""

from __future__ import annotations

import statistics
import time

import pytest
from bench_table import row

import effkit as ek
from effkit import decoder, moe

NUM_TIMES = 3
needs_links = pytest.mark.skipif(bool(moe.why_no_links()), reason=moe.why_no_links())


pytestmark = pytest.mark.usefixtures("one_thread")


def held(what, run, bar_s, num_times=NUM_TIMES):
    """Whether the median of some runs is within its bar."""
    times = []
    for _ in range(num_times):
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    print(f"\n  runs [s]: {', '.join(f'{one:.1f}' for one in times)}")
    return row(what, statistics.median(times), bar_s)


@needs_links
def test_moe_measure_on_a_shaped_link():
    seen = []
    within = held("moe.measure, 2 ranks, 100 MB/s", lambda: seen.append(moe.measure(link_bytes_per_s=100e6)), bar_s=12)
    bands = ", ".join(f"{base.calibration.band_frac:.1%} ({base.source})" for base in seen)
    print(f"  bands {bands}")
    assert within


@needs_links
def test_measure_it_in_notebook_03():
    """The first press starts what forks the ranks; it stays up for those after it."""
    setting = moe.Setting(num_tokens=512, num_clusters=48)
    panel = moe.whatif(moe.measure(setting, levers=("lsh",), link_bytes_per_s=50e6))
    try:
        panel.controls["num_tokens"].value = 384
        held("Measure it, notebook 03, the first press", panel.measure, bar_s=6, num_times=1)
        assert held("Measure it, notebook 03, later presses", panel.measure, bar_s=3)
    finally:
        panel.close()


def test_decoder_measure_of_a_small_speech_model():
    model, seen = ek.models.speech(), []
    within = held("decoder.measure, small speech model", lambda: seen.append(decoder.measure(model)), bar_s=4)
    repeats = ", ".join(f"{base.calibration.trust.band_frac:.1%} of {len(base.calibration.runs)} runs, "
                        f"{len(base.calibration.runs[-1].plain_ns)} times each" for base in seen)  # fmt: skip
    print(f"  bands {repeats}")
    assert within
