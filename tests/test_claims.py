"""The table of claims: sixty rows, and behind each of them a cell that runs and says what the row says."""

import math
import re
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest

import canonical
import effkit as ek
from effkit.claims import Finding, check, table
from effkit.claims.table import UNITS, Claim, rows
from lessons.claims_browser import browse

NOTEBOOKS = Path(__file__).resolve().parents[1] / "notebooks"
ROWS = list(rows().values())
RAN, SIMULATED, COUNTED, ASSUMED = "ran", "simulated", "counted", "assumed"
RECOMPUTED = "recomputed from the paper's own figures"
HOWS = (RAN, SIMULATED, COUNTED, RECOMPUTED, ASSUMED)
CLOSES, NO_EFFECT, NOT_A_TEST = "closes", "no effect seen here", "not a test"
VERDICTS = (CLOSES, "does not close", "contradicts itself", NO_EFFECT, "not comparable at this scale", NOT_A_TEST)
FROM_THEIRS = {"Sparse-IFT", "MTO"}  # our figure is made from the published one
ONE_MORE = "inside the interval of one more seed"
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
    checked = re.compile(rf'(check|\.row)\("{re.escape(row.paper)}"')
    cell = next((one for one in cells if checked.search(one.source)), None)
    if cell is None:
        return f"no cell under {row.section!r} checks it"
    # the figure of the cell's own run is not the table's to say: only that it is where the row says that it lies
    own = re.compile(rf"(?<=  this run: )\S+|(?:NOT )?{re.escape(ONE_MORE)}")
    if own.sub("?", repr(Finding(row, row.stored))) not in own.sub("?", text_of(cell)):
        return f"the cell says something else: {text_of(cell)}"
    return None


def test_a_cell_stands_behind_every_row_and_shows_its_figure():
    why_not = {row.paper: why_not_backed(row) for row in ROWS}
    assert not {paper: why for paper, why in why_not.items() if why is not None}


def test_no_more_live_seeds_lie_outside_of_their_intervals_than_chance_allows():
    """Each has one chance in twenty: so many or more of all rows have at least one in fifty."""
    notebooks = [nbformat.read(path, as_version=4) for path in sorted(NOTEBOOKS.glob("06*.ipynb"))]
    texts = [text_of(cell) for notebook in notebooks for cell in notebook.cells if cell.cell_type == "code"]
    held = [line for text in texts for line in text.splitlines() if ONE_MORE in line]
    assert len(held) == sum(row.stored_seeds > 0 for row in ROWS) > 20
    num, outside = len(held), sum("NOT" in line for line in held)
    chances = [math.comb(num, some) * 0.05**some * 0.95 ** (num - some) for some in range(outside, num + 1)]
    assert sum(chances) > 1 / 50, f"{outside} of {num}"


def test_a_row_without_its_cell_or_with_another_figure_is_noticed():
    from dataclasses import replace

    row = rows()["MegaScale"]
    assert "no notebook" in why_not_backed(replace(row, notebook="06_none.ipynb"))
    assert "no code under" in why_not_backed(replace(row, section="5. Nothing"))
    assert "no cell under" in why_not_backed(replace(row, paper="MegaScales"))
    assert "something else" in why_not_backed(replace(row, stored=row.stored + 0.01))
    assert "something else" in why_not_backed(replace(row, theirs="0.6"))
    assert "something else" in why_not_backed(replace(row, verdict=NO_EFFECT))


def test_sixty_papers_each_with_a_way_and_a_verdict():
    frame = ek.claims()
    assert len(frame) == frame["arxiv"].nunique() == 60
    assert set(frame["how"]) <= set(HOWS)
    assert set(frame["verdict"]) <= set(VERDICTS)
    assert frame["claim"].str.startswith("No efficiency number").sum() == NOT_COMPARED


def test_rows_are_whole():
    for row in ROWS:
        assert row.unit in UNITS, row.paper
        assert all((row.claim, row.resource, row.theme, row.figure, row.their_setting, row.our_setting)), row.paper
        assert len(row.claim) <= 260, row.paper
        assert math.isfinite(row.stored), row.paper
        assert row.varies or row.how != RAN, f"{row.paper}: what is measured has a range that other runs lie in"
        assert not (row.varies and row.how == RECOMPUTED), f"{row.paper}: arithmetic has none"
        assert not row.varies or row.stored_low <= row.stored <= row.stored_high, row.paper
        if row.claim.startswith("No efficiency number") and row.paper != "PixArt-Σ":  # whose third is second-hand
            assert row.gap is None, f"{row.paper}: an abstract without a number cannot be missed by a gap"


def test_a_range_that_holds_no_effect_has_that_verdict_and_no_other_range_has():
    no_effect = {row.paper for row in ROWS if row.varies and row.stored_low <= row.no_effect <= row.stored_high}
    assert {row.paper for row in ROWS if row.verdict == NO_EFFECT} == no_effect
    assert len(no_effect) == 5
    # without an effect a ratio is 1 and a share or a correlation 0; the error of a law has no such figure
    without = {row.paper: row.no_effect for row in ROWS if row.varies and not math.isnan(row.no_effect)}
    expected = {row.paper: {"times": 1, "frac": 0, "correlation": 0}[row.unit] for row in ROWS if row.varies}
    assert {paper for paper, value in without.items() if value != expected[paper]} == {"SortedNet"}
    assert set(expected) - set(without) == {"CMR"}


def test_what_closes_has_a_published_figure_near_the_stored_one():
    for row in ROWS:
        if row.verdict == CLOSES:
            low, _, high = row.published
            assert 0.9 * low <= row.stored <= 1.1 * high, row.paper
    assert all(row.published is None for row in ROWS if row.verdict == NOT_A_TEST and row.paper not in FROM_THEIRS)


def claim(**changes) -> Claim:
    given = {"paper": "A", "arxiv": "1", "claim": "c", "resource": "r", "theme": "t", "how": RAN, "verdict": CLOSES,
             "figure": "f", "unit": "times", "theirs": "2 to 3", "their_setting": "a cluster", "stored": 2.0,
             "stored_low": 1.5, "stored_high": 2.5, "stored_on": "2026-01-02", "stored_machine": "a machine",
             "no_effect": 1.0, "our_setting": "a toy", "notebook": "n.ipynb", "section": "1. A b",
             "stored_seeds": 5.0, "run_low": 1.0, "run_high": 3.0,
             "bounded_by": "", "applies_if": "", "lever": "", "price": ""}  # fmt: skip
    return Claim(**given | changes)


def test_what_theirs_means():
    assert claim(theirs="2 to 3").published == (2, 2.5, 3)
    assert claim(theirs="0.552", unit="frac").published == (0.552, 0.552, 0.552)
    assert claim(theirs="over 17.5").published == (17.5, 17.5, math.inf)
    assert claim(theirs="under 0.005", unit="frac").published == (0, 0.005, 0.005)
    assert claim(theirs="up to 0.5", unit="frac").published == (0, 0.5, 0.5)
    assert claim(theirs="2 to 3").theirs_in_words == "2 to 3 times"
    assert claim(theirs="under 0.005", unit="frac").theirs_in_words == "under 0.5%"
    assert claim(theirs="").published is None
    assert claim(theirs="").theirs_in_words == "no number"
    assert claim(theirs="2.5, of a whole iteration").gap is None
    assert claim(theirs="3").gap == pytest.approx(0.5)
    assert claim().link == "n.ipynb#1.-A-b"


def test_findings_agree_within_their_range_or_their_rounding():
    assert Finding(claim(), 2.9).agrees
    assert not Finding(claim(), 3.1).agrees
    exact = claim(stored_low=math.nan, stored_high=math.nan, stored=0.552, unit="frac", theirs="0.55")
    assert Finding(exact, 0.5524).agrees
    assert not Finding(exact, 0.556).agrees


def test_a_finding_shows_the_paper_this_run_and_the_stored_run_each_by_its_name():
    assert repr(Finding(claim(), 3.1)).splitlines() == [
        "A (arXiv 1): f",
        "  paper: 2 to 3 times (a cluster)",
        "  this run: ≈3.1 times (a toy)",
        "  stored: 2 times, the mean of 5 seeds, in 95% between 1.5 times and 2.5 times; "
        "one more seed, in 95%, between 1 times and 3 times (2026-01-02, a machine)",
        "  how: ran; verdict: closes; this run is NOT inside the interval of one more seed",
    ]
    exact = claim(stored_low=math.nan, stored_high=math.nan, stored_on="", stored_machine="")
    assert repr(Finding(exact, 2.0)).splitlines()[2:] == [
        "  this run: 2 times (a toy)",
        "  stored: 2 times (date not known, machine not known)",
        "  how: ran; verdict: closes; this run is as stored",
    ]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.paper)
def test_a_changed_stored_figure_changes_no_figure_of_this_run(row):
    from dataclasses import replace

    value = row.stored
    other = replace(row, stored=3.21 * row.stored, stored_low=0.5 * row.stored_low, stored_high=4 * row.stored_high)
    was, now = (repr(Finding(one, value)).splitlines() for one in (row, other))
    assert was[:3] == now[:3], "the paper's figure and this run's"
    assert now[3].startswith(f"  stored: {table.figure(3.21 * row.stored, row.unit)}")
    run, other_run = (repr(Finding(row, one)).splitlines() for one in (value, 1.57 * value))
    assert table.figure(1.57 * value, row.unit) in other_run[2]
    assert run[3] == other_run[3], "a run changes nothing that is stored"


def test_only_the_figures_of_a_run_are_not_compared():
    def compared(finding):
        return canonical.masked(repr(finding), canonical.MEASURED)

    assert compared(Finding(claim(), 1.6)) == compared(Finding(claim(), 3.1)), "one seed in twenty lies outside"
    assert compared(Finding(claim(), 1.6)) != compared(Finding(claim(verdict=NO_EFFECT), 1.6))
    exact = claim(stored_low=math.nan, stored_high=math.nan)
    assert compared(Finding(exact, 2.0)) != compared(Finding(exact, 2.008)), "arithmetic is compared to the digit"
    assert "2.4" in canonical.masked(repr(Finding(claim(), 2.4))), "the notebook keeps the figure"


def test_bad_input_is_one_sentence():
    with pytest.raises(KeyError, match=r"'Nobody' is no paper of the table; expected one of Canary-1B"):
        check("Nobody", 1.0)
    with pytest.raises(ValueError, match="expected a finite number"):
        check("MegaScale", float("nan"))
    with pytest.raises(ValueError, match="theme is 'tea', expected one of activation-memory"):
        ek.claims(theme="tea")
    with pytest.raises(ValueError, match="resource is 'tea'"):
        ek.claims(resource="tea")
    with pytest.raises(ValueError, match="how is 'tea', expected one of assumed, counted"):
        ek.claims(how="tea")
    with pytest.raises(ValueError, match="verdict is 'tea', expected one of closes"):
        ek.claims(verdict="tea")


def test_filters_keep_all_that_list_the_word():
    frame = ek.claims()
    padded = ek.claims(theme="padding")
    assert set(padded.index) == {row.paper for row in ROWS if "padding" in row.theme.split("; ")}
    assert len(ek.claims(verdict=NO_EFFECT)) == (frame["verdict"] == NO_EFFECT).sum()
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
    assert [NOTEBOOKS.parent / home / "claims.csv" for home in ("data", carried["data"])] == [*reversed(table.PATHS)]
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
    page.controls["how"].value = RECOMPUTED
    pd.testing.assert_frame_equal(page.result, ek.claims(theme="padding", how=RECOMPUTED))
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
    assert page.shown() == "0 of 60 papers; 0 with a published number of the same kind."


def test_only_what_closes_is_drawn_as_a_hit_and_an_open_claim_as_an_arrow():
    from matplotlib.colors import to_rgba

    page = browse()
    figure = page._picture._draw(page._drawn())
    ratios = figure.axes[0]
    assert len(ratios.texts) == sum(row.theirs.startswith("over") and row.unit == "times" for row in ROWS) == 1
    for ax in figure.axes:
        names = [label.get_text() for label in ax.get_yticklabels()]
        marks = {names[round(line.get_ydata()[0])]: line for line in ax.lines
                 if line.get_marker() in "osD^x" and line.get_linestyle() == "None"}  # fmt: skip
        assert set(marks) == set(names)
        for paper, line in marks.items():
            filled = to_rgba(line.get_markerfacecolor())[3] > 0 and line.get_marker() != "x"
            assert filled == (rows()[paper].verdict == CLOSES), paper
            ticks = [one for one in ax.lines if one.get_marker() == "|" and one.get_ydata()[0] == line.get_ydata()[0]]
            assert [tick.get_zorder() >= line.get_zorder() for tick in ticks] == [True]
            assert ticks[0].get_markersize() > line.get_markersize(), "a mark does not hide what is published"
