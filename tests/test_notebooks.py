"""The notebooks are canonical and show what the code says, and both checks notice when something breaks."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "notebooks"))

import canonical

REPO = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
LIMIT_S = 600
# What a run keeps as its user's, the measured device and the sheet of guesses, stays apart from the user's own.
CACHE = REPO / ".pytest_cache" / "of_notebooks"


class Fault(NamedTuple):
    """One thing broken on purpose: in `file`, the text `old`, which occurs once, becomes `new`."""

    name: str
    file: str
    old: str
    new: str


LAB = REPO / "notebooks" / "01_padding.ipynb"
LAB_FAULTS: tuple[Fault, ...] = (
    Fault("wrong formula", "effkit/padding/plans.py", "np.maximum.reduceat(self._row", "np.minimum.reduceat(self._row"),
    Fault("disconnected observer", "effkit/whatif.py", 'control.observe(self._changed, names="value")', "pass"),
    Fault("changed default", "effkit/padding/prediction.py", '"Buckets by input length", rest=8', '"", rest=7'),
)
# The faults are planted in the lab's cells up to the last that one of them changes, with a smaller model: no output
# that is compared depends on it. Cells with a verdict rest on a clock and are left out.
LAST, MODEL, SMALL = (
    'controls["num_buckets"].value = 3',
    "ek.models.speech()",
    "ek.models.speech(encoder_layers=1, decoder_layers=1, hidden=32)",
)
# The notebooks whose verdicts rest on a clock, and two that start ranks; 01 runs as the unharmed copy that faults
# are planted in.
CLOCKED = {"02b": pytest.mark.alone, "03": pytest.mark.alone, "04": pytest.mark.alone,
           "04b": pytest.mark.timed, "05": pytest.mark.timed}  # fmt: skip
SHOWN = [pytest.param(path, marks=CLOCKED.get(path.stem.split("_")[0], ())) for path in NOTEBOOKS if path != LAB]
needs_lab = pytest.mark.skipif(not LAB.exists(), reason=f"{LAB.name} is not there")

TINY_FAULTS = (
    Fault("wrong formula", "tiny.py", "4 * 1000", "4 * 1001"),
    Fault("disconnected observer", "tiny.py", 'self.slider.observe(self.draw, "value")\n', "\n"),
    Fault("changed default", "tiny.py", "rows=8", "rows=9"),
    Fault("output edited by hand", "tiny.ipynb", r'"8 rows: 32000 bytes\n"', r'"8 rows: 32001 bytes\n"'),
    Fault("false assertion", "tiny.ipynb", "tiny.predict(2) == 8000", "tiny.predict(2) == 8001"),
)
TINY_MODULE = """
    import base64, time
    import ipywidgets

    def predict(rows):
        if rows < 0:
            raise ValueError("rows must not be negative")
        return 4 * 1000 * rows

    def picture():
        return base64.b64encode(str(time.time_ns()).encode()).decode()

    class WhatIf(ipywidgets.VBox):
        def __init__(self, rows=8):
            self.slider = ipywidgets.IntSlider(value=rows, max=64, description="rows")
            self.screen = ipywidgets.HTML()
            super().__init__([self.slider, self.screen])
            self.slider.observe(self.draw, "value")
            self.draw()

        def draw(self, change=None):
            self.screen.value = f"{self.slider.value} rows: {predict(self.slider.value)} bytes"
"""
TINY_CELLS = (
    "import tempfile, time, ipywidgets, tiny\nprint(object(), tempfile.mkdtemp() + '/a.txt', tiny.__file__)",
    "whatif = tiny.WhatIf()\nprint(whatif.screen.value)\nwhatif",
    "whatif.slider.value = 32\nprint(whatif.screen.value)",
    "assert tiny.predict(2) == 8000, 'the formula is wrong'",
    "print(time.time_ns())\nipywidgets.HTML(str(time.time_ns()))",
    'display({"image/png": tiny.picture(), "text/plain": "a picture"}, raw=True)',
    "tiny.predict(-1)",
)
TINY_TAGS = {4: canonical.IGNORED, 6: canonical.RAISES}
ASSERTING = 4  # the place of the cell that asserts, after the title; it prints nothing


# Neither what other plugins import nor a grammar of addresses, which no notebook has and whose compilation takes longer
# than a small notebook does.
PYTEST = """
import sys
sys.modules["rfc3987_syntax"] = None
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""


def run_whole(command: list[str], root: Path, limit_s: float = LIMIT_S) -> tuple[int, str]:
    """Exit status and output of a command that finds the package of `root` before the installed one.

    Past the limit it is ended with its kernels, and that fails: a kernel leads a process group of its own.
    """
    env = {**os.environ, "PYTHONPATH": str(root), "PYTEST_ADDOPTS": "", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    (CACHE / "effkit" / "sheet.json").unlink(missing_ok=True)
    env["XDG_CACHE_HOME"] = str(CACHE)
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=root, env=env, start_new_session=True, **pipes) as process:
        try:
            text, _ = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired:
            for member in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            os.killpg(process.pid, signal.SIGKILL)
            text, _ = process.communicate()
            pytest.fail(f"{' '.join(command)} took longer than {limit_s} s\n{text}")
    return process.returncode, text


def strict_nbval(notebook: Path, root: Path, *options: str) -> tuple[int, str]:
    """How many cells nbval ran and found as the notebook shows them, and what it said.

    Counting them is what makes it strict: a cell that is skipped, or never collected, has not passed.
    """
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-c", PYTEST, "-p", "nbval.plugin", "--nbval", "--nbval-current-env", "--color=no"]
        command += ["--nbval-sanitize-with", str(REPO / "notebooks" / "sanitize.cfg")]
        command += ["-p", "no:cacheprovider", f"--junitxml={results}", *options, str(notebook)]
        _, text = run_whole(command, root)
        cells = list(ElementTree.parse(results).iter("testcase")) if results.exists() else []
    return sum(not list(cell.iterfind("*")) for cell in cells), text


def assert_shown(notebook: Path, root: Path) -> None:
    """All cells show what the notebook shows. A run that missed a verdict on a time has a second look."""
    num_passed, text = strict_nbval(notebook, root)
    if re.search(r", NOT (above|below) |the machine very busy", text):
        num_passed, text = strict_nbval(notebook, root)
    assert num_passed == num_code_cells(notebook), text


def run_canonical(notebook: Path, *options: str) -> tuple[int, str]:
    """Run the tool as `make notebooks` does."""
    tool = REPO / "notebooks" / "canonical.py"
    return run_whole([sys.executable, str(tool), *options, str(notebook)], notebook.parent)


def num_code_cells(notebook: Path) -> int:
    """How many cells nbval must have run."""
    return sum(cell.cell_type == "code" for cell in nbformat.read(notebook, as_version=4).cells)


def inject(fault: Fault, root: Path) -> None:
    """Break one thing, or say loudly that the fault no longer fits the code.

    Its bytecode goes: Python would take it for that of a fault of the same length in the same second.
    """
    file = root / fault.file
    for compiled in file.parent.glob(f"__pycache__/{file.stem}.*"):
        compiled.unlink()
    text = file.read_text("utf-8")
    num_found = text.count(fault.old)
    assert num_found == 1, f"{fault.name}: {fault.old!r} occurs {num_found} times in {fault.file}, not once"
    file.write_text(text.replace(fault.old, fault.new), "utf-8")


def assert_noticed(notebook: Path, root: Path) -> None:
    """The check must refuse a fault, or nbval see it."""
    if not canonical.problems(notebook):
        assert_seen(notebook, root)


def assert_seen(notebook: Path, root: Path) -> None:
    """nbval must see a fault: in what is shown, not in an import that fails."""
    num_passed, text = strict_nbval(notebook, root, "-x")
    assert num_passed < num_code_cells(notebook), text
    assert re.search("Cell outputs differ|AssertionError|ValueError", text), text


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small lab with a slider, a picture, raw times and a lesson that raises, executed: its folder."""
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "tiny.py").write_text(textwrap.dedent(TINY_MODULE), "utf-8")
    cells = [new_code_cell(source) for source in TINY_CELLS]
    for place, tag in TINY_TAGS.items():
        cells[place].metadata.tags = [tag]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# A tiny lab"), *cells]), folder / "tiny.ipynb")
    status, text = run_canonical(folder / "tiny.ipynb")
    assert status == 0, text
    return folder


@pytest.fixture
def tiny_copy(tiny: Path, tmp_path: Path) -> Path:
    """The executed tiny lab in a folder of its own, to be broken: the notebook's path."""
    shutil.copytree(tiny, tmp_path / "lab")
    return tmp_path / "lab" / "tiny.ipynb"


@pytest.fixture
def lab_copy(tmp_path: Path) -> Path:
    """The package, the notebooks and their data in a folder of their own, to be broken."""
    for part in ("effkit", "notebooks", "data"):
        # with their bytecode, but not with what another process is just writing of it
        shutil.copytree(REPO / part, tmp_path / part, ignore=shutil.ignore_patterns("*.pyc.*", ".*"))
    return tmp_path


@pytest.fixture
def short_lab(lab_copy: Path) -> Path:
    """The notebook of that copy, shortened: its path."""
    path = lab_copy / "notebooks" / LAB.name
    notebook = nbformat.read(path, as_version=4)
    last = next(place for place, cell in enumerate(notebook.cells) if LAST in cell.source)
    notebook.cells = [cell for cell in notebook.cells[: last + 1] if "verdict(" not in cell.source]
    assert sum(MODEL in cell.source for cell in notebook.cells) == 1
    for cell in notebook.cells:
        cell.source = cell.source.replace(MODEL, SMALL)
    nbformat.write(notebook, path)
    return path


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_canonical(notebook: Path) -> None:
    assert not canonical.problems(notebook)


@pytest.mark.slow
@pytest.mark.parametrize("notebook", SHOWN, ids=lambda path: path.stem)
def test_notebook_shows_what_the_code_says(notebook: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = time.perf_counter()
    assert_shown(notebook, REPO)
    with capsys.disabled():
        print(f"\n{notebook.name}: {time.perf_counter() - start:.0f} s")


@pytest.mark.slow
def test_unharmed_tiny_lab_passes(tiny_copy: Path) -> None:
    assert not canonical.problems(tiny_copy)
    num_passed, text = strict_nbval(tiny_copy, tiny_copy.parent)
    assert num_passed == len(TINY_CELLS), text


@pytest.mark.slow
@pytest.mark.parametrize("fault", TINY_FAULTS, ids=lambda fault: fault.name)
def test_fault_in_tiny_lab_is_noticed(fault: Fault, tiny_copy: Path) -> None:
    inject(fault, tiny_copy.parent)
    assert_noticed(tiny_copy, tiny_copy.parent)


def test_stripped_notebook_is_refused(tiny_copy: Path) -> None:
    notebook = nbformat.read(tiny_copy, as_version=4)
    for cell in notebook.cells[1:]:
        cell.update(outputs=[], execution_count=None)
    tiny_copy.write_text(canonical.written(canonical.canonical_form(notebook)), "utf-8")
    found = [problem for problem in canonical.problems(tiny_copy) if "has the count None" in problem]
    assert len(found) == len(TINY_CELLS)


@pytest.mark.slow
@needs_lab
def test_unharmed_copy_of_the_lab_passes(lab_copy: Path) -> None:
    assert len(LAB_FAULTS) >= 3, "LAB_FAULTS must hold a wrong formula, a disconnected observer, a default"
    _, origin = run_whole([sys.executable, "-P", "-c", "import effkit; print(effkit.__file__)"], lab_copy)
    assert Path(origin.splitlines()[-1]).is_relative_to(lab_copy), f"not the copy is imported: {origin}"
    assert_shown(lab_copy / "notebooks" / LAB.name, lab_copy)


@pytest.mark.slow
@needs_lab
def test_unharmed_shortened_lab_passes(short_lab: Path, lab_copy: Path) -> None:
    num_passed, text = strict_nbval(short_lab, lab_copy)
    assert num_passed == num_code_cells(short_lab), text


@pytest.mark.slow
@needs_lab
@pytest.mark.parametrize("fault", LAB_FAULTS, ids=lambda fault: fault.name)
def test_fault_in_the_lab_is_noticed(fault: Fault, short_lab: Path, lab_copy: Path) -> None:
    inject(fault, lab_copy)
    assert_seen(short_lab, lab_copy)


@pytest.mark.slow
def test_a_figure_of_one_run_is_kept_and_only_its_verdict_is_compared(tiny_copy: Path) -> None:
    notebook = nbformat.read(tiny_copy, as_version=4)
    notebook.cells[3].source = "print(f'took ≈{time.time_ns() % 1000} ms, above 0')"
    tiny_copy.write_text(canonical.written(notebook), "utf-8")
    assert run_canonical(tiny_copy)[0] == 0
    text = nbformat.read(tiny_copy, as_version=4).cells[3].outputs[0].text
    assert re.fullmatch(r"took ≈\d+ ms, above 0\n", text), "the notebook shows the figure"
    num_passed, said = strict_nbval(tiny_copy, tiny_copy.parent)
    assert num_passed == len(TINY_CELLS), said
    inject(Fault("another verdict", "tiny.ipynb", f"{text[:-1]}\\n", text[:-1].replace("above", "NOT above") + "\\n"),
           tiny_copy.parent)  # fmt: skip
    assert strict_nbval(tiny_copy, tiny_copy.parent)[0] == len(TINY_CELLS) - 1


REFUSED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("has the count 9 in place of 4", {"execution_count": 9}),
    ("is not canonical in its metadata", {"metadata": {"collapsed": True}}),
    ("is not canonical in its id", {"id": "other"}),
    ("is not canonical in its source", {"source": "x = 1 "}),
    ("is not canonical in its outputs", {"outputs": [new_output("stream", text="/home/me/x")]}),
    ("is not canonical in its outputs", {"outputs": [new_output("stream", text="1")] * 2}),
    ("is not canonical in its outputs", {"outputs": [new_output("display_data", {canonical.VIEW: {"model_id": "1"}})]}),
    ("is empty", {"source": ""}),
    ("has 16 lines", {"source": "x = 1\n" * 16}),
    ("ends in a semicolon", {"source": "plot();"}),
    ("uses an Output widget", {"source": "with widgets.Output():\n    pass"}),
    ("uses an Output widget", {"source": "@widgets.interact\ndef show(x):\n    pass"}),
    ("hides from nbval by a comment", {"source": "# NBVAL_IGNORE_OUTPUT\nx"}),
    ("has the tags ['nbval-skip']", {"metadata": {"tags": ["nbval-skip"]}}),
    ("but raised nothing", {"metadata": {"tags": [canonical.RAISES]}}),
    ("but shows nothing", {"metadata": {"tags": [canonical.IGNORED]}}),
    ("has 2 of 7 code cells tagged", {"metadata": {"tags": [canonical.IGNORED]}}),
    ("failed; repair it", {"outputs": [new_output("error")]}),
    ("wrote to stderr", {"outputs": [new_output("stream", name="stderr", text="careful")]}),
    ("bytes; bring it to", {"outputs": [new_output("stream", text="x" * canonical.MOST_BYTES)]}),
)


@pytest.mark.parametrize(("sentence", "change"), REFUSED, ids=[sentence for sentence, _ in REFUSED])
def test_check_refuses(sentence: str, change: dict[str, Any], tiny_copy: Path) -> None:
    notebook = nbformat.read(tiny_copy, as_version=4)
    notebook.cells[ASSERTING].update(nbformat.from_dict(change))
    tiny_copy.write_text(canonical.written(notebook), "utf-8")
    assert any(sentence in problem for problem in canonical.problems(tiny_copy))


def test_check_refuses_a_lab_that_is_too_short(tiny_copy: Path) -> None:
    lab = tiny_copy.rename(tiny_copy.with_name("01_tiny.ipynb"))
    status, text = run_canonical(lab, "--check")
    assert status == 1
    assert "has 8 cells; bring it to 30 to 45" in text
    assert "has 3 words of prose; bring it to 700 to 1300" in text


@pytest.mark.slow
def test_second_run_changes_no_byte(tiny_copy: Path) -> None:
    before = tiny_copy.read_bytes()
    status, text = run_canonical(tiny_copy)
    assert (status, tiny_copy.read_bytes()) == (0, before), text
    assert run_canonical(tiny_copy, "--fresh")[0] == 0
    after = tiny_copy.read_bytes()
    lines = zip(before.splitlines(), after.splitlines(), strict=True)
    num_new = sum(old != new for old, new in lines)
    assert num_new == 4, "only a printed time, a shown one, its widget's state and a picture are new"


@pytest.mark.slow
def test_failing_notebook_is_left_untouched(tiny_copy: Path) -> None:
    inject(Fault("false assertion", "tiny.ipynb", "tiny.predict(2) == 8000", "False"), tiny_copy.parent)
    before, beside = tiny_copy.read_bytes(), sorted(tiny_copy.parent.iterdir())
    status, text = run_canonical(tiny_copy)
    assert status == 1
    assert "cell-05 failed, so the file is left as it was: AssertionError: the formula is wrong" in text
    assert tiny_copy.read_bytes() == before
    assert sorted(tiny_copy.parent.iterdir()) == beside
