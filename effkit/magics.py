"""The notebook's door: ``%load_ext effkit``, then ``%%effkit`` over a cell and ``%effkit step()`` on a line."""

from __future__ import annotations

import ast
from typing import Any

from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class
from IPython.display import display

from effkit.advice.recorded_study import RecordedStudy
from effkit.captured import Capture
from effkit.recording import capture, capture_once

_SHORT, _LONG = "mskw:n:o:", ("memory", "shapes", "stacks", "warmup=", "steps=", "output=")


@magics_class
class EffkitMagics(Magics):
    """``%effkit`` and ``%%effkit``."""

    shell: Any

    @line_cell_magic
    def effkit(self, line: str, cell: str | None = None) -> Any:
        """Where the time and memory of this cell go, and what would help.

        A cell runs once, as it would without the magic: its variables stay, its errors come through, its last value
        is shown. A line is called several times, as ``%timeit`` does: warm-up, plain and recorded calls.

        ::

            %%effkit [-m] [-s] [-k] [-o NAME]
            %effkit [-m] [-s] [-k] [-w 2] [-n 3] [-o NAME] step()

        ``-m --memory``: record allocations, for what fills the peak. ``-s --shapes``, ``-k --stacks``: of operators'
        inputs, of Python. ``-w --warmup``, ``-n --steps``: calls of a line before it is recorded, and recorded.
        ``-o --output``: the variable to put the Capture into.
        """
        given, call = self.parse_options(line, _SHORT, *_LONG)
        recorded: dict[str, Any] = {name: name[0] in given or name in given for name in ("memory", "shapes")}
        recorded["stacks"] = "k" in given or "stacks" in given
        if (cell is None) != bool(call):
            raise UsageError("%effkit takes a call, such as %effkit step(); %%effkit takes options alone, and the cell "
                             f"below it; given: {line!r}")  # fmt: skip
        value = None
        if cell is None:
            warmup, steps = (_count(given, *names) for names in (("w", "warmup", 2), ("n", "steps", 3)))
            code = compile(call, "<effkit>", "eval")
            seen = capture(lambda: eval(code, self.shell.user_ns), what=call, warmup=warmup, steps=steps, **recorded)
        else:
            seen, value = self._run(cell, recorded)
        if name := given.get("o", given.get("output")):
            self.shell.user_ns[name] = seen
        study = RecordedStudy(seen, None)
        display(study.overview(), study.advise())
        return value

    def _run(self, cell: str, recorded: dict[str, Any]) -> tuple[Capture, Any]:
        tree = self.shell.compile.ast_parse(self.shell.transform_cell(cell))
        last = ast.Expression(tree.body.pop().value) if tree.body and isinstance(tree.body[-1], ast.Expr) else None
        codes = [self.shell.compile(tree, "<effkit>", "exec")]
        if last is not None:
            codes.append(self.shell.compile(ast.fix_missing_locations(last), "<effkit>", "eval"))
        values: list[Any] = []
        seen = capture_once(lambda: values.extend(eval(code, self.shell.user_ns) for code in codes), what="a cell",
                            **recorded)  # fmt: skip
        return seen, values[-1] if last is not None else None


def _count(given: Any, short: str, long: str, usual: int) -> int:
    text = given.get(short, given.get(long, str(usual)))
    if not text.isdecimal():
        raise UsageError(f"--{long} is a whole number; given: {text!r}")
    return int(text)


def load_ipython_extension(ipython: Any) -> None:
    """What ``%load_ext effkit`` calls."""
    ipython.register_magics(EffkitMagics)
