"""Notebooks as a reader meets them: JupyterLab in a real browser, a keyboard, and the button.

Pictures of what the reader saw are left in tests/screenshots/.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nbformat
import pytest
from lab_browser import (
    REPO,
    click_measure,
    errors,
    first_slider,
    jupyterlab,
    notebook_page,
    press_key,
    run_all_cells,
    status_text,
    svg_markup,
    wait_for_receipt,
    wait_until,
    whatif,
    why_no_browser,
)
from lab_processes import left_by_a_killed_test, started_by, still_there

NOTEBOOKS = REPO / "notebooks"
SCREENSHOTS = Path(__file__).parent / "screenshots"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(why_no_browser() is not None, reason=str(why_no_browser())),
]


def cut(name: str, last: str, folder: Path, **replaced: str) -> str:
    """The notebook up to the first cell that has ``last``, with the lessons, in this folder; what it is called there.

    ``replaced``: calls without arguments, by name, and the arguments that they get: a smaller model. The whole
    notebooks are run elsewhere.
    """
    shutil.copytree(NOTEBOOKS / "lessons", folder / "lessons", ignore=shutil.ignore_patterns("__pycache__"))
    notebook = nbformat.read(NOTEBOOKS / name, as_version=4)
    place = next(place for place, cell in enumerate(notebook.cells) if last in cell.source)
    notebook.cells = notebook.cells[: place + 1]
    for call, arguments in replaced.items():
        found = [cell for cell in notebook.cells if f"{call}()" in cell.source]
        assert len(found) == 1, f"{call}() is in {len(found)} cells of {name}, not in one"
        found[0].source = found[0].source.replace(f"{call}()", f"{call}({arguments})")
    nbformat.write(notebook, folder / name)
    return name


def test_a_reader_runs_the_notebook_moves_a_slider_and_gets_a_receipt(tmp_path):
    name = "01_padding"
    notebook = cut(f"{name}.ipynb", ".whatif(", tmp_path, speech="encoder_layers=1, decoder_layers=1, hidden=32")
    SCREENSHOTS.mkdir(exist_ok=True)
    before, blocked = started_by(os.getpid()), []
    with jupyterlab(tmp_path) as lab, notebook_page(lab, notebook, blocked) as page:
        try:
            run_all_cells(page, timeout_s=300)
            slider, sentence, picture = first_slider(page), status_text(page), svg_markup(page)
            press_key(page, slider, "ArrowRight")
            wait_until(page, lambda: status_text(page) != sentence, "the sentence followed the slider", 10)
            wait_until(page, lambda: svg_markup(page) != picture, "the picture followed the slider", 10)
            assert "receipt" not in status_text(page).lower(), "a receipt for a setting that nobody has run"
            whatif(page).screenshot(path=SCREENSHOTS / f"{name}_moved.png")

            click_measure(page)
            sentence = wait_for_receipt(page)
            assert any(sign.isdigit() for sign in sentence), f"a receipt without a number: {sentence}"
            whatif(page).screenshot(path=SCREENSHOTS / f"{name}_receipt.png")

            assert errors(page) == []
            assert "Traceback" not in lab.log.read_text()
            assert blocked == [], "nothing may be asked of the network"
        finally:  # after a failure this is what the reader would be looking at
            if whatif(page).count():
                whatif(page).evaluate("element => element.scrollIntoView({block: 'center'})")
            page.screenshot(path=SCREENSHOTS / f"{name}_page.png")
        family = started_by(os.getpid()) - before
        assert lab.process in family
        assert started_by(lab.process.pid), "no kernel was seen, so its end would prove nothing"
    assert still_there(family) == []


def test_a_reader_of_the_first_notebook_picks_a_moment_of_the_memory(tmp_path):
    SCREENSHOTS.mkdir(exist_ok=True)
    blocked: list[str] = []
    notebook = cut("00_start_here.ipynb", 'controls["moment"].value = 0', tmp_path)
    with jupyterlab(tmp_path) as lab, notebook_page(lab, notebook, blocked) as page:
        run_all_cells(page, timeout_s=300)
        browser = page.locator(".effkit-memory").first
        sentence = browser.locator("[role=status]")
        before = sentence.inner_text()
        browser.locator(".noUi-handle").first.focus()
        for _ in range(40):  # the notebook leaves it at the first moment
            page.keyboard.press("ArrowRight")
        wait_until(page, lambda: sentence.inner_text() != before, "the sentence followed the slider", 10)
        picture = browser.locator("svg[role=img]")
        wait_until(
            page, lambda: picture.get_attribute("aria-label") == sentence.inner_text(), "the picture followed", 10
        )
        browser.screenshot(path=SCREENSHOTS / "memory_moment.png")
        assert errors(page) == []
        assert blocked == [], "nothing may be asked of the network"


def test_a_reader_of_the_claims_chooses_a_theme_and_follows_a_row_to_its_cell(tmp_path):
    """Without running all that the page runs: its first cells, beside the notebooks that its rows lead to."""
    SCREENSHOTS.mkdir(exist_ok=True)
    for notebook in NOTEBOOKS.glob("06*.ipynb"):
        shutil.copy(notebook, tmp_path)
    cut("06_claims.ipynb", "claims_browser.browse()", tmp_path)
    blocked: list[str] = []
    with jupyterlab(tmp_path) as lab, notebook_page(lab, "06_claims.ipynb", blocked) as page:
        run_all_cells(page, timeout_s=120)
        claims = page.locator(".effkit-claims").first
        sentence = claims.locator("[role=status]")
        assert sentence.inner_text().startswith("60 of 60 papers")
        claims.screenshot(path=SCREENSHOTS / "claims_all.png")
        claims.locator("select").first.select_option("moe-comm")
        wait_until(page, lambda: not sentence.inner_text().startswith("60"), "the sentence followed the choice", 10)
        claims.screenshot(path=SCREENSHOTS / "claims_moe.png")
        assert claims.locator("tbody tr").count() == int(sentence.inner_text().split()[0])
        with page.context.expect_page() as opened:
            claims.locator("tr", has_text="MoMa").locator("a").click()
        heading = opened.value.locator(".jp-RenderedMarkdown h2", has_text="The other papers, a row each")
        heading.wait_for(state="attached", timeout=60_000)
        assert errors(page) == []
        assert blocked == [], "nothing may be asked of the network"


KILLED = """
import sys
from pathlib import Path
from lab_browser import jupyterlab, notebook_page
with jupyterlab(Path(sys.argv[1])) as lab, notebook_page(lab, "one.ipynb"):
    print(lab.process.pid, flush=True)
    sys.stdin.read()
"""


def test_nothing_is_left_running_when_the_test_itself_is_killed(tmp_path):
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    one = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")], metadata=kernel)
    nbformat.write(one, tmp_path / "one.ipynb")
    assert left_by_a_killed_test(KILLED, str(tmp_path)) == []
