"""The reader's sheet: guesses and receipts are kept from one lesson to the next, and nothing stops a lesson."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from effkit import Account, Receipt
from lessons import sheet

KIND = "share of padding"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A user's cache that is empty, and not there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "effkit"


def receipt(predicted=110, measured=100, band=(100, 120), setting=None):
    low, high = band or (None, None)
    guess = Account.of("Steps", "steps", {"steps": predicted}, total=predicted, source="plan", low=low, high=high)
    truth = Account.of("Steps", "steps", {"steps": measured}, total=measured, source="loop counter")
    return Receipt(guess, truth, setting=setting or {"batch_size": 8, "compress": None, "autocast": ""})


def test_no_guess_is_said_and_not_kept(folder):
    for none in (None, ""):
        assert sheet.guess("01", KIND, none, 0.6) == "no guess yet; it is 60%"
    assert not folder.exists()


def test_a_guess_is_kept_with_how_far_off_it_is():
    assert sheet.guess("01", KIND, 0.25, 0.6) == "you guessed 25%; it is 60%"
    assert sheet.guess("06", "abstracts", 40, 33, form="{} of 60") == "you guessed 40 of 60; it is 33 of 60"
    assert sheet.guess("04", "the decoder's share", 0.9, 0.951, form="≈{:.0%}") == "you guessed 90%; it is ≈95%"
    found = sheet.shown()
    assert found.guesses.to_numpy().tolist() == [
        ["01", KIND, "25%", "60%", "-58%", "no"],
        ["04", "the decoder's share", "90%", "≈95%", "-5%", "yes"],
        ["06", "abstracts", "40 of 60", "33 of 60", "+21%", "no"],
    ]
    assert found.sentence == "3 guesses, 1 within 20%; 0 receipts, 0 in their band"


@pytest.mark.parametrize(("mine", "far", "near"), [(0, "+0%", "yes"), (0.1, "+inf%", "no")])
def test_a_truth_of_zero(mine, far, near):
    assert sheet.guess("01", KIND, mine, 0).endswith("it is 0%")
    assert sheet.shown().guesses.iloc[0].tolist()[-2:] == [far, near]


def test_a_later_guess_takes_the_place_of_the_earlier_one():
    for mine in (0.25, 0.55):
        sheet.guess("01", KIND, mine, 0.6)
    sheet.guess("01", KIND, None, 0.6)
    assert sheet.shown().guesses["yours"].to_list() == ["55%"]


def test_a_name_is_right_or_another():
    said = sheet.guess("00", "the longest part", "Backward ", "backward", form="{}")
    assert said == "you guessed Backward; it is backward"
    sheet.guess("02b", "what is not sharded", "gradients", "saved activations", form="{}")
    found = sheet.shown()
    assert found.guesses["how far off"].to_list() == ["right", "another"]
    assert found.sentence.startswith("2 guesses, 1 within 20%;")


@pytest.mark.parametrize(
    ("mine", "truth", "form", "expected"),
    [("25%", 0.6, "{:.0%}", "'25%': expected a number"), (3, "backward", "{}", "3: expected a name in quotes")],
)
def test_a_guess_of_the_other_kind_is_refused_in_one_sentence(mine, truth, form, expected, folder):
    with pytest.raises(ValueError, match=expected):
        sheet.guess("01", KIND, mine, truth, form)
    assert not folder.exists()


def test_receipts_are_kept_by_their_setting():
    sheet.keep("01", receipt(), receipt(setting={"batch_size": 16}))
    sheet.keep("01", receipt(predicted=130, band=(125, 140)))
    sheet.keep("00", receipt(band=None))
    found = sheet.shown()
    assert found.receipts.to_numpy().tolist() == [
        ["00", "Steps: batch_size=8", "110 steps", "100 steps", "+10.0%", "no band"],
        ["01", "Steps: batch_size=16", "110 steps", "100 steps", "+10.0%", "yes"],
        ["01", "Steps: batch_size=8", "130 steps", "100 steps", "+30.0%", "no"],
    ]
    assert found.sentence == "0 guesses, 0 within 20%; 3 receipts, 1 in their band, 1 without a band"


def test_guesses_and_receipts_do_not_displace_each_other():
    sheet.keep("01", receipt())
    sheet.guess("01", KIND, 0.5, 0.6)
    sheet.keep("01", receipt())
    assert sheet.shown().sentence == "1 guess, 1 within 20%; 1 receipt, 1 in its band"


def test_both_tables_are_shown_as_text_and_as_html():
    assert repr(sheet.shown()).startswith("The sheet is empty:")
    assert "<table>" not in sheet.shown()._repr_html_()
    sheet.guess("01", "a < b", 0.5, 0.6)
    sheet.keep("01", receipt())
    text, page = repr(sheet.shown()), sheet.shown()._repr_html_()
    for word in ("1 guess, ", "how far off", "-17%", "in the band", "batch_size=8"):
        assert word in text
        assert word in page
    assert page.count("<table>") == 2
    assert "a &lt; b" in page


def test_another_process_finds_what_was_kept():
    sheet.guess("01", KIND, 0.5, 0.6)
    code = "from lessons import sheet\nprint(sheet.shown().guesses['yours'].item())"
    there = Path(sheet.__file__).parents[1]  # a notebook's folder, where the package is found
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True, cwd=there
    )
    assert done.stdout == "50%\n"


ROW = ["01", KIND, "50%", "60%", "-17%", "yes"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"{}", b"7", b"[" * 100_000,
     b'{"guesses": 7, "receipts": []}', b'{"guesses": ["a"], "receipts": []}',
     json.dumps({"guesses": [ROW[:5]], "receipts": []}).encode(),
     json.dumps({"guesses": [[*ROW[:5], 1]], "receipts": []}).encode()],
    ids=range(11),
)  # fmt: skip
def test_a_damaged_or_foreign_file_counts_as_empty_and_is_told(content, folder):
    sheet.guess("01", KIND, 0.5, 0.6)
    (path,) = folder.iterdir()
    path.write_bytes(content)
    assert sheet.shown().sentence == "The sheet that was kept cannot be read: a new one begins."
    assert len(sheet.shown().guesses) == 0
    assert sheet.guess("01", KIND, None, 0.6).startswith("no guess yet; it is 60%\nThe sheet that was kept")
    assert path.read_bytes() == content
    sheet.guess("02", KIND, 0.5, 0.6)
    assert sheet.guess("01", KIND, None, 0.6) == "no guess yet; it is 60%"
    assert json.loads(path.read_text("utf-8")) == {"guesses": [["02", *ROW[1:]]], "receipts": []}


def test_a_folder_that_cannot_be_written_to_stops_no_lesson(folder):
    folder.parent.write_bytes(b"a file where the folder should be")
    assert sheet.guess("01", KIND, 0.5, 0.6) == "you guessed 50%; it is 60%"
    sheet.keep("01", receipt())
    assert sheet.shown().sentence.startswith("The sheet is empty:")


def test_a_sheet_is_written_whole_or_not_at_all(folder, monkeypatch):
    sheet.guess("01", KIND, 0.5, 0.6)
    (path,) = folder.iterdir()
    before = path.read_bytes()

    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("os.replace", full)
    assert sheet.guess("01", KIND, 0.4, 0.6) == "you guessed 40%; it is 60%"
    assert [one.read_bytes() for one in folder.iterdir()] == [before]
