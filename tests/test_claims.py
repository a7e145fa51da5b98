"""The table of claims: sixty rows, and behind each of them a cell that runs and says what the row says."""

import math
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import effkit as ek
from effkit.claims import Finding, check, table
from effkit.claims.table import LIVE, RECOMPUTED, STATUSES, UNITS, WHAT_IF, Claim, rows
from lessons.claims_browser import browse

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
ROWS = list(rows().values())
NOT_COMPARED = 27  # abstracts without a number about efficiency


def text_of(cell) -> str:
    return "\n".join(str(out.get("text") or out.get("data", {}).get("text/plain", "")) for out in cell.outputs)


def cells_of(notebook: str, section: str) -> list:
    """The code cells under a heading, up to the next."""
    inside, found = False, []
    for cell in nbformat.read(NOTEBOOKS / notebook, as_version=4).cells:
        if cell.cell_type == "markdown":
            headings = [line.lstrip("#").strip() for line in cell.source.splitlines() if line.startswith("#")]
            inside = headings[-1] == section if headings else inside
        elif inside:
            found.append(cell)
    return found


def why_not_backed(row: Claim) -> str | None:
    """What is missing behind a row, or None."""
    if not (NOTEBOOKS / row.notebook).is_file():
        return f"there is no notebook {row.notebook!r}"
    cells = cells_of(row.notebook, row.section)
    if not cells:
        return f"{row.notebook} has no code under a heading {row.section!r}"
    cell = next((one for one in cells if f'check("{row.paper}"' in one.source), None)
    if cell is None:
        return f"no cell under {row.section!r} checks it"
    if repr(Finding(row, row.ours)) not in text_of(cell):
        return f"the cell says something else: {text_of(cell)}"
    return None


def test_a_cell_stands_behind_every_row_and_shows_its_figure():
    why_not = {row.paper: why_not_backed(row) for row in ROWS}
    assert not {paper: why for paper, why in why_not.items() if why is not None}


def test_a_row_without_its_cell_or_with_another_figure_is_noticed():
    from dataclasses import replace

    row = rows()["MegaScale"]
    assert "no notebook" in why_not_backed(replace(row, notebook="06_none.ipynb"))
    assert "no code under" in why_not_backed(replace(row, section="5. Nothing"))
    assert "no cell under" in why_not_backed(replace(row, paper="MegaScales"))
    assert "something else" in why_not_backed(replace(row, ours=row.ours + 0.01))
    assert "something else" in why_not_backed(replace(row, theirs="0.6"))
    assert "something else" in why_not_backed(replace(row, status=LIVE))


def test_sixty_papers_and_enough_of_each_status():
    frame = ek.claims()
    assert len(frame) == frame["arxiv"].nunique() == 60
    counts = frame["status"].value_counts()
    assert set(counts.index) == set(STATUSES), "nothing is called not testable without a calculator"
    assert counts[LIVE] >= 30
    assert counts[RECOMPUTED] >= 12
    assert frame["claim"].str.startswith("No efficiency number").sum() == NOT_COMPARED


def test_rows_are_whole():
    for row in ROWS:
        assert row.unit in UNITS, row.paper
        assert all((row.claim, row.resource, row.theme, row.figure, row.scale)), row.paper
        assert len(row.claim) <= 260, row.paper
        assert math.isfinite(row.ours), row.paper
        measured = not math.isnan(row.ours_low)
        assert measured or row.status != LIVE, f"{row.paper}: what is measured has a range that other runs lie in"
        assert not (measured and row.status == RECOMPUTED), f"{row.paper}: arithmetic has none"
        assert not measured or row.ours_low <= row.ours <= row.ours_high, row.paper
        if row.claim.startswith("No efficiency number") and row.paper != "PixArt-Σ":  # whose third is second-hand
            assert row.gap is None, f"{row.paper}: an abstract without a number cannot be missed by a gap"


def claim(**changes) -> Claim:
    given = {"paper": "A", "arxiv": "1", "claim": "c", "resource": "r", "theme": "t", "status": LIVE, "figure": "f",
             "unit": "times", "theirs": "2 to 3", "ours": 2.0, "ours_low": 1.5, "ours_high": 2.5, "scale": "s",
             "notebook": "n.ipynb", "section": "1. A b"}  # fmt: skip
    return Claim(**given | changes)


def test_what_theirs_means():
    def band(theirs, unit="times"):
        account = claim(theirs=theirs, unit=unit).published
        return account.low, account.total, account.high

    assert band("2 to 3") == (2000, 2500, 3000)
    assert band("0.552", "frac") == (552_000, 552_000, 552_000)
    assert band("over 17.5")[:2] == (17_500, 17_500)
    assert band("over 17.5")[2] > 1e6
    assert band("under 0.005", "frac") == (0, 5000, 5000)
    assert band("up to 0.5", "frac") == (0, 500_000, 500_000)
    assert claim(theirs="2 to 3").theirs_in_words == "2 to 3 times"
    assert claim(theirs="under 0.005", unit="frac").theirs_in_words == "under 0.5%"
    assert claim(theirs="").published is None
    assert claim(theirs="").theirs_in_words == "no number"
    assert claim(theirs="2.5, of a whole iteration").gap is None
    assert claim(theirs="3").gap == pytest.approx(0.5)
    assert claim().link == "n.ipynb#1.-A-b"


def test_findings_agree_within_their_range_or_their_rounding():
    assert Finding(claim(), 2.4).agrees
    assert not Finding(claim(), 2.6).agrees
    exact = claim(ours_low=math.nan, ours_high=math.nan, ours=0.552, unit="frac", theirs="0.55")
    assert Finding(exact, 0.5524).agrees
    assert not Finding(exact, 0.556).agrees
    assert "THIS RUN SAYS 55.6%" in repr(Finding(exact, 0.556))
    assert repr(Finding(claim(), 1.6)) == repr(Finding(claim(), 2.4)), "what is compared does not hang on the run"


def test_a_finding_is_a_receipt():
    receipt = Finding(claim(theirs="3"), 2.0).receipt
    assert receipt.error == pytest.approx(0.5)
    assert not receipt.within_band
    assert Finding(claim(theirs=""), 2.0).receipt is None


def test_bad_input_is_one_sentence():
    with pytest.raises(KeyError, match=r"'Nobody' is no paper of the table; expected one of Canary-1B"):
        check("Nobody", 1.0)
    with pytest.raises(ValueError, match="expected a finite number"):
        check("MegaScale", float("nan"))
    with pytest.raises(ValueError, match="theme is 'tea', expected one of activation-memory"):
        ek.claims(theme="tea")
    with pytest.raises(ValueError, match="resource is 'tea'"):
        ek.claims(resource="tea")
    with pytest.raises(ValueError, match="status is 'tea', expected the beginning of measured live"):
        ek.claims(status="tea")


def test_filters_keep_all_that_list_the_word():
    frame = ek.claims()
    padded = ek.claims(theme="padding")
    assert set(padded.index) == {row.paper for row in ROWS if "padding" in row.theme.split("; ")}
    assert len(ek.claims(status=WHAT_IF)) == (frame["status"] == WHAT_IF).sum()
    both = ek.claims(theme="decoder", resource="compute")
    assert 0 < len(both) < min(len(ek.claims(theme="decoder")), len(ek.claims(resource="compute")))


def test_without_its_data_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(table, "PATHS", (tmp_path / "claims.csv",))
    rows.cache_clear()
    with pytest.raises(FileNotFoundError, match="not beside effkit"):
        ek.claims()
    monkeypatch.undo()
    rows.cache_clear()


def test_an_installed_effkit_carries_the_table_where_it_is_looked_for_first(monkeypatch, tmp_path):
    project = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text())
    carried = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert [NOTEBOOKS.parent / path for path in carried] == [table.PATHS[1]]
    assert [NOTEBOOKS.parent / path for path in carried.values()] == [table.PATHS[0]]
    lines = table.PATHS[1].read_text("utf-8").splitlines(keepends=True)
    (tmp_path / "claims.csv").write_text("".join(lines[:3]), "utf-8")
    monkeypatch.setattr(table, "PATHS", (tmp_path / "claims.csv", table.PATHS[1]))
    rows.cache_clear()
    assert len(ek.claims()) == 2
    monkeypatch.undo()
    rows.cache_clear()


def test_the_page_shows_what_the_lists_choose():
    page = browse()
    assert page.shown().startswith("60 of 60 papers; ")
    page.controls["theme"].value = "padding"
    page.controls["status"].value = RECOMPUTED
    pd.testing.assert_frame_equal(page.result, ek.claims(theme="padding", status=RECOMPUTED))
    assert page.shown().startswith(f"{len(page.result)} of 60 papers; ")
    assert page.screen.value.count("<tr><th>") == len(page.result) + 1
    assert 'role="img"' in page.screen.value
    page.controls["theme"].value = "all"
    bundle = page._repr_mimebundle_()
    data = bundle[0] if isinstance(bundle, tuple) else bundle
    assert data["text/plain"] == "ClaimsBrowser of 60 papers"
    assert data["image/png"]


def test_a_choice_without_rows_is_shown_as_such():
    page = browse()
    page.controls["theme"].value = "moe-comm"
    page.controls["resource"].value = "decode latency"
    assert page.shown() == "0 of 60 papers; 0 with a published number of the same kind as ours."
