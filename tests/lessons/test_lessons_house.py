"""What all lessons keep to: a figure before a verdict, named pictures, exercises with answers, explained words."""

import ast
import csv
import re
from collections import Counter
from pathlib import Path

import nbformat
import pytest

from lessons.verdict import verdict

REPO = Path(__file__).resolve().parents[2]
NOTEBOOKS = {path.stem: nbformat.read(path, as_version=4) for path in sorted((REPO / "notebooks").glob("*.ipynb"))}
LESSONS = [name for name in NOTEBOOKS if re.match(r"0([1-6]|2b|4b)_", name)]
QUESTIONS = Path(__file__).with_name("questions.csv")
VERDICT_ALONE = re.compile(r"[:,] (True|False)\b|^\s*(True|False)\s*$|: \{.*(True|False)")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def printed(cell):
    """The lines of a cell's outputs as text."""
    texts = [out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs]
    return [line for text in texts for line in text.splitlines() if line.strip()]


def shown(notebook):
    return "\n".join([prose(notebook), *(cell.source for cell in code_cells(notebook)),
                      *(line for cell in code_cells(notebook) for line in printed(cell))])  # fmt: skip


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_cell_shows_a_truth_value_in_place_of_a_figure(name):
    alone = [line for cell in code_cells(NOTEBOOKS[name]) for line in printed(cell) if VERDICT_ALONE.search(line)]
    assert alone == []


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_verdict_is_negative(name):
    lines = [line for cell in code_cells(NOTEBOOKS[name]) for line in printed(cell) if "≈" in line and "NOT " in line]
    assert lines == []


def test_a_truth_value_is_noticed():
    for line in ("quicker: True", "{'a': True}", "found: {'int8': True, 'fp8': False}", "True", "a: True and b: False"):
        assert VERDICT_ALONE.search(line)
    for line in ("backward over forward: ≈1.8 times, above 1", "256   0.53  True"):
        assert not VERDICT_ALONE.search(line)


def test_a_verdict_says_the_figure_first():
    assert verdict("time saved", 0.3125, "frac", above=0.3) == "time saved: ≈31.2%, above 30%"
    assert verdict("peak", 3 * 2**20, "bytes", below=2**20) == "peak: ≈3.0 MiB, NOT below 1.0 MiB"
    assert verdict("ratio", 1.0, "times", above=0.5, below=2) == "ratio: ≈1 times, above 0.5, below 2"
    with pytest.raises(ValueError, match="'ratio' has no limit"):
        verdict("ratio", 1.0)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_picture_of_curves_has_a_title_and_a_named_axis(name):
    for cell in code_cells(NOTEBOOKS[name]):
        for call in [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Call)]:
            called = ast.unparse(call.func)
            if called == "drawing.curves":
                assert "title" in {word.arg for word in call.keywords}, cell.source
            if called == "meter.draw":  # ways, unit, title, target
                assert len(call.args) == 4, cell.source


@pytest.mark.parametrize("name", LESSONS)
def test_exercises_raise_until_they_are_solved_and_their_answers_are_folded(name):
    raising = [cell for cell in code_cells(NOTEBOOKS[name]) if "raises-exception" in cell.metadata.get("tags", [])]
    assert len(raising) >= 2
    for cell in raising:
        (error,) = [out for out in cell.outputs if out.output_type == "error"]
        assert error.ename == "AssertionError", f"{error.ename}: {error.evalue}"
    assert "two or three lines" in " ".join(prose(NOTEBOOKS[name]).split())
    last = NOTEBOOKS[name].cells[-1].source
    answers = re.search(r"<details><summary>Answers</summary>\n\n1\. .+\n2\. .+</details>", last, re.DOTALL)
    assert answers, "the answers are folded at the end"


def test_the_glossary_has_fifteen_words_and_is_linked_from_the_start():
    text = (REPO / "notebooks" / "glossary.md").read_text("utf-8")
    rows = re.findall(r"^\| \*\*(.+)\*\* \| (.+) \|$", text, re.MULTILINE)
    assert len(rows) == 15
    assert len({word for word, _ in rows}) == 15
    assert "](glossary.md)" in NOTEBOOKS["00_start_here"].cells[0].source


def test_all_relative_links_lead_to_files():
    for notebook in NOTEBOOKS.values():
        for target in re.findall(r"\]\((?!http)([^)#]+)", prose(notebook)):
            assert (REPO / "notebooks" / target).is_file(), target
    for name in LESSONS:
        assert f"]({name}.ipynb)" in prose(NOTEBOOKS["00_start_here"]), f"{name} is not listed at the start"


def test_the_app_has_all_four_labs():
    app = nbformat.read(REPO / "notebooks" / "app" / "whatif.ipynb", as_version=4)
    source = "\n".join(cell.source for cell in code_cells(app))
    assert set(re.findall(r"(\w+)\.whatif\(", source)) == {"padding", "activations", "moe", "decoder"}


def test_five_questions_about_each_notebook_whose_answers_stand_in_it():
    with QUESTIONS.open(newline="", encoding="utf-8") as file:
        questions = list(csv.DictReader(file))
    assert Counter(row["notebook"] for row in questions) == dict.fromkeys(NOTEBOOKS, 5)
    for row in questions:
        text = " ".join(shown(NOTEBOOKS[row["notebook"]]).split())
        assert row["where"] in text, f"{row['notebook']}: {row['where']!r} is not in it"
        assert row["question"].endswith("?"), row
        assert row["answer"].strip(), row
