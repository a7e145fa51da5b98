"""The page that a study writes: everything that it says, nothing from outside, whole or not at all."""

import html.parser
import os
import re

import pytest

import effkit as ek
from effkit.account import Account
from effkit.advice import reporting
from effkit.advice.levers import Lever, banded, ranked
from effkit.advice.overviews import NO_CEILINGS, Overview
from effkit.advice.studies import Study

EVIL = "<script>alert('\"&')</script>"
TIME = Account.of(
    "Time of one step", "ns", {"padding": 40_000_000, EVIL: 55_000_000}, total=97_000_000, source="clock & co"
)
MEMORY = Account.of("Peak", "bytes", {"parameter": 1 << 20, "workspace": 1 << 21}, total=3 << 20, source="allocator")
CEILINGS = NO_CEILINGS.copy()
CEILINGS.loc["model FLOPs utilisation"] = [3e9, 1.2e10, 0.25, "12 GFLOP/s measured", "3 x the forward, in full words"]
VOID = {"meta", "br", "use", "path", "link"}


def measured(time_ns):
    return Account.of(TIME.title, "ns", {"left": time_ns}, total=time_ns, source="clock")


class Planned(Study):
    """An overview that was written down, and a lever that can be run."""

    def _look(self):
        return Overview((TIME, MEMORY), CEILINGS, ("Text: 4 attention", EVIL), ("memory of ranks 1, 2", EVIL))

    def _advise(self, goal, budget_bytes, **more):
        def lever(name, saved, half):
            total = TIME.total - saved
            predicted = banded(TIME, {"left": total}, total, half, "a probe")
            return Lever("padding", name, f"found {EVIL}", TIME, predicted, f"loader = DataLoader('{EVIL}')",
                         (f"but {EVIL}",), keep=self.receipts.append, run=lambda: measured(80_000_000))  # fmt: skip

        return ranked(goal, [lever("batches of like length", 19_400_000, 5_000_000), lever("vain", 10, 50)], **more)


def page(study, advice):
    return reporting.page(study.what, study.overview(), study.receipts, advice)


class Reader(html.parser.HTMLParser):
    """What is on a page: tags closed in turn, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.feed(text)
        assert not self.open, "every element is closed"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text.append(data.strip())

    @property
    def words(self):
        return " ".join(filter(None, self.text))


@pytest.fixture
def study():
    return Planned(f"Text {EVIL}, a training step")


@pytest.fixture
def read(study, tmp_path):
    advice = study.advise(price_per_hour=2.0, num_steps=1_000_000, num_devices=4)
    advice[0].measure()
    path = study.report(tmp_path / "report.html", advice)
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"], "nothing beside it"
    return Reader(path.read_text(encoding="utf-8"))


def test_everything_that_the_study_says_is_on_the_page(read):
    here = ek.device.provenance()
    for said in (
        "a training step", here["date"], here["device"], f"torch {here['torch']}", "97.0 ms", "3.0 MiB",
        "Text: 4 attention",
        "total from clock & co", "measured", "residual", "2.1%", "25.0%", "12 GFLOP/s measured",
        "3 x the forward, in full words", "97.0 ms → 77.6 ms", "20%", "15% to 25%", "batches of like length",
        "loader = DataLoader(", "memory of ranks 1, 2", "Looked at, and not suggested: 1", "vain",
        "21.6 GPU-hours", "43.11", "at 2.00 an hour", "1,000,000 steps on 4 devices",
    ):  # fmt: skip
        assert said in read.words, said


def test_receipts_have_their_signed_error(read, study):
    assert "77.6 ms 72.6 ms to 82.6 ms 80.0 ms -3.0% ✓ yes" in read.words
    (receipt,) = study.receipts
    assert receipt.within_band


def test_a_receipt_outside_of_its_band_is_not_hidden(study):
    lever = study.advise()[0]
    study.receipts.append(ek.Receipt(lever.predicted, measured(60_000_000), setting={"lever": "far off"}))
    assert (
        "far off Time of one step 77.6 ms 72.6 ms to 82.6 ms 60.0 ms +29.3% ✗ no"
        in Reader(page(study, study.advise())).words
    )


def test_nothing_comes_from_outside_and_nothing_runs(read, study):
    text = page(study, study.advise())
    assert "script" not in read.tags
    assert not re.search(r"https?:|//|url\(\s*[^#\s]|@import", text)
    links = [value for name, value in read.attributes if name in ("href", "src", "srcset", "action", "xlink:href")]
    assert all(value.startswith("#") for value in links)
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert "link" not in read.tags


def test_words_are_shown_and_not_obeyed(read):
    assert read.words.count(EVIL) >= 8, "title, row, found, lever, code, side effect, unseen, …"
    assert "alert" not in " ".join(read.tags)


def test_the_picture_says_what_it_shows(read):
    (label,) = [value for name, value in read.attributes if name == "aria-label"]
    assert label.startswith("Time of one step: 97.0 ms: padding 41%")
    assert "Peak: 3.0 MiB: parameter 33%, workspace 67%" in label
    assert ("role", "img") in read.attributes


def test_it_suits_a_phone_and_the_dark(read, study):
    assert ("content", "width=device-width, initial-scale=1") in read.attributes
    text = page(study, study.advise())
    assert "prefers-color-scheme: dark" in text
    assert "stroke: #000000" not in text, "lines that would be black on black"


def test_the_same_study_is_the_same_page(study):
    advice = study.advise()
    assert page(study, advice) == page(study, advice)


def test_no_advice_and_no_receipt_are_said(study):
    words = Reader(page(study, ranked("memory", [], price_per_hour=None))).words
    assert "Nothing here is predicted to help." in words
    assert "No lever was measured" in words


def test_it_is_written_whole_or_not_at_all(study, tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere for report\.html: make it"):
        study.report(tmp_path / "nowhere" / "report.html")
    with pytest.raises(IsADirectoryError, match=r"is a folder: give the name of the file to write, .*report\.html say"):
        study.report(tmp_path)
    there = tmp_path / "report.html"
    there.write_text("as it was")

    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no room"):
        study.report(there)
    assert there.read_text() == "as it was"
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]


def test_a_live_study_reports_itself(tmp_path, one_thread):
    import planted

    given = planted.training(ek.models.text(layers=1, hidden=32, ffn=64), planted.loader([8, 16] * 16, batch_size=4))
    study = ek.study(**given, num_batches=2)
    read = Reader(study.report(tmp_path / "report.html", ranked("time", [])).read_text(encoding="utf-8"))
    assert "model FLOPs utilisation" in read.words
    assert "Peak memory" in read.words
