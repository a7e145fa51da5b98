"""The notebook's door: a cell runs once and as it would without the magic, a line several times."""

import pytest

pytest.importorskip("IPython")
from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output

import effkit
from effkit.captured import Capture


@pytest.fixture(scope="module")
def shell():
    shell = InteractiveShell.instance()
    shell.run_line_magic("load_ext", "effkit")
    yield shell
    InteractiveShell.clear_instance()


@pytest.fixture
def run(shell):
    def run(line, cell=None):
        with capture_output() as seen:
            value = shell.run_line_magic("effkit", line) if cell is None else shell.run_cell_magic("effkit", line, cell)
        return value, seen.stdout + "".join(str(output.data) for output in seen.outputs)

    return run


def test_a_cell_runs_once_and_its_variables_stay(run, shell):
    shell.user_ns["count"] = 0
    value, said = run("", "import torch\ncount += 1\nx = torch.ones(64, 64) @ torch.ones(64, 64)\nx[0, 0].item()\n")
    assert value == 64.0
    assert shell.user_ns["count"] == 1
    assert shell.user_ns["x"].shape == (64, 64)
    assert "Time of one step" in said


def test_errors_of_a_cell_come_through_and_nothing_stays_recording(run):
    with pytest.raises(ZeroDivisionError):
        run("", "1 / 0")
    assert run("", "2 + 2")[0] == 4


def test_a_line_is_called_as_timeit_does(run, shell):
    calls = []
    shell.user_ns["step"] = lambda: calls.append(0)
    _, said = run("--warmup 1 --steps 2 -o seen step()")
    assert isinstance(shell.user_ns["seen"], Capture)
    assert len(calls) == 1 + 2 + 1 + 2 + 2  # warm-up, plain, the profiler's own, recorded, plain
    assert "Time of one step" in said


def test_memory_is_shown_where_it_is_asked_for(run):
    _, said = run("--memory", "import torch\nheld = [torch.ones(1 << 18) for _ in range(3)]\n")
    assert "3.0 MiB" in said


@pytest.mark.parametrize(("line", "cell"), [("", None), ("step()", "1"), ("--deep", "1"), ("--steps few step()", None)])
def test_wrong_use_is_a_usage_error(run, line, cell):
    with pytest.raises(UsageError):
        run(line, cell)


def test_the_extension_is_found_by_the_packages_name():
    assert callable(effkit.load_ipython_extension)
    assert "load_ipython_extension" not in dir(effkit)
