"""The ledgers: what they explain, what they refuse, and how they read."""

import csv
import math
import re

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from effkit.account import Account
from effkit.receipt import LEDGER_COLUMNS, Receipt
from effkit.units import readable

AMOUNTS = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 2**40), max_size=5)


def cells(rows=None, total=100, title="Cells of one epoch", **more) -> Account:
    rows = {"real": 60, "padding": 40} if rows is None else rows
    return Account.of(title, "cells", rows, total=total, source="batch shapes", **more)


def receipt(predicted=110, measured=100, **more) -> Receipt:
    return Receipt(cells(total=predicted, **more), cells(total=measured), setting={"n": 3}, provenance={"torch": "2"})


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (0, "ns", "0 ns"),
        (1_062_891_159_552, "FLOPs", "1.06 TFLOPs"),
        (320, "FLOPs", "320 FLOPs"),
        (-61_300_000, "ns", "-61.3 ms"),
        (1_500_000_000, "ns", "1.50 s"),
        (1023, "bytes", "1,023 B"),
        (3 * 2**30, "bytes", "3.00 GiB"),
        (12_345, "tokens", "12,345 tokens"),
    ],
)
def test_readable(value, unit, text):
    assert readable(value, unit) == text


@given(rows=AMOUNTS, total=st.integers(-(2**40), 2**40))
def test_residual_is_what_the_rows_leave(rows, total):
    account = cells(rows, total)
    assert account.residual == total - sum(rows.values())
    assert account.frame["value"].to_dict() == rows
    assert account.frame.index.name == "item"


def test_share():
    assert cells().share.to_dict() == {"real": 0.6, "padding": 0.4}
    assert cells({"real": 0}, 0).share.to_dict() == {"real": 0.0}


def test_closed_returns_the_account_or_says_by_how_much_it_is_open():
    account = cells()
    assert account.closed() is account
    sentence = "the account “Cells of one epoch” does not close: its rows sum to 100 cells and batch shapes says 1,103"
    with pytest.raises(ValueError, match=re.escape(f"{sentence} (residual +1,003)")):
        cells(total=1103).closed()
    with pytest.raises(ValueError, match=re.escape("(residual -5)")):
        cells(total=95).closed(tolerance_frac=0.05)
    assert cells(total=105).closed(tolerance_frac=0.05).residual == 5


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (pd.DataFrame({"value": [1]}, index=["a"]), "missing: ['basis']"),
        (pd.DataFrame({"value": [1.0], "basis": "measured"}, index=["a"]), "values are integers; given: float64"),
        (pd.DataFrame({"value": [1], "basis": "guessed"}, index=["a"]), "given: guessed"),
        (pd.DataFrame({"value": [1, 2], "basis": "measured"}, index=["a", "a"]), "one row only: ['a']"),
        (pd.DataFrame({"value": [-5], "basis": "measured"}, index=["a"]), "0 or more; given: a -5 of 1 cells"),
    ],
)
def test_a_frame_of_another_form_is_refused(frame, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        Account("Title", "cells", frame, 1, "source")


@pytest.mark.parametrize(
    ("band", "words"),
    [
        ({"low": 90}, "both a low and a high end"),
        ({"high": 110}, "both a low and a high end"),
        ({"low": 101, "high": 110}, "101 .. 110 around 100"),
        ({"low": 90, "high": 99}, "90 .. 99 around 100"),
    ],
)
def test_a_band_encloses_its_total(band, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        cells(**band)
    assert cells(low=100, high=100).predicted
    assert not cells().predicted


def test_compare_lays_row_beside_row():
    table = cells({"real": 60, "padding": 40, "none": 0}, 110).compare(cells({"real": 30, "waiting": 5, "none": 0}, 35))
    assert table.index.tolist() == ["real", "padding", "none", "waiting", "residual", "total"]
    assert table.loc["real"].to_dict() == {"value": 60, "other": 30, "difference": -30, "ratio": 0.5}
    assert table.loc["total", "difference"] == -75
    # an item that one side lacks is absent, not zero
    assert table.loc["padding", ["other", "difference", "ratio"]].isna().all()
    assert table.loc["waiting", ["value", "difference", "ratio"]].isna().all()
    assert table.loc["none", "difference"] == 0
    assert pd.isna(table.loc["none", "ratio"])


def test_compare_refuses_another_unit():
    with pytest.raises(ValueError, match="cannot compare cells with steps"):
        cells().compare(Account.of("Steps", "steps", {"steps": 1}, total=1, source="loop"))


def test_repr_is_stable_to_the_byte():
    basis = {"real": "measured", "padding": "derived"}
    accounts = [cells(total=103, low=95, high=1_110, in_range=False, basis=basis) for _ in range(2)]
    assert repr(accounts[0]) == repr(accounts[1])
    assert repr(accounts[0]) == (
        "Cells of one epoch: 103 cells (predicted; band 95 cells to 1,110 cells) — outside the calibrated range\n"
        "  real      60 cells  58.3%  measured\n"
        "  padding   40 cells  38.8%  derived\n"
        "  residual   3 cells   2.9%\n"
        "  total from batch shapes"
    )


def test_html_escapes_what_was_given():
    nasty = "<script>&\"'"
    account = Account.of(nasty, "cells", {nasty: 1}, total=1, source=nasty)
    for markup in (account._repr_html_(), Receipt(account, account)._repr_html_()):
        assert "<script>" not in markup
        assert "&lt;script&gt;&amp;" in markup


def test_an_account_without_rows_can_be_shown():
    assert "residual" in repr(cells({}, 5))
    assert cells({}, 5).residual == 5


@pytest.mark.parametrize(("predicted", "measured", "error"), [(110, 100, 0.1), (90, 100, -0.1), (100, 100, 0.0)])
def test_error_is_positive_when_too_much_was_predicted(predicted, measured, error):
    assert receipt(predicted, measured).error == pytest.approx(error)
    assert f"error {error:+.1%}" in receipt(predicted, measured).sentence()


def test_measuring_nothing():
    assert receipt(1, 0).error == math.inf
    assert receipt(0, 0).error == 0.0
    assert "+inf%" in repr(receipt(1, 0))


@pytest.mark.parametrize(("measured", "within"), [(99, False), (100, True), (120, True), (121, False)])
def test_within_band(measured, within):
    guess = receipt(110, measured, low=100, high=120)
    assert guess.within_band is within
    assert ("inside the band" if within else "outside the band") in guess.sentence()


def test_without_a_band_only_the_exact_figure_is_within():
    assert receipt(100, 100).within_band
    assert not receipt(100, 101).within_band


def test_a_receipt_says_when_the_prediction_had_extrapolated():
    assert "beyond its calibrated range" in receipt(110, low=100, high=120, in_range=False).sentence()
    assert "beyond" not in receipt().sentence()


def test_a_receipt_compares_like_with_like():
    with pytest.raises(ValueError, match="cells and steps"):
        Receipt(cells(), Account.of("Steps", "steps", {}, total=1, source="loop"))


def test_a_companion_is_asked_for_by_title():
    memory, steps = cells(total=7, title="Peak memory"), cells(total=3, title="Steps")
    account = cells().with_companions(memory, steps)
    assert account.companion("Steps") is steps
    with pytest.raises(ValueError, match="“Cells of one epoch” has no companion “Time”; there: “Peak memory”, “Steps”"):
        account.companion("Time")
    with pytest.raises(ValueError, match="no companion “Steps”; there: none"):
        cells().companion("Steps")


def test_companions_are_matched_by_title():
    memory, steps = cells(total=7, title="Peak memory"), cells(total=3, title="Steps")
    predicted = cells(total=110, low=100, high=120).with_companions(memory, cells(title="Only predicted"))
    both = Receipt(predicted, cells().with_companions(steps, cells(total=14, title="Peak memory")))
    frame = both.frame
    assert frame.index.tolist() == ["Cells of one epoch", "Peak memory"]
    assert frame["error"].tolist() == pytest.approx([0.1, -0.5])
    assert frame["within_band"].tolist() == [True, False]
    assert frame["low"].isna().tolist() == [False, True]
    assert repr(both).splitlines()[1:] == ["  Peak memory: predicted 7 cells, measured 14 cells, error -50.0%"]


def append(path, *receipts):
    for one in receipts:
        one.append_to(path, lab="padding", model="speech, small", knob="strategy")


def test_a_ledger_is_created_and_added_to(tmp_path):
    path = tmp_path / "new" / "ledger.csv"
    append(path, receipt(), receipt(90, low=80, high=95))
    lines = list(csv.DictReader(path.open()))
    assert tuple(lines[0]) == LEDGER_COLUMNS
    assert [line["error"] for line in lines] == ["0.100000", "-0.100000"]
    assert [line["low"] for line in lines] == ["", "80"]
    assert lines[0] | {"model": "speech, small", "setting": '{"n": 3}', "provenance": '{"torch": "2"}'} == lines[0]


@pytest.mark.parametrize("content", [b"a,b\n1,2\n", b"", b",".join(c.encode() for c in LEDGER_COLUMNS[1:])])
def test_another_file_is_refused_and_left_alone(tmp_path, content):
    path = tmp_path / "other.csv"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="not an error ledger"):
        append(path, receipt())
    assert path.read_bytes() == content


def test_a_binary_file_is_refused_in_the_readers_words(tmp_path):
    path = tmp_path / "picture.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff")
    with pytest.raises(ValueError, match="not an error ledger"):
        append(path, receipt())


def test_a_ledger_whose_last_newline_was_lost_keeps_its_lines_apart(tmp_path):
    path = tmp_path / "ledger.csv"
    append(path, receipt())
    path.write_text(path.read_text().rstrip("\n"))
    append(path, receipt())
    assert [len(line) for line in csv.reader(path.open())] == [len(LEDGER_COLUMNS)] * 3
