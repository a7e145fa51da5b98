"""What a notebook shows of the main types: tables, in which every text is escaped, and for which nothing is run."""

import re
from dataclasses import replace

import pandas as pd
import pytest
from made_traces import capture_of, launched, note, op
from test_device import KNOWN
from test_loading import folder_of_ranks
from test_whole_files import STEPS

import effkit as ek
from effkit import padding
from effkit.advice.levers import ranked
from effkit.advice.overviews import NO_CEILINGS, Overview
from effkit.advice.studies import Study

HOSTILE = "<img src=x onerror=alert(1)>"


def words(page):
    """What is read, cell by cell."""
    return [text for text in re.sub(r"<[^>]+>", "\n", page).split("\n") if text]


def idle(tmp_path):
    """Half of a step of 100 us is operators and launches, with the device idle."""
    parts = [[op("aten::add", i, i + 10), *launched("add", i, i + 5, i + 10, correlation=i)] for i in range(0, 100, 10)]
    return capture_of(tmp_path, note("ProfilerStep#0", 0, 100), *parts)


def test_an_overview_is_displayed_with_its_suggestions(tmp_path):
    seen = idle(tmp_path).overview()
    (suggestion,) = seen.attrs["suggestions"]
    page = seen._repr_html_()
    assert "<table" in page
    assert f"<li>{suggestion}</li>" in page
    assert "<li>steps from the profiler" in page
    assert type(seen[["dur_ns"]]) is type(seen.head(1)) is pd.DataFrame, "what is made of it is a frame like any other"


def test_a_capture_says_what_it_is_and_where_a_step_goes(tmp_path):
    page = idle(tmp_path)._repr_html_()
    assert {"kernel_ns", "45000", "cpu_exec_ns"} <= set(words(page))
    assert "the device idles while the host runs operators" in page
    assert "Capture of" in page


def test_a_capture_without_steps_or_events_says_what_it_is(tmp_path):
    empty = capture_of(tmp_path)
    assert words(empty._repr_html_())[0].startswith("Capture of")
    assert "<table" not in empty._repr_html_()


def test_files_of_many_ranks_are_not_read_to_be_displayed(tmp_path):
    seen = ek.load(folder_of_ranks(tmp_path / "run"))
    assert "<table" not in seen._repr_html_()
    assert not seen._cache
    seen.overview()
    assert "<table" not in seen._repr_html_(), "of a thousand ranks either"
    assert len(seen.events)
    assert "dur_ns" in words(seen._repr_html_()), "they are in memory now"


def test_a_device_is_shown_beside_its_datasheet():
    text = words(KNOWN._repr_html_())
    at = text.index("memory bandwidth")
    assert text[at : at + 4] == ["memory bandwidth", "4,200.0 GB/s", "4,800.0 GB/s", "88%"]
    assert text[text.index("operator overhead") :][1:4] == ["4.5 us", "–", "–"]
    assert text[0] == "NVIDIA H200 (cuda, 2 threads), measured on 2026-01-31"


def test_a_plan_shows_its_cells():
    plan = padding.plan(pd.DataFrame({"input_length": [3, 3, 1, 1]}), "sorted", batch_size=4)
    text = words(plan._repr_html_())
    assert text[0] == repr(plan)
    assert text[text.index("padding") :][1:3] == ["4 cells", "33.3%"]


class Looking(Study):
    looked = 0

    def _look(self):
        self.looked += 1
        return Overview((STEPS,), NO_CEILINGS, ("found",), ("unseen",))

    def _advise(self, goal, budget_bytes, **more):
        return ranked(goal, [])


def test_a_study_shows_what_was_asked_for_and_runs_nothing():
    study = Looking("a step")
    assert words(study._repr_html_()) == [repr(study)]
    assert study.looked == 0
    study.overview()
    assert "not visible" in words(study._repr_html_())
    study.advise("memory")
    assert "Advice for memory: nothing here is predicted to help" in words(study._repr_html_())


@pytest.mark.parametrize(
    "make",
    [
        lambda folder: replace(idle(folder), provenance={"what": HOSTILE, "device": HOSTILE}),
        lambda folder: replace(idle(folder), provenance={"left_out": [HOSTILE]}),
        lambda _: replace(KNOWN, name=HOSTILE),
        lambda _: Looking(HOSTILE),
        lambda _: replace(padding.plan(pd.DataFrame({"input_length": [3]}), "sorted", batch_size=4), strategy=HOSTILE),
    ],
)
def test_texts_of_others_are_escaped_and_colours_are_the_pages_own(tmp_path, make):
    page = make(tmp_path)._repr_html_()
    assert "<img" not in page
    assert "&lt;img src=x" in page
    assert not re.search(r"color|background", page), "so that a dark page stays readable"
