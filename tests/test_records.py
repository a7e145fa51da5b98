"""Figures as data: what goes out comes back equal, to a program, to a reader and to a tracker."""

import json
import math
import re

import pandas as pd
import pytest
from made_traces import launched, note, op, written

import effkit as ek
from effkit.account import Account
from effkit.advice.levers import Advice, Lever, banded, ranked
from effkit.advice.overviews import Overview, ceilings
from effkit.advice.studies import Study
from effkit.receipt import Receipt

TIME = Account.of(
    "Time of one step", "ns", {"padding": 40, "a|b *c* <d>": 55}, total=97, source="clock",
    setting={"n": 3, "on": True}, basis={"padding": "measured", "a|b *c* <d>": "derived"},
    companions=(
        Account.of("Peak", "bytes", {"weights": 7}, total=9, source="allocator", low=8, high=12, in_range=False),
    ),
)  # fmt: skip
SHORTER = banded(TIME, {"left": 60}, 60, 20, "a probe")
LEVER = Lever("padding", "pad to the longest row", "half is padding", TIME, SHORTER, "loader = ...\nloader", ("slow",))
RECEIPT = Receipt(
    SHORTER, Account.of(TIME.title, "ns", {"left": 50}, total=50, source="clock"), {"k": 1}, {"torch": "2"}
)
OVERVIEW = Overview((TIME,), pd.DataFrame(
    {"reached": [1e9], "ceiling": [4e9], "reached_frac": [0.25], "ceiling_text": ["4 GFLOP/s"],
     "definition": ["FLOPs"]},
    index=pd.Index(["model FLOPs utilisation"], name="of")), ("one rank",), ("padding",))  # fmt: skip


class Written(Study):
    """A study whose overview and advice were written down."""

    def _look(self):
        return OVERVIEW

    def _advise(self, goal, budget_bytes, **more):
        return ranked(goal, [LEVER], notes=("one note",))


def study():
    made = Written("a loop")
    made.receipts.append(RECEIPT)
    return made


RECORDS = {
    "account": TIME, "receipt": RECEIPT, "lever": LEVER, "overview": OVERVIEW,
    "advice": Advice("time", (LEVER,), (LEVER,), ("a note",), price_per_hour=2.5, num_steps=10, num_devices=8),
    "study": study(),
}  # fmt: skip


@pytest.mark.parametrize("kind", RECORDS)
def test_what_goes_out_as_json_comes_back_equal(kind):
    record = RECORDS[kind]
    data = json.loads(record.to_json())
    back = type(record).from_dict(data) if kind != "study" else Study.from_dict(data)
    assert data["schema"] == f"effkit {kind} 1"
    assert back.to_dict() == data == record.to_dict()
    assert repr(back) == repr(record)


def test_the_values_are_those_of_the_record():
    data = TIME.to_dict()
    assert data["rows"][0] == {"item": "padding", "value": 40, "basis": "measured"}
    assert (data["total"], data["residual"], data["unit"]) == (97, 2, "ns")
    assert data["companions"][0]["high"] == 12
    assert RECEIPT.to_dict()["error"] == pytest.approx(0.2)
    assert LEVER.to_dict()["gain_frac"] == pytest.approx(37 / 97)


def test_what_json_lacks_is_null_or_text():
    odd = Account.of("t", "ns", {}, total=0, source="s", setting={"a": math.nan, "b": pd.NA, "c": {1}, "d": object})
    assert json.loads(odd.to_json())["setting"] == {"a": None, "b": None, "c": [1], "d": "<class 'object'>"}
    nothing = Receipt(SHORTER, Account.of(TIME.title, "ns", {}, total=0, source="clock"))
    assert nothing.error == math.inf
    assert json.loads(nothing.to_json())["error"] is None


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ({}, "this says None"), ([], "list"), ({"schema": "effkit receipt 1"}, "receipt"),
        ({"schema": "effkit account 2"}, "upgrade"), ({"schema": "effkit account x"}, "version x"),
        ({"schema": "effkit account 1"}, "'rows' is missing"),
        (TIME.to_dict() | {"rows": [{"item": "a", "value": "1", "basis": "measured"}]}, "integers"),
        (TIME.to_dict() | {"companions": 3}, "complete"),
    ],
)  # fmt: skip
def test_what_is_no_record_is_refused_in_a_sentence(data, word):
    with pytest.raises(ValueError, match=word):
        Account.from_dict(data)


def test_text_that_is_no_json_is_refused():
    for text in ("", "{", "[" * 100_000):
        with pytest.raises(ValueError, match="this is no JSON"):
            Account.from_json(text)


def test_a_study_is_saved_and_opened(tmp_path):
    path = study().save(tmp_path / "study.json")
    opened = Study.open(path)
    assert opened.advise()[0].name == LEVER.name
    assert opened.receipts[0].sentence() == RECEIPT.sentence()
    assert opened.compare(study())["difference"].dropna().eq(0).all()
    assert opened.report(tmp_path / "page.html").exists()
    with pytest.raises(ValueError, match="with advice for time"):
        opened.advise("memory")
    with pytest.raises(RuntimeError, match="nothing to measure"):
        opened.advise()[0].measure()


def test_a_study_of_files_goes_through_json(tmp_path):
    events = [note("ProfilerStep#0", 0, 100), op("aten::mm", 10, 20), *launched("gemm", 12, 20, 60, 1)]
    live = ek.study(trace=written(tmp_path / "trace.json", events))
    opened = Study.open(live.save(tmp_path / "study.json"))
    assert repr(opened.overview()) == repr(live.overview())


@pytest.mark.parametrize("kind", RECORDS)
def test_markdown_has_tables_that_hold_whatever_a_name_holds(kind):
    text = RECORDS[kind].to_markdown()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", row)) for row in rows}) <= 1 or kind in ("overview", "study")
    assert "<d>" not in text
    if kind in ("account", "overview", "study"):
        assert r"a\|b \*c\* \<d\>" in text


class Tracker:
    """Of one kind: what it was given."""

    def __init__(self, *methods):
        self.figures = {}
        for name in methods:
            setattr(self, name, self._add if name == "add_scalar" else self._log)

    def _add(self, name, value, step):
        self.figures[name] = value
        self.step = step

    def _log(self, figures, step=None):
        self.figures, self.step = figures, step


@pytest.mark.parametrize("method", ["add_scalar", "log_metrics", "log"])
@pytest.mark.parametrize("kind", RECORDS)
def test_every_tracker_gets_the_figures_with_their_units(kind, method):
    run = Tracker(method)
    logged = RECORDS[kind].log_to(run, 7)
    assert run.figures == logged
    assert run.step == 7
    assert all(re.fullmatch(r"effkit(/[a-z0-9_]+)+", name) for name in logged)
    assert all(isinstance(value, float) for value in logged.values())


def test_figures_are_those_of_the_rows():
    run = Tracker("log")
    TIME.log_to(run)
    assert run.figures["effkit/time_of_one_step/padding_ns"] == 40.0
    assert run.figures["effkit/peak/high_bytes"] == 12.0


def test_what_logs_nothing_is_refused():
    with pytest.raises(TypeError, match="log_to"):
        TIME.log_to(3)


def test_a_real_writer_of_tensorboard_takes_them(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(tmp_path) as writer:
        RECORDS["study"].log_to(writer, 1)
    assert list(tmp_path.iterdir())


def test_ceilings_of_a_real_device_go_through_json():
    device = ek.Device("cpu", "cpu", 1, {"float32": 1e9}, 1e9, 1000, 0, "2", "today")
    frame = ceilings(
        device, step_ns=1e6, forward_flops=1000, half=False, real_frac=None, num_operators=3, peak_bytes=None
    )
    overview = Overview((TIME,), frame, (), ())
    assert repr(Overview.from_json(overview.to_json())) == repr(overview)
