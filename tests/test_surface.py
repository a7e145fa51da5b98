"""What effkit shows to the outside, and how it is built inside."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import effkit
import lessons

ROOT = Path(effkit.__file__).parent
# a wheel carries lessons and data within the package
PATHS = [path for path in ROOT.rglob("*.py") if "material" not in path.relative_to(ROOT).parts]
FILES = sorted(path.relative_to(ROOT).as_posix() for path in PATHS)
# What the lessons run keeps the rules of the house, too, and is no part of it.
SOURCES = {path: path.read_text() for path in (*PATHS, *Path(lessons.__file__).parent.rglob("*.py"))}
MODULES = ["effkit"] + [
    found.name
    for package in (effkit, lessons)
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
]

PUBLIC = {
    "effkit": [
        "Account", "Capture", "Device", "Receipt", "WhatIf", "activations", "advice", "capture", "claims", "decoder",
        "load", "models", "moe", "padding", "study",
    ],
    "effkit.advice": [
        "Advice", "Lever", "Overview", "Study", "lightning_callback", "record", "study", "trainer_callback",
    ],
    "effkit.claims": ["Finding", "ceilings", "check", "claims"],
    "effkit.activations": [
        "Levers", "LowBitAdamW", "Sharding", "account", "blocks", "cheapest", "checkpoint", "compressed", "forecast",
        "front", "gradient_error", "largest_batch", "links", "live_bytes", "measure", "offloaded", "pipeline",
        "predict", "saved", "spread", "whatif",
    ],
    "effkit.padding": [
        "MemoryModel", "Plan", "STRATEGIES", "Watch", "account", "fit_memory", "lengths", "measure", "plan", "predict",
        "watch", "whatif",
    ],
    "effkit.moe": [
        "Setting", "account", "balanced_placement", "best_degrees", "imbalance", "link",
        "measure", "predict", "prepare", "timeline", "whatif",
        "why_no_links", "worth_balancing",
    ],
    "effkit.decoder": [
        "Setting", "account", "exit_at", "kv_cache_bytes", "measure", "positions", "predict",
        "rebalance", "roofline", "static_decoding", "whatif",
    ],
    "effkit.models": [
        "expert_parallel", "gpt", "speech", "text", "vision",
    ],
}  # fmt: skip

# From top to bottom; imports go down only. Rooms on one line may not import one another.
HOUSE = [
    {"__main__", "magics"},
    {"__init__"},
    {"advice"},
    {"claims"},
    {"padding", "activations", "moe", "decoder"},
    {"ranks"},
    {"lab"},
    {"restoring"},
    {"models"},
    {"quantisation"},
    {"whatif", "browsing"},
    {"screen"},
    {"view"},
    {"recording", "loading", "training"},
    {"captured"},
    {"panes"},
    {"storage"},
    {"trace"},
    {"snapshot"},
    {"timing"},
    {"device"},
    {"datasheets"},
    {"receipt", "least_squares", "gc_disabled", "idle", "operators"},
    {"account"},
    {"records"},
    {"markup", "whole_files"},
    {"arguments", "lazy", "progress_bar", "units"},
    {"interrupts"},
]
LONGEST_FILE = 450  # lines
MOST_LINES = 26_100
FLOOR = {room: -depth for depth, rooms in enumerate(HOUSE) for room in rooms}
# plot() has to reach the drawing functions; inside the function, so that nothing is loaded for it
PERMITTED_WHEN_CALLED = {("account", "view"), ("captured", "view"), ("captured", "browsing")}


def room_of(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def runs_on_import(tree: ast.Module):
    """Nodes outside functions and outside ``if TYPE_CHECKING``."""
    todo: list[ast.AST] = list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
            continue
        yield node
        todo += ast.iter_child_nodes(node)


def imported_rooms(nodes) -> set[str]:
    names = []
    for node in nodes:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they lead; write effkit.<module>"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    parts = [name.split(".") for name in names if name.split(".")[0] == "effkit"]
    # `from effkit import Account` takes it from the top of the house, `from effkit import view` does not
    return {part[1] if len(part) > 1 and part[1] in FLOOR else "__init__" for part in parts}


def upward(*, only_on_import: bool) -> set[tuple[str, str]]:
    found = set()
    for file in FILES:
        room, tree = room_of(file), ast.parse((ROOT / file).read_text())
        for other in imported_rooms(runs_on_import(tree) if only_on_import else ast.walk(tree)):
            if other != room and FLOOR[other] >= FLOOR[room]:
                found.add((room, other))
    return found


def run_alone(code: str) -> None:
    """In a fresh interpreter, which must not fail."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names(module):
    names = importlib.import_module(module).__all__
    assert sorted(names) == PUBLIC[module]
    assert all(hasattr(importlib.import_module(module), name) for name in names)


@pytest.mark.parametrize("module", [name for name in PUBLIC if name != "effkit.published"])
def test_a_tab_shows_the_public_names_alone(module):
    assert dir(importlib.import_module(module)) == sorted(PUBLIC[module])


def test_a_question_mark_shows_the_names_of_all_options():
    """Knobs of a setting have names of their own; whatever else is behind ``**`` hides what can be given."""
    settings = {"setting", "changes"}
    settings |= {"model"}  # of decoder.contexts and kept_ratios: sizes of effkit.models
    hidden = []
    for module in map(importlib.import_module, PUBLIC):
        for name in set(module.__all__) - {"hybrid", "spiking"}:
            value = getattr(module, name)
            parameters = inspect.signature(value).parameters if inspect.isfunction(value) else {}
            behind = [p.name for p in parameters.values() if p.kind == p.VAR_KEYWORD]
            if behind and (len(parameters) == 1 or not set(behind) <= settings):
                hidden.append(f"{module.__name__}.{name}(**{behind[0]})")
    assert not hidden


def test_padding_is_planned_where_torch_is_absent_and_measure_shows_its_own_signature():
    code = "import sys; sys.modules['torch'] = None\nimport effkit as ek; ek.padding.plan, ek.padding.lengths"
    subprocess.run([sys.executable, "-c", code], timeout=120, check=True)
    assert list(inspect.signature(effkit.padding.measure).parameters)[:4] == ["plan", "model", "num_batches", "repeats"]


def test_every_file_has_its_place_in_the_house():
    homeless = [file for file in FILES if room_of(file) not in FLOOR]
    assert not homeless, "a new module needs a line in HOUSE, and in CONTRIBUTING's map"


def test_imports_go_down_the_house():
    assert upward(only_on_import=True) == set()


def test_imports_for_types_and_inside_functions_go_down_too():
    assert upward(only_on_import=False) <= PERMITTED_WHEN_CALLED


def imports_of_modules() -> dict[str, set[tuple[str, bool]]]:
    """Module -> the modules that it imports, for types and inside functions too; and whether only inside functions."""
    found: dict[str, set[tuple[str, bool]]] = {}
    for file in FILES:
        own = ".".join(("effkit", *Path(file).with_suffix("").parts)).removesuffix(".__init__")
        tree = ast.parse((ROOT / file).read_text())
        functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        inside = {node for function in functions for node in ast.walk(function)}
        found[own] = set()
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            if isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{name}" for name in names]
            for name in names:
                parts = name.split(".")
                heads = (".".join(parts[:num]) for num in range(len(parts), 0, -1))
                other = next((head for head in heads if head in MODULES), own)
                if other != own:
                    found[own].add((other, node in inside))
    return found


def in_circles(graph: dict[str, set[str]]) -> set[str]:
    """What is left of a graph when those are taken away that point to nothing, or that nothing points to."""
    left = set(graph)
    while True:
        inner = {one for one in left if graph[one] & left and any(one in graph[other] for other in left)}
        if inner == left:
            return left
        left = inner


def test_no_module_imports_itself_through_others():
    graph = {
        own: {other for other, inside in others
              if not (inside and (own.removeprefix("effkit."), other.removeprefix("effkit.")) in PERMITTED_WHEN_CALLED)}
        for own, others in imports_of_modules().items()
    }  # fmt: skip
    assert in_circles(graph) == set()
    assert in_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == {"a", "b", "c"}


def test_advice_takes_from_the_labs_what_they_offer():
    labs = [f"effkit.{lab}" for lab in ("padding", "activations", "moe", "decoder")]
    reached = {
        (own, other)
        for own, others in imports_of_modules().items()
        for other, _ in others
        if own.startswith("effkit.advice") and any(other.startswith(f"{lab}.") for lab in labs)
    }
    assert reached == set(), "import it from the lab's package; what is asked for has a word in its docstring"
    for lab in map(importlib.import_module, labs):
        beside = {name for name, value in vars(lab).items() if not name.startswith("_") and name not in lab.__all__}
        beside &= names_asked_of(lab.__name__)
        assert not {name for name in beside if f"``{name}``" not in lab.__doc__}


def names_asked_of(lab: str) -> set[str]:
    files = [ROOT / file for file in FILES if room_of(file) == "advice"]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    named = {a.name for node in nodes if isinstance(node, ast.ImportFrom) and node.module == lab for a in node.names}
    asked = {
        node.attr for node in nodes if isinstance(node, ast.Attribute) and f"effkit.{ast.unparse(node.value)}" == lab
    }
    return named | asked


def test_the_import_check_notices_an_import_that_goes_up():
    assert imported_rooms(ast.walk(ast.parse("from effkit.padding.plans import Plan"))) == {"padding"}
    assert imported_rooms(ast.walk(ast.parse("from effkit import Account, view"))) == {"__init__", "view"}
    assert imported_rooms(runs_on_import(ast.parse("def f():\n    import effkit.view"))) == set()
    assert FLOOR["padding"] > FLOOR["view"] > FLOOR["account"]


def test_files_are_short():
    lengths = {file: len(text.splitlines()) for file, text in SOURCES.items()}
    assert not {file: length for file, length in lengths.items() if length > LONGEST_FILE}


def test_the_library_stays_thin():
    assert sum(len((ROOT / file).read_text().splitlines()) for file in FILES) <= MOST_LINES


def test_names_say_what_things_do():
    assert not [file for file in SOURCES if file.stem in ("utils", "helpers", "common", "misc")]
    classes = [
        node.name for text in SOURCES.values() for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)
    ]
    assert not [name for name in classes if name.endswith(("Manager", "Analyzer", "Helper"))]


def test_no_module_bears_the_name_of_a_public_function():
    clashes = {}
    for name in PUBLIC:
        package = importlib.import_module(name)
        modules = {found.name for found in pkgutil.iter_modules(package.__path__)}
        clashes[name] = {public for public in package.__all__ if callable(getattr(package, public))} & modules
    assert clashes.pop("effkit") == {"claims"}, "the function wins: see the next test"
    assert not {name: both for name, both in clashes.items() if both}


@pytest.mark.parametrize(
    "imports",
    [
        "import effkit; import effkit.claims.table",
        "import effkit.claims.table, effkit",
        "from effkit.claims import Finding, check; import effkit",
        "import effkit, importlib; effkit.claims(); importlib.import_module('effkit.claims')",
    ],
)
def test_the_name_claims_is_the_function_whatever_is_imported_first(imports):
    code = f"{imports}\nassert len(effkit.claims(theme='padding')) > 1\nfrom effkit.claims import check"
    run_alone(code)


def test_importing_effkit_brings_no_widgets_and_no_pictures():
    code = "import sys, effkit\nassert effkit.claims\nassert not {'ipywidgets', 'matplotlib'} & set(sys.modules)"
    run_alone(code)


def test_the_library_does_not_lean_on_the_lessons():
    named = {(file, node.module) for file in FILES for node in ast.walk(ast.parse((ROOT / file).read_text()))
             if isinstance(node, ast.ImportFrom)}  # fmt: skip
    assert not [file for file, module in named if module and module.split(".")[0] == "lessons"]


def test_nothing_prints_unpickles_or_calls_out():
    # a rank is sent its work, in a folder that nobody else may read, by the process that started it
    permitted = {("on_ranks.py", name) for name in ("pickle", "pickle.loads")}
    offenders = []
    for file, text in SOURCES.items():
        nodes = list(ast.walk(ast.parse(text)))
        calls = {ast.unparse(node.func) for node in nodes if isinstance(node, ast.Call)}
        modules = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        forbidden = calls & {"print", "pickle.load", "pickle.loads", "torch.load"}
        forbidden |= modules & {"pickle", "requests", "urllib", "urllib.request", "socket"}
        offenders += [(file, name) for name in sorted(forbidden) if (file.name, name) not in permitted]
    assert not offenders


def test_a_trace_is_read_where_torch_and_transformers_are_absent():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "import effkit.trace\n"
        "read = effkit.trace.read(b'{\"traceEvents\": []}')\n"
        "assert len(read.events) == len(read.memory) == 0"
    )
    run_alone(code)


def test_examples_in_docstrings_hold():
    assert not [name for name in MODULES if doctest.testmod(importlib.import_module(name)).failed]


def test_there_are_examples_in_docstrings():
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [test for name in MODULES for test in finder.find(importlib.import_module(name)) if test.examples]
    assert len(examples) > 5
