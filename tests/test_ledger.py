"""The error ledger: conditions, what is held back, whose rows are replaced, and the table that is made of them."""

import csv
import importlib
import json
import os
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from effkit.account import Account
from effkit.receipt import LEDGER_COLUMNS, Receipt

sys.path.append(str(Path(__file__).resolve().parents[1] / "data"))
ledger_rows = importlib.import_module("ledger_rows")
CLOSE, FAR = 105, 130


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A ledger of its own; returns a function that records one time, and one exact count, under a condition."""
    (tmp_path / "ledger").mkdir()
    monkeypatch.setattr(ledger_rows, "DATA", tmp_path)
    for name, file in (("README", "README.md"), ("ACCURACY", "accuracy.md")):
        text = "before\n<!-- accuracy: written by make ledger -->\nold\n<!-- /accuracy -->\nafter\n"
        (tmp_path / file).write_text(text)
        monkeypatch.setattr(ledger_rows, name, tmp_path / file)

    def record(lab, condition, measured, *, everything=True):
        monkeypatch.setenv("EFFKIT_LEDGER_CONDITION", condition)
        monkeypatch.setenv("EFFKIT_LEDGER_ALL", "1" if everything else "")
        steps = Account.of("Steps", "steps", {"steps": 3}, total=3, source="count", low=3, high=3)
        guess, truth = (
            Account.of("Time", "ns", {"step": total}, total=total, source="clock", companions=(steps,), **band)
            for total, band in ((100, {"low": 90, "high": 110}), (measured, {}))
        )
        part = ledger_rows.begun(lab)
        Receipt(guess, truth, provenance=ledger_rows.provenance()).append_to(part, lab=lab, model="m", knob="k")
        ledger_rows.replace_rows(lab, part)
        return part

    return record


def rows(tmp_path):
    (path,) = (tmp_path / "ledger").glob("*.csv")
    with path.open(newline="") as file:
        header, *found = csv.reader(file)
    assert tuple(header) == LEDGER_COLUMNS
    return [(row[0], json.loads(row[-1]).get("condition"), row[9]) for row in found if row[5] == "ns"]


@pytest.mark.usefixtures("one_thread")
def test_rows_are_replaced_for_their_lab_and_condition_alone(ledger, tmp_path):
    for lab, condition, measured in (("moe", "one core", 101), ("padding", "one core", 102),
                                     ("padding", "one thread", 103), ("padding", "one core", 104)):  # fmt: skip
        assert not ledger(lab, condition, measured).exists()
    assert rows(tmp_path) == [
        ("padding", "one thread", "103"), ("padding", "one core", "104"), ("moe", "one core", "101"),
    ]  # fmt: skip


@pytest.mark.usefixtures("one_thread")
def test_rows_from_before_there_were_conditions_are_of_one_thread(ledger, tmp_path):
    ledger("padding", "one thread", 101)
    (path,) = (tmp_path / "ledger").glob("*.csv")
    path.write_text(path.read_text().replace('""condition"": ""one thread"", ', ""))
    assert rows(tmp_path) == [("padding", None, "101")]
    ledger("padding", "AVX2", 102)
    ledger("padding", "one thread", 103)
    assert rows(tmp_path) == [("padding", "one thread", "103"), ("padding", "AVX2", "102")]


@pytest.mark.usefixtures("one_thread")
def test_a_run_without_what_is_held_back_replaces_nothing(ledger, tmp_path):
    ledger("padding", "one thread", 101)
    table = (tmp_path / "README.md").read_text()
    assert ledger("padding", "one thread", 102, everything=False).exists()
    assert rows(tmp_path) == [("padding", "one thread", "101")]
    assert (tmp_path / "README.md").read_text() == table


def test_a_third_of_a_grid_is_held_back(monkeypatch):
    monkeypatch.delenv("EFFKIT_LEDGER_ALL", raising=False)
    assert ledger_rows.unheld(range(9)) == [0, 1, 3, 4, 6, 7]
    monkeypatch.setenv("EFFKIT_LEDGER_ALL", "1")
    assert ledger_rows.unheld(range(9)) == list(range(9))


@pytest.mark.usefixtures("one_thread")
def test_the_table_has_times_by_condition_counts_together_and_coverage_over_all(ledger, tmp_path):
    ledger("padding", "one thread", CLOSE)
    ledger("padding", "one core", FAR)
    text, summary = ((tmp_path / file).read_text() for file in ("accuracy.md", "README.md"))
    for each in (text, summary):
        assert each.startswith("before\n")
        assert each.endswith("after\n")
    head, _, *table = text.split("-->\n")[1].split("<!--")[0].splitlines()
    assert summary.split("-->\n")[1].split("\n\n")[0].splitlines()[2:] == [table[3]], "what is over all devices"
    assert "| condition |" in head
    cells = [[cell.strip() for cell in row.strip("|").split("|")][1:] for row in table]
    half = f"{10 / CLOSE / (1 - 100 / CLOSE):.1f}"
    assert cells[0] == ["one thread", "padding", "Time", "1", "4.8%", "4.8%", "1 of 1", half]
    assert cells[1] == ["one core", "padding", "Time", "1", "23.1%", "23.1%", "0 of 1", "0.3"]
    assert cells[2] == ["all", "padding", "Steps", "2", "0.0%", "0.0%", "2 of 2", "-"]
    assert cells[3][:6] == ["all", "padding", "Time", "2", "13.9%", "23.1%"]
    assert cells[3][6] == "1 of 2"


@pytest.mark.parametrize("name", ["two threads", "AVX2", "one core"])
def test_a_condition_is_in_force_before_torch_is_imported(name, tmp_path):
    out = tmp_path / "seen.json"
    here = str(Path(ledger_rows.__file__).parent)
    code = f"""
import json, os, sys
sys.path.insert(0, {here!r})
import torch, ledger_rows
ledger_rows.DATA = ledger_rows.Path({str(tmp_path)!r})
ledger_rows.begun("padding")
json.dump([ledger_rows.condition(), ledger_rows.everything(), torch.get_num_threads(), os.environ["OMP_NUM_THREADS"],
           os.environ.get("ONEDNN_MAX_CPU_ISA"), len(os.sched_getaffinity(0))], open({str(out)!r}, "w"))
"""
    cores = os.sched_getaffinity(0)
    assert ledger_rows.run_under(name, [sys.executable, "-c", code], everything=True) == 0
    assert os.sched_getaffinity(0) == cores
    threads = 2 if name == "two threads" else 1
    seen = json.loads(out.read_text())
    assert seen == [name, True, threads, str(threads), "AVX2" if name == "AVX2" else None,
                    1 if name == "one core" else len(cores)]  # fmt: skip
    assert ledger_rows.run_under(name, [sys.executable, "-c", "raise SystemExit(3)"], everything=False) == 3


def test_the_stored_ledgers_make_a_table_that_is_short_enough_to_read():
    stored = [pd.read_csv(path) for path in ledger_rows.ledgers()]
    table = list(ledger_rows.accuracy(stored))
    assert all(row.count("|") == 10 for row in table)
    assert sum("Token copies" in row for row in table) <= len(stored)


@pytest.fixture
def labs(ledger, tmp_path, monkeypatch):
    """A lab of three settings, with the ledger of a device of its own; what of them fails is given."""

    def run(failing=(), measured=CLOSE):
        part = ledger_rows.begun("padding")
        for name in ("a", "b", "c"):
            with ledger_rows.going_on(f"padding, {name}"):
                if name in failing:
                    raise RuntimeError("out of memory")
                guess, truth = (Account.of("Time", "ns", {"step": total}, total=total, source="clock", **band)
                                for total, band in ((100, {"low": 90, "high": 110}), (measured, {})))  # fmt: skip
                facts = ledger_rows.provenance()
                Receipt(guess, truth, setting={"size": name}, provenance=facts).append_to(
                    part, lab="padding", model="m", knob="k")  # fmt: skip
        return part

    monkeypatch.setenv("EFFKIT_LEDGER_CONDITION", "one thread")
    monkeypatch.setenv("EFFKIT_LEDGER_ALL", "1")
    yield run
    ledger_rows.begun("padding")


def by_setting(tmp_path):
    (path,) = (tmp_path / "ledger").glob("*.csv")
    table = pd.read_csv(path)
    return dict(zip((json.loads(setting)["size"] for setting in table["setting"]), table["measured"], strict=True))


@pytest.mark.usefixtures("one_thread")
def test_a_setting_that_fails_loses_no_other(labs, tmp_path, capsys):
    ledger_rows.replace_rows("padding", labs(failing=("b",)))
    assert by_setting(tmp_path) == {"a": 105, "c": 105}
    assert ledger_rows.failed() == ["padding, b failed: RuntimeError: out of memory"]
    assert "Traceback" in capsys.readouterr().err
    ledger_rows.replace_rows("padding", labs())
    assert ledger_rows.failed() == []
    ledger_rows.replace_rows("padding", labs(failing=("a", "c"), measured=FAR))
    assert by_setting(tmp_path) == {"a": 105, "b": 130, "c": 105}, "rows of before stay where there are no new ones"


@pytest.mark.usefixtures("one_thread")
def test_rows_of_a_process_that_was_cut_off_are_kept(labs, tmp_path):
    labs(failing=("c",))
    ledger_rows.begun("moe")  # as another process would: nothing has failed in it
    ledger_rows.keep_rows("padding")
    assert by_setting(tmp_path) == {"a": 105, "b": 105}
    assert not ledger_rows.part_of("padding").exists()
    ledger_rows.keep_rows("padding")
    assert by_setting(tmp_path) == {"a": 105, "b": 105}, "nothing was left behind"


def test_what_takes_longer_than_its_limit_is_cut_off():
    code = "import time; time.sleep(60)"
    begin = time.perf_counter()
    status = ledger_rows.run_under("one thread", [sys.executable, "-c", code], everything=False, limit_s=0.5)
    assert status == ledger_rows.CUT_OFF
    assert time.perf_counter() - begin < 20


def test_every_part_has_its_share_of_the_time_and_one_that_fails_stops_no_other(monkeypatch, capsys):
    record = importlib.import_module("record")
    ran = []

    def run_under(condition, command, *, everything, limit_s=None):
        ran.append((*command[2:], condition, limit_s))
        return {"speech": 1, "decoder": record.CUT_OFF}.get(command[-1], 0) if command[2] != "keep" else 0

    monkeypatch.setattr(record, "run_under", run_under)
    monkeypatch.setattr(record.time, "monotonic", lambda: 0.0)
    parts = [*record.parts_of("all", None, ["one thread"])]
    assert {name for _, _, name in parts} == {*record.CAPTURES, *record.LABS} - {record.ELSEWHERE}
    with pytest.raises(SystemExit, match=r"time: speech, one thread; decoder, one thread, which was cut off$"):
        record.run_parts(parts, True, 10)
    assert [(what, name) for what, name, *_ in ran if name == "decoder"] == [("rows", "decoder"), ("keep", "decoder")]
    assert [name for what, name, *_ in ran if what != "keep"] == [name for _, _, name in parts], "all were run"
    assert ran[0][-1] == 600 / len(parts)
    assert ran[-1][-1] == 600, "the last has all that is left"
    ran.clear()
    record.run_parts([("AVX2", "rows", "padding")], False, None)
    assert ran == [("rows", "padding", "AVX2", None)], "without a limit a part has the time that it takes"
