"""Text of four kinds from the Python that runs this: prose, comments, code without them, and tables of characters."""

from __future__ import annotations

import importlib.util
import io
import tokenize
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch

from lessons import corpora

_MOST_LETTERS = 400_000
_MODULES = ("argparse", "difflib", "doctest", "inspect", "mailbox", "optparse", "statistics", "subprocess", "tarfile",
            "typing")  # fmt: skip


def _source(name: str) -> Path:
    """The file of a module of the standard library, or the ``__init__.py`` of a package of it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise RuntimeError("this Python comes without the source of its library; use one that has it")
    return Path(spec.origin)


@cache
def kinds() -> Mapping[str, str]:
    """``prose`` (the language reference), ``comments`` (with docstrings), ``code`` (without), ``tables`` (encodings).

    Raises
    ------
    RuntimeError
        On a Python that comes without its sources.
    """
    comments, code = _apart(corpora.code())
    tables = "\n".join(path.read_text("utf-8") for path in sorted(_source("encodings").parent.glob("cp*.py")))
    texts = {"prose": corpora.english(), "comments": comments, "code": code, "tables": tables}
    return {name: text[:_MOST_LETTERS] for name, text in texts.items()}


@cache
def modules() -> Mapping[str, str]:
    """Sources of ten modules of the standard library, by name: classes to tell apart.

    Raises
    ------
    RuntimeError
        On a Python that comes without its sources.
    """
    return {name: _source(name).read_text("utf-8") for name in _MODULES}


def _apart(source: str) -> tuple[str, str]:
    """What people say in a source (comments, strings of several lines), and the lines that are left without it."""
    said: list[str] = []
    lines = source.splitlines()
    gone = set()
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
                said.append(token.string)
                gone.add(token.start[0])
            elif token.type == tokenize.STRING and token.start[0] < token.end[0]:
                said.append(token.string.strip("\"'rbu"))
                gone.update(range(token.start[0], token.end[0] + 1))
    except (tokenize.TokenError, IndentationError):  # files joined end to end need not be one program
        pass
    kept = [line for number, line in enumerate(lines, 1) if number not in gone and line.strip()]
    return "\n".join(said), "\n".join(kept)


@cache
def halves() -> tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]]:
    """The same as letters, to train on and held out (the last tenth of each)."""
    split = {name: corpora.split(corpora.encode(text)) for name, text in kinds().items()}
    return {name: pair[0] for name, pair in split.items()}, {name: pair[1] for name, pair in split.items()}
