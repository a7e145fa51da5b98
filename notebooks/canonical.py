"""Execute the notebooks and write them in one canonical form, or check that they are in it.

    python notebooks/canonical.py notebooks/*.ipynb            run every cell, then write
    python notebooks/canonical.py --check notebooks/*.ipynb    run nothing, refuse what is not canonical

The notebooks are kept with their outputs, because those are what GitHub shows and what nbval compares.
One form for all of them keeps a diff down to what has really changed, and the check refuses what would
make nbval pass without comparing anything.
"""

import argparse
import copy
import fnmatch
import json
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from nbformat import NotebookNode
from nbval.plugin import get_sanitize_patterns

# of kernels: torch's profiler warns of every optimizer that replaces a state that is older than the recording
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# The first pattern that fits the file name: (pattern, fewest and most cells, fewest and most words).
LIMITS = (
    ("00_*.ipynb", (12, 45), (250, 1300)),
    ("06[a-z]_*.ipynb", (8, 26), (200, 900)),
    ("[0-9][0-9]_*.ipynb", (30, 45), (700, 1300)),
    ("[0-9][0-9]b_*.ipynb", (30, 45), (700, 1300)),  # beside a lesson
)
MOST_BYTES, MOST_LINES, MOST_IGNORED_FRAC = 500_000, 15, 0.25

IGNORED, RAISES = "nbval-ignore-output", "raises-exception"
PICTURES = ("image/png", "image/jpeg")
VIEW = "application/vnd.jupyter.widget-view+json"
STATE = "application/vnd.jupyter.widget-state+json"
OUTPUT_WIDGET = re.compile(r"\b(?:Output|interact(?:_manual|ive|ive_output)?)\(|@\S*interact")
USES_OUTPUT = "uses an Output widget, which hides errors and can hang; let an observer set an HTML trait"
REMEDY = "run `make notebooks`"
KERNEL = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
HERE = Path(__file__).resolve().parent
# The last pattern is unknown to nbval: printing the bare path of the checkout fails there, as it should.
PATTERNS = get_sanitize_patterns((HERE / "sanitize.cfg").read_text("utf-8"))
MEASURED = [(regex, to) for regex, to in PATTERNS if to == "MEASURED"]  # figures of one run, which stay in the notebook
MASKS = [(regex, to) for regex, to in PATTERNS if to != "MEASURED"]
MASKS.append((re.escape(str(HERE.parent)), "REPO"))


class NotebookError(Exception):
    """A notebook that cannot be read or run, said in one sentence."""


def read(path: Path) -> tuple[str, NotebookNode]:
    """The text of a notebook, byte for byte, and what it means."""
    try:
        text = path.read_bytes().decode("utf-8")
        notebook = nbformat.reads(text, as_version=4)
        nbformat.validate(notebook)
    except OSError as error:
        raise NotebookError(f"cannot be read ({error.strerror}); give the path of a notebook") from None
    except (ValueError, AttributeError, nbformat.ValidationError) as error:
        reason = str(error).strip().splitlines()[0]
        raise NotebookError(f"is not a notebook ({reason}); restore it from git") from None
    return text, notebook


def written(notebook: NotebookNode) -> str:
    """The one spelling of a notebook on disk."""
    return nbformat.writes(notebook, version=nbformat.NO_CONVERT, ensure_ascii=False) + "\n"


def replace_file(path: Path, text: str) -> None:
    """Write all of it or nothing: a reader never meets half a notebook."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(text.encode("utf-8"))
        shutil.copymode(path, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def masked(value: Any, masks: Sequence[tuple[str, str]] = MASKS) -> Any:
    """Without the paths and addresses of this machine, by the same patterns that nbval applies."""
    if isinstance(value, str):
        for regex, replacement in masks:
            value = re.sub(regex, replacement, value)
    elif isinstance(value, list):
        value = [masked(item, masks) for item in value]
    elif isinstance(value, dict):
        value = NotebookNode({k: v if k in PICTURES else masked(v, masks) for k, v in value.items()})
    return value


def merged(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Consecutive stretches of one stream joined, since where a kernel cuts them is chance."""
    joined: list[NotebookNode] = []
    for output in outputs:
        if joined and output.get("name") and output.get("name") == joined[-1].get("name"):
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def clean(source: str) -> str:
    """Source without blanks at the end of a line or of the cell."""
    return "\n".join(line.rstrip() for line in source.splitlines()).rstrip()


def canonical_form(notebook: NotebookNode) -> NotebookNode:
    """The same notebook in canonical form. Counts are left alone: only a run may set them.

    What is nothing but a widget goes: a line of progress, which a reader would see as it last was.
    """
    new = copy.deepcopy(notebook)
    for number, cell in enumerate(new.cells, 1):
        cell.id = f"cell-{number:02d}"
        cell.source = clean(cell.source)
        cell.metadata = NotebookNode({k: v for k, v in cell.metadata.items() if k == "tags" and v})
        if cell.cell_type == "code":
            cell.outputs = merged(masked([output for output in cell.outputs if list(output.get("data", {})) != [VIEW]]))
    state = new.metadata.get("widgets", {}).get(STATE, {}).get("state", {})
    new.metadata = nbformat.from_dict({"kernelspec": KERNEL, "language_info": {"name": "python"}})
    new.nbformat, new.nbformat_minor = 4, 5
    return with_widgets(new, masked(state))


def outputs_of(notebook: NotebookNode) -> list[tuple[NotebookNode, NotebookNode]]:
    """Every (cell, output) of the notebook, in order."""
    return [(cell, out) for cell in notebook.cells if cell.cell_type == "code" for out in cell.outputs]


def with_widgets(notebook: NotebookNode, state: dict[str, Any]) -> NotebookNode:
    """Keep the widget models that the outputs show, numbered as they appear in place of random ids."""
    shown = [output.data[VIEW] for _, output in outputs_of(notebook) if VIEW in output.get("data", {})]
    if not shown:
        return notebook
    order = models_in_order([view["model_id"] for view in shown], state)
    names = {model: f"{number:032x}" for number, model in enumerate(order, 1)}
    kept = {model: state[model] for model in names if model in state}
    notebook.metadata.widgets = {STATE: {"state": kept, "version_major": 2, "version_minor": 0}}
    any_name = re.compile("|".join(map(re.escape, names)))
    return nbformat.from_dict(json.loads(any_name.sub(lambda found: names[found[0]], json.dumps(notebook))))


def models_in_order(views: list[str], state: dict[str, Any]) -> list[str]:
    """Every model that a view reaches through its children, layout and style, depth first."""
    order: dict[str, None] = {}
    waiting = views[::-1]
    while waiting:
        model = waiting.pop()
        if model not in order:
            order[model] = None
            content = json.dumps(state.get(model, {}), sort_keys=True)
            waiting += re.findall(r"IPY_MODEL_([\w-]+)", content)[::-1]
    return list(order)


def executed(notebook: NotebookNode, folder: Path, timeout_s: int) -> NotebookNode:
    """Run every cell in a fresh kernel; the first failure ends it, in one sentence."""
    new = canonical_form(notebook)  # before the run, so that the outputs belong to these sources
    new.metadata.pop("widgets", None)
    for number, cell in enumerate(new.cells, 1):
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            if OUTPUT_WIDGET.search(cell.source):
                raise NotebookError(f"cell-{number:02d} {USES_OUTPUT}")
    started = [0]
    client = NotebookClient(
        new,
        kernel_name=KERNEL["name"],
        extra_arguments=["--IPKernelApp.log_level=CRITICAL"],  # what goes wrong is said below
        resources={"metadata": {"path": str(folder)}},
        timeout=timeout_s,
        startup_timeout=120,
        iopub_timeout=60,  # nbclient's 4 s lose outputs on a busy machine, silently
        raise_on_iopub_timeout=True,
        record_timing=False,
        on_cell_start=lambda cell, cell_index: started.append(cell_index + 1),
    )
    try:
        return client.execute()
    except CellExecutionError as error:
        reason = f"{error.ename}: {error.evalue}".strip()
    except CellTimeoutError:
        reason = f"it ran longer than {timeout_s} s; make it smaller, or raise --timeout"
    except RuntimeError as error:
        reason = f"the kernel died or did not answer ({error})"
    raise NotebookError(f"cell-{started[-1]:02d} failed, so the file is left as it was: {reason}")


def comparable(notebook: NotebookNode) -> NotebookNode:
    """What two honest runs agree on: of pictures, widgets and outputs tagged as raw times only the kinds."""
    new = copy.deepcopy(notebook)
    new.metadata.pop("widgets", None)
    for cell, output in outputs_of(new):
        ignored = IGNORED in cell.metadata.get("tags", [])
        output.update(masked(output, MEASURED))
        if ignored:
            output.update(text=None, metadata=None)
        for kind in output.get("data", {}):
            if ignored or kind in (*PICTURES, VIEW):
                output.data[kind] = None
    return new


def refresh(path: Path, timeout_s: int, fresh: bool) -> str:
    """Execute one notebook and write it, unless only raw times and pictures would change; say which."""
    text, old = read(path)
    new = canonical_form(executed(old, path.resolve().parent, timeout_s))
    if not fresh and written(canonical_form(old)) == text and comparable(new) == comparable(old):
        return "kept; raw times, pictures and widget states are all that may differ (--fresh writes them)"
    replace_file(path, written(new))
    return "written"


def problems(path: Path) -> list[str]:
    """Everything that is not canonical about one notebook, a sentence each, without running it."""
    text, notebook = read(path)
    code = [(n, cell) for n, cell in enumerate(notebook.cells, 1) if cell.cell_type == "code"]
    found = [f"cell-{number:02d} {problem}" for number, cell in code for problem in cell_problems(cell)]
    num_ignored = sum(IGNORED in cell.metadata.get("tags", []) for _, cell in code)
    if num_ignored > MOST_IGNORED_FRAC * len(code):
        found.append(f"has {num_ignored} of {len(code)} code cells tagged {IGNORED}; tag a quarter at most")
    for due, (number, cell) in enumerate(code, 1):
        if (count := cell.execution_count) != due:
            found.append(f"cell-{number:02d} has the count {count} in place of {due}: stripped? {REMEDY}")
    return size_problems(path, text, notebook) + found + form_problems(text, notebook)


def size_problems(path: Path, text: str, notebook: NotebookNode) -> list[str]:
    """A notebook is one sitting's reading, and small enough for GitHub to draw."""
    prose = " ".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    num_words = sum(any(map(str.isalnum, word)) for word in prose.split())
    limits = next((rest for pattern, *rest in LIMITS if fnmatch.fnmatch(path.name, pattern)), [])
    sizes = ("bytes", len(text.encode())), ("cells", len(notebook.cells)), ("words of prose", num_words)
    return [
        f"has {number} {what}; bring it to {least} to {most}"
        for (what, number), (least, most) in zip(sizes, [(0, MOST_BYTES), *limits], strict=False)
        if not least <= number <= most
    ]


def cell_problems(cell: NotebookNode) -> list[str]:
    """What a code cell may not be, hold or print."""
    source, tags, num_lines = cell.source, cell.metadata.get("tags", []), len(cell.source.splitlines())
    failed = any(output.output_type == "error" for output in cell.outputs)
    warned = any(output.get("name") == "stderr" for output in cell.outputs)
    rules = {
        "is empty; remove it": not source.strip(),
        f"has {num_lines} lines; move logic into a module until it has {MOST_LINES}": num_lines > MOST_LINES,
        "ends in a semicolon; write `_ = ...` instead": source.rstrip().endswith(";"),
        "hides from nbval by a comment; use a tag": re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", source),
        f"has the tags {tags}; use only {IGNORED}, {RAISES}": not {*tags} <= {IGNORED, RAISES},
        f"failed; repair it, or tag it {RAISES} if that is the lesson": failed and RAISES not in tags,
        f"is tagged {RAISES} but raised nothing; drop the tag": RAISES in tags and not failed,
        f"is tagged {IGNORED} but shows nothing; drop the tag": IGNORED in tags and not cell.outputs,
        "wrote to stderr; silence the warning at its cause": warned,
        USES_OUTPUT: OUTPUT_WIDGET.search(source),
    }
    return [problem for problem, broken in rules.items() if broken]


def form_problems(text: str, notebook: NotebookNode) -> list[str]:
    """Where the file differs from its canonical form."""
    new = canonical_form(notebook)
    found = []
    for number, (cell, due) in enumerate(zip(notebook.cells, new.cells, strict=True), 1):
        if parts := [part for part in sorted({*cell, *due}) if cell.get(part) != due.get(part)]:
            found.append(f"cell-{number:02d} is not canonical in its {' and '.join(parts)}; {REMEDY}")
    if notebook.metadata != new.metadata:
        found.append(f"is not canonical in its metadata (kernel, language, widgets); {REMEDY}")
    if not found and text != written(new):
        found.append(f"is not canonical in the spelling of its JSON; {REMEDY}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Every notebook in turn; 1 if any could not be run or is not canonical."""
    parser = argparse.ArgumentParser(description="Execute notebooks and write them in canonical form.")
    parser.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    parser.add_argument("--check", action="store_true", help="run nothing; refuse what is not canonical")
    parser.add_argument("--fresh", action="store_true", help="write new times and pictures in any case")
    parser.add_argument("--timeout", type=int, default=300, metavar="SECONDS", help="for one cell")
    options = parser.parse_args(arguments)
    num_problems = 0
    for path in options.notebooks:
        try:
            if not options.check:
                print(f"{path}: {refresh(path, options.timeout, options.fresh)}", flush=True)
            found = problems(path)
        except NotebookError as error:
            found = [str(error)]
        print(*(f"{path}: {problem}\n" for problem in found), sep="", end="", file=sys.stderr, flush=True)
        num_problems += len(found)
    return min(num_problems, 1)


if __name__ == "__main__":
    sys.exit(main())
