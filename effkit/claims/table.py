"""claims(): what each paper claims, and what this kit can say about it. A row is as wide as the cell behind it."""

from __future__ import annotations

import csv
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from effkit.account import Account

# Beside this module in an installed effkit, under data/ in a checkout.
PATHS = (Path(__file__).with_name("claims.csv"), Path(__file__).parents[2] / "data" / "claims.csv")
LIVE, RECOMPUTED, WHAT_IF = "measured live", "recomputed from published figures", "what-if only"
STATUSES = (LIVE, RECOMPUTED, WHAT_IF)
NOT_TESTABLE = "not testable here: "  # and why
# How a figure is read, and the whole numbers that an Account counts it in: (in words, unit of the Account, per one)
UNITS: Mapping[str, tuple[str, str, int]] = {
    "times": ("{:.3g} times", "thousandths", 1_000),
    "frac": ("{:.3g}%", "ppm", 1_000_000),
    "correlation": ("{:.2f}", "ppm", 1_000_000),
}
_COLUMNS = (
    "paper", "arxiv", "claim", "resource", "theme", "status", "figure", "ours", "theirs", "gap", "scale", "link",
)  # fmt: skip
_FIGURE = re.compile(r"(?:(over|under|up to|about) )?([\d.]+)(?: to ([\d.]+))?")


def figure(value: float, unit: str) -> str:
    """A figure as a person reads it.

    >>> figure(2.5, "times"), figure(0.552, "frac"), figure(0.93, "correlation")
    ('2.5 times', '55.2%', '0.93')
    """
    words, _, _ = UNITS[unit]
    return words.format(value * 100 if unit == "frac" else value)


@dataclass(frozen=True)
class Claim:
    """One row of the table.

    Attributes
    ----------
    paper, arxiv
        Its name here, and its number there.
    claim
        What it claims, in our words; where its abstract has no number of efficiency, that is said.
    resource, theme
        What is saved and which analysis it belongs to; several are separated by semicolons.
    status
        One of ``STATUSES``, or ``NOT_TESTABLE`` and why.
    figure, unit
        What is compared, in words; ``times``, ``frac`` (of 1, read as percent) or ``correlation``.
    theirs
        ``2.5``, ``2 to 2.5``, ``over 17.5``, ``under 0.005``, ``up to 0.5``, ``about 0.34``; empty where no number is
        given, and words where their number is of another kind: then there is no gap.
    ours, ours_low, ours_high
        What the cell computes; what runs of it may lie between, where it is measured.
    scale
        What theirs was shown on and what ours: the reason for most gaps.
    notebook, section
        Where the cell stands: a file in ``notebooks/`` and a heading.
    """

    paper: str
    arxiv: str
    claim: str
    resource: str
    theme: str
    status: str
    figure: str
    unit: str
    theirs: str
    ours: float
    ours_low: float
    ours_high: float
    scale: str
    notebook: str
    section: str

    @property
    def published(self) -> Account | None:
        """Their figure as an Account with the band that its words leave open; None where there is none."""
        match = _FIGURE.fullmatch(self.theirs)
        if match is None:
            return None
        words, first, second = match.groups()
        _, unit, per_one = UNITS[self.unit]
        low, high = float(first), float(second or first)
        middle = (low + high) / 2
        band = {"over": (low, 1000 * low), "under": (0.0, low), "up to": (0.0, low)}.get(words, (low, high))
        total, low, high = (round(value * per_one) for value in (middle, *band))
        return Account.of(self.figure, unit, {"as published": total}, total=total, source=f"arXiv {self.arxiv}",
                          basis="assumed", low=low, high=high)  # fmt: skip

    @property
    def gap(self) -> float | None:
        """Signed, as in a receipt: theirs / ours - 1. Positive: more is claimed than the cell shows."""
        published = self.published
        _, _, per_one = UNITS[self.unit]
        return None if published is None or not self.ours else published.total / (self.ours * per_one) - 1

    @property
    def theirs_in_words(self) -> str:
        """Their figure with its unit, or that there is none."""
        match = _FIGURE.fullmatch(self.theirs)
        if match is None:
            return self.theirs or "no number"
        words, first, second = match.groups()
        scale = 100 if self.unit == "frac" else 1
        begin = f"{float(first) * scale:.3g} to" if second else ""
        return " ".join(filter(None, (words, begin, figure(float(second or first), self.unit))))

    @property
    def link(self) -> str:
        """The section of the notebook, as JupyterLab follows it."""
        return f"{self.notebook}#{urllib.parse.quote(self.section.replace(' ', '-'))}"


@cache
def rows() -> Mapping[str, Claim]:
    """All rows of the table, by name of the paper. FileNotFoundError when effkit was copied without its table."""
    path = next((path for path in PATHS if path.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"the table of claims is not beside effkit (expected {' or '.join(map(str, PATHS))}): "
            "install effkit with pip, or from a checkout with pip install -e ."
        )
    numbers = {column.name for column in fields(Claim) if column.type == "float"}
    with path.open(newline="", encoding="utf-8") as file:
        cells: list[dict[str, Any]] = list(csv.DictReader(file))
    table = [Claim(**row | {name: float(row[name] or "nan") for name in numbers}) for row in cells]
    return {row.paper: row for row in table}


def claims(*, theme: str | None = None, resource: str | None = None, status: str | None = None) -> pd.DataFrame:
    """What the papers claim, and what this kit shows of it.

    ValueError for a theme or a resource that no row has, or an unknown status.

    Parameters
    ----------
    theme, resource
        Only rows of these: ``"padding"``, ``"compute"``.
    status
        Only rows whose status begins so: ``"measured live"``.

    Returns
    -------
    DataFrame
        Indexed by ``paper``: ``arxiv, claim, resource, theme, status, figure`` (what is compared), ``ours``, ``theirs``
        (in words), ``gap`` (theirs / ours - 1; positive: more is claimed than the cell shows), ``scale``, ``link``.
    """
    cells = [vars(row) | {"ours": figure(row.ours, row.unit), "theirs": row.theirs_in_words, "gap": row.gap,
                          "link": row.link} for row in rows().values()]  # fmt: skip
    frame = whole = pd.DataFrame(cells)[list(_COLUMNS)].set_index("paper").astype({"gap": "Float64"})
    for name, wanted in (("theme", theme), ("resource", resource)):
        if wanted is not None:
            if wanted not in words(whole[name]):
                raise ValueError(f"{name} is {wanted!r}, expected one of {', '.join(words(whole[name]))}")
            frame = frame.loc[[wanted in cell.split("; ") for cell in frame[name]]]
    if status is not None:
        statuses = (*STATUSES, NOT_TESTABLE)
        if not any(word.startswith(status) for word in statuses):
            raise ValueError(f"status is {status!r}, expected the beginning of {', '.join(statuses)}")
        frame = frame[frame["status"].str.startswith(status)]
    return frame


def words(column: pd.Series[str]) -> list[str]:
    """What stands in a column whose cells list several things: each once, in order."""
    return sorted({word for cell in column for word in cell.split("; ")})
