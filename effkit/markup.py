"""Tables, in the HTML that notebooks show and in Markdown."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple


class Cell(NamedTuple):
    """A cell of a table that is more than text: its content is HTML already."""

    html: str
    tag: str = "td"  # "th" for what names its row
    attributes: str = ""


def table(heads: Sequence[object], rows: Iterable[Iterable[object]], *, caption: str = "", attributes: str = "") -> str:
    """An HTML table. Heads and cells are text, unless one is a Cell; ``caption`` and ``attributes`` are HTML already.

    >>> table(["item"], [["a < b"]])
    '<table><thead><tr><th>item</th></tr></thead><tbody><tr><td>a &lt; b</td></tr></tbody></table>'
    """
    head = "".join(_cell(head, "th") for head in heads)
    body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in rows)
    caption = caption and f"<caption>{caption}</caption>"
    return f"<table{attributes}>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def points(sentences: Iterable[object]) -> str:
    """An HTML list of sentences; nothing where there is none.

    >>> points(["a < b"])
    '<ul><li>a &lt; b</li></ul>'
    """
    items = "".join(f"<li>{html.escape(str(sentence))}</li>" for sentence in sentences)
    return items and f"<ul>{items}</ul>"


def markdown(heads: Sequence[object], rows: Iterable[Iterable[object]]) -> str:
    """The same as a table of GitHub's Markdown, whose cells are text.

    >>> print(markdown(["item", "share"], [["a|b", "50%"]]), end="")
    | item | share |
    | --- | --- |
    | a\\|b | 50% |
    """
    lines = (heads, ["---"] * len(heads), *rows)
    return "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines)


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, on one line: somebody's names of kernels hold stars, tags and bars."""
    return re.sub(r"([\\`*_\[\]<>|#$~])", r"\\\1", " ".join(str(text).split()))


def _cell(cell: object, tag: str = "td") -> str:
    content, tag, attributes = cell if isinstance(cell, Cell) else Cell(html.escape(str(cell)), tag)
    return f"<{tag}{attributes}>{content}</{tag}>"
