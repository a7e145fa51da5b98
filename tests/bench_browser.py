"""The bar on a slider in a real browser, on an idle machine: key press to changed picture (`make bench`).

A picture that trails the hand by more than about a tenth of a second no longer feels attached to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest
from bench_table import row
from lab_browser import (
    COMPUTING,
    click_measure,
    errors,
    first_moves,
    first_slider,
    handle,
    jupyterlab,
    notebook_page,
    press_key,
    run_all_cells,
    slider_latencies,
    status_text,
    wait_until,
    whatif,
    why_no_browser,
)
from playwright.sync_api import Page

# The code cells of a notebook that does nothing but put the padding what-if on the screen.
CELLS = (
    """import effkit as ek
from effkit import padding""",
    """lengths = padding.lengths("../data/spoken_docs.csv").query("input_length <= 1600")
sample = lengths.sample(256, random_state=0).reset_index(drop=True)
base = padding.measure(padding.plan(sample, "random", batch_size=16), ek.models.speech(), num_batches=8)
padding.whatif(base)""",
)
# And one that does nothing but put the activations what-if on the screen, as notebook 02 does: its predictions replay.
REPLAYED = (
    """import torch
import effkit as ek
from effkit import activations
torch.set_num_threads(1)
model = ek.models.gpt(layers=3, hidden=128)
batch = model.random_batch(batch_size=4, length=128)
base = activations.measure(model, batch, repeats=2)""",
    "activations.whatif(base, model, batch, repeats=10)",
)
MEDIAN_MS, P95_MS = 50, 100
WISHED_MS = 30, 45  # what is aimed at, median and 95th percentile
FIRST_MS, SAID_MS = 300, 100
NUM_RACES = 20
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


@contextmanager
def shown(folder: Path, sources: Sequence[str]) -> Iterator[Page]:
    """A notebook of these cells in the browser, run."""
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), folder / "slider.ipynb")
    with jupyterlab(folder) as lab, notebook_page(lab, "slider.ipynb") as page:
        run_all_cells(page)
        yield page


def test_the_picture_follows_the_slider(tmp_path):
    tries = []
    print(f"\n\nkey press to changed picture, {NUM_MOVES} single moves; bar: {MEDIAN_MS} ms median, {P95_MS} ms p95")
    with shown(tmp_path, CELLS) as page:
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
    row("a slider's move in the browser, median", median, WISHED_MS[0], "ms")
    row("a slider's move in the browser, 95th percentile", p95, WISHED_MS[1], "ms")
    assert median <= MEDIAN_MS, f"median {median:.0f} ms"
    assert p95 <= P95_MS, f"95th percentile {p95:.0f} ms"


@pytest.mark.parametrize("reading_s", [20, 0], ids=["after reading", "at once"])
def test_the_first_move_of_every_knob_is_shown_or_announced(tmp_path, reading_s):
    """Somebody reads before moving a slider, and the kernel has worked ahead; or moves it at once, and is told."""
    with shown(tmp_path, REPLAYED) as page:
        if reading_s:
            wait_for_an_idle_machine()
            page.wait_for_timeout(1000 * reading_s)
        seen = first_moves(page)
    print(f"\n\nfirst move of each slider; bar: shown in {FIRST_MS} ms, or announced in {SAID_MS} ms")
    late = []
    for knob, sentences in seen.items():
        (first_ms, first), (shown_ms, _) = sentences[0], sentences[-1]
        print(f"  {knob}: {first_ms:.0f} ms {first[:9]!r}, shown after {shown_ms:.0f} ms")
        if shown_ms > FIRST_MS and not (first == COMPUTING and first_ms <= SAID_MS):
            late.append(knob)
    assert late == []


def test_every_press_of_measure_it_shows_its_receipt(tmp_path):
    """Races of the hand with the kernel: a slider is moved thrice, the button pressed at once, the slider moved."""
    won, control = 0, "batch_size"
    with shown(tmp_path, REPLAYED) as page:
        knob = handle(page, control)
        for race in range(NUM_RACES):
            keys = ("ArrowRight", "ArrowLeft") if race % 2 else ("ArrowLeft", "ArrowRight")
            for _ in range(3):
                press_key(page, control, keys[0])
            pressed_at = knob.get_attribute("aria-valuenow").partition(".")[0]
            click_measure(page)
            whatif(page).locator(".effkit-stop:enabled").wait_for(timeout=60_000)  # the measurement is under way
            if race % 4 > 1:
                press_key(page, control, keys[1])
            whatif(page).locator(".effkit-measure:enabled").wait_for(timeout=60_000)
            wait_until(page, lambda: "Receipt: " in status_text(page), "a receipt was shown", 10)
            said = status_text(page)
            here = knob.get_attribute("aria-valuenow").partition(".")[0]
            at = "the rest position" if pressed_at == "4" else f"{control}={pressed_at}"
            held = f"Measured at {at}: Receipt: " if here != pressed_at else "Receipt: "
            won += said.startswith(held)
            print(f"  race {race}: pressed at {pressed_at}, now at {here}: {said[:60]}")
            page.wait_for_timeout(300)
        assert errors(page) == []
    assert won == NUM_RACES
