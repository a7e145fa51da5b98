"""The bar on a slider in a real browser, on an idle machine: key press to changed picture (`make bench`).

A picture that trails the hand by more than about a tenth of a second no longer feels attached to it.
"""

from __future__ import annotations

import statistics
import time

import nbformat
import psutil
import pytest
from lab_browser import first_slider, jupyterlab, notebook_page, run_all_cells, slider_latencies, why_no_browser

# The code cells of a notebook that does nothing but put the padding what-if on the screen.
CELLS = (
    """import effkit as ek
from effkit import padding""",
    """lengths = padding.lengths("../data/spoken_docs.csv").query("input_length <= 1600")
sample = lengths.sample(256, random_state=0).reset_index(drop=True)
base = padding.measure(padding.plan(sample, "random", batch_size=16), ek.models.speech(), num_batches=8)
padding.whatif(base)""",
)
MEDIAN_MS, P95_MS = 60, 100
NUM_MOVES, NUM_WARM_UPS, NUM_TRIES = 60, 10, 3
IDLE_PERCENT = 20

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser())),
]


def wait_for_an_idle_machine(timeout_s: float = 120) -> None:
    """The bar is for an idle machine: three quiet seconds in a row, or as near as it gets in that time."""
    end, quiet = time.monotonic() + timeout_s, 0
    while quiet < 3 and time.monotonic() < end:
        quiet = quiet + 1 if psutil.cpu_percent(interval=1) < IDLE_PERCENT else 0


def median_and_p95(times_ms: list[float]) -> tuple[float, float]:
    return statistics.median(times_ms), statistics.quantiles(times_ms, n=20, method="inclusive")[-1]


def of_the_bar(seen: tuple[float, float]) -> float:
    """How much of the bar a try has used up: 1 is just in time, for the worse of its two figures."""
    return max(seen[0] / MEDIAN_MS, seen[1] / P95_MS)


def test_the_picture_follows_the_slider(tmp_path):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), tmp_path / "slider.ipynb")
    tries = []
    print(f"\n\nkey press to changed picture, {NUM_MOVES} single moves; bar: {MEDIAN_MS} ms median, {P95_MS} ms p95")
    with jupyterlab(tmp_path) as lab, notebook_page(lab, "slider.ipynb") as page:
        run_all_cells(page)
        slider = first_slider(page)
        while len(tries) < NUM_TRIES and not any(of_the_bar(seen) <= 1 for seen in tries):
            wait_for_an_idle_machine()
            slider_latencies(page, slider, NUM_WARM_UPS)
            psutil.cpu_percent()  # from here
            tries.append(median_and_p95(slider_latencies(page, slider, NUM_MOVES)))
            busy, load = psutil.cpu_percent(), psutil.getloadavg()[0]
            median, p95 = tries[-1]
            print(f"  {slider}: median {median:.0f} ms, p95 {p95:.0f} ms; machine {busy:.0f}% busy, load {load:.1f}")
    median, p95 = min(tries, key=of_the_bar)
    assert median <= MEDIAN_MS, f"median {median:.0f} ms"
    assert p95 <= P95_MS, f"95th percentile {p95:.0f} ms"
