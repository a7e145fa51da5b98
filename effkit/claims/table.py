"""claims(): what each paper claims, and what this kit can say about it. A row says no more than the cell behind it.

check(): what a cell found, beside the paper's figure and the stored one of the row that rests on it.
"""

from __future__ import annotations

import math
import re
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

# Of data/ and notebooks/: inside an installed effkit, or the checkout that this module is in.
HOMES = Path(__file__).parents[1] / "material", Path(__file__).parents[2]
PATHS = tuple(home / "data" / "claims.csv" for home in HOMES)
UNITS = {"times": "{:.3g} times", "frac": "{:.3g}%", "U": "{:.4g} U", "correlation": "{:.2f}"}  # as a person reads it
_COLUMNS = ["paper", "arxiv", "claim", "resource", "theme", "how", "verdict", "figure", "theirs", "stored", "gap",
            "their_setting", "our_setting", "link"]  # fmt: skip
_OF_SEEDS = ", the mean of {seeds:.0f} seeds, in 95% between {} and {}; one more seed, in 95%, between {} and {}"
_FIGURE = re.compile(r"(?:(over|under|up to|about) )?([\d.]+)(?: to ([\d.]+))?")
_ROUNDING = 5e-3  # of a figure that is computed and not measured: what three digits leave open


def figure(value: float, unit: str) -> str:
    """A figure as a person reads it.

    >>> figure(2.5, "times"), figure(2760, "times"), figure(0.552, "frac"), figure(0.93, "correlation")
    ('2.5 times', '2,760 times', '55.2%', '0.93')
    """
    form = UNITS[unit].replace(".3g", ",.0f") if value >= 1000 else UNITS[unit]
    return form.format(value * 100 if unit == "frac" else value)


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
    how, verdict
        How our figure is made: ``ran``, ``simulated``, ``counted``, ``recomputed from the paper's own figures`` or
        ``assumed``. And what it says of theirs: ``closes``, ``does not close``, ``contradicts itself``,
        ``no effect seen here``, ``not comparable at this scale`` or ``not a test`` (nothing of this kind is published,
        or ours is made from theirs).
    figure, unit
        What is compared, in words; ``times``, ``frac`` (of 1, read as percent), ``U`` or ``correlation``.
    theirs, their_setting
        ``2.5``, ``2 to 2.5``, ``over 17.5``, ``under 0.005``, ``up to 0.5``, ``about 0.34``; empty where no number is
        given, and words where their number is of another kind: then there is no gap. And what it was shown on.
    stored, stored_low, stored_high
        What an earlier run of the cell computed. Where another run gives another figure: the mean of the stored seeds
        (of ratios the geometric one), and its 95% interval.
    stored_on, stored_machine
        Date and machine of that run, where they are known.
    no_effect
        The figure that a method without any effect would give; NaN where there is none.
    our_setting
        What ours was shown on: the reason for most gaps.
    notebook, section
        Where the cell stands: a file in ``notebooks/`` and a heading.
    stored_seeds, run_low, run_high
        How many seeds are stored (``data/minilabs.csv``), and the 95% interval of one more; NaN where none are.
    bounded_by, applies_if, lever, price
        Which rows of a step's account it makes cheaper (empty: it changes the number of steps); of what models; what
        does it here; what it costs: see :meth:`effkit.Study.claims`.
    """

    paper: str
    arxiv: str
    claim: str
    resource: str
    theme: str
    how: str
    verdict: str
    figure: str
    unit: str
    theirs: str
    their_setting: str
    stored: float
    stored_low: float
    stored_high: float
    stored_on: str
    stored_machine: str
    no_effect: float
    our_setting: str
    notebook: str
    section: str
    stored_seeds: float
    run_low: float
    run_high: float
    bounded_by: str
    applies_if: str
    lever: str
    price: str

    @property
    def varies(self) -> bool:
        """Whether another run gives another figure: something in it is measured or drawn."""
        return not math.isnan(self.stored_low)

    @property
    def published(self) -> tuple[float, float, float] | None:
        """Lowest, middle and highest figure that their words leave open; None where there is no number."""
        if (match := _FIGURE.fullmatch(self.theirs)) is None:
            return None
        words, first, second = match.groups()
        low, high = float(first), float(second or first)
        ends = {"over": (low, math.inf), "under": (0.0, low), "up to": (0.0, low)}.get(words or "", (low, high))
        return ends[0], (low + high) / 2, ends[1]

    @property
    def gap(self) -> float | None:
        """Signed, as in a receipt: theirs / stored - 1. Positive: more is claimed than the stored run showed."""
        return None if self.published is None or not self.stored else self.published[1] / self.stored - 1

    @property
    def stored_in_words(self) -> str:
        """The stored figure, what is known of it from seeds, and when and where."""
        numbers = (self.stored, self.stored_low, self.stored_high, self.run_low, self.run_high)
        value, *ends = (figure(number, self.unit) for number in numbers)
        between = _OF_SEEDS.format(*ends, seeds=self.stored_seeds) if self.varies else ""
        return f"{value}{between} ({self.stored_on or 'date not known'}, {self.stored_machine or 'machine not known'})"

    @property
    def theirs_in_words(self) -> str:
        """Their figure with its unit, or that there is none."""
        if not _FIGURE.fullmatch(self.theirs):
            return self.theirs or "no number"
        form, end, unit = UNITS[self.unit].partition("}")
        scale = 100 if self.unit == "frac" else 1
        return re.sub(r"[\d.]+", lambda found: (form + end).format(float(found[0]) * scale), self.theirs) + unit

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
    types: dict[str, Any] = {column.name: column.type for column in fields(Claim)}
    empty = {name: [""] for name, kind in types.items() if kind == "float"}
    table = pd.read_csv(path, dtype=types, keep_default_na=False, na_values=empty)[list(types)]
    return {row.paper: row for row in map(Claim, *(table[name].tolist() for name in types))}


def claims(
    *, theme: str | None = None, resource: str | None = None, how: str | None = None, verdict: str | None = None
) -> pd.DataFrame:
    """What the papers claim, and what this kit shows of it.

    ValueError for a theme, a resource, a way or a verdict that no row has.

    Parameters
    ----------
    theme, resource
        Only rows of these: ``"padding"``, ``"compute"``.
    how, verdict
        Only rows with these: ``"ran"``, ``"does not close"``.

    Returns
    -------
    DataFrame
        Indexed by ``paper``: ``arxiv, claim, resource, theme, how, verdict, figure`` (what is compared), ``theirs`` and
        ``stored`` (both in words; the second is of an earlier run), ``gap`` (theirs / stored - 1; positive: more is
        claimed than that run showed), ``their_setting, our_setting, link``.
    """
    cells = [vars(row) | {"stored": figure(row.stored, row.unit), "theirs": row.theirs_in_words, "gap": row.gap,
                          "link": row.link} for row in rows().values()]  # fmt: skip
    frame = whole = pd.DataFrame(cells)[_COLUMNS].set_index("paper").astype({"gap": "Float64"})
    for name, wanted in (("theme", theme), ("resource", resource), ("how", how), ("verdict", verdict)):
        if wanted is not None:
            if wanted not in words(whole[name]):
                raise ValueError(f"{name} is {wanted!r}, expected one of {', '.join(words(whole[name]))}")
            frame = frame.loc[[wanted in cell.split("; ") for cell in frame[name]]]
    return frame


def words(column: pd.Series[str]) -> list[str]:
    """What stands in a column whose cells list several things: each once, in order."""
    return sorted({word for cell in column for word in cell.split("; ")})


@dataclass(frozen=True)
class Finding:
    """A figure of this run beside the table's row for it.

    Attributes
    ----------
    claim
        The row.
    value
        What this run found, in the row's unit.
    """

    claim: Claim
    value: float

    @property
    def agrees(self) -> bool:
        """Whether this run lies in the interval of one more seed; where nothing varies, is the stored figure."""
        row = self.claim
        if row.varies:
            return row.run_low <= self.value <= row.run_high
        return math.isclose(self.value, row.stored, rel_tol=_ROUNDING)

    def __repr__(self) -> str:
        row = self.claim
        here = f"{'≈' if row.varies else ''}{figure(self.value, row.unit)}"
        where = "inside the interval of one more seed" if row.varies else "as stored"
        return (
            f"{row.paper} (arXiv {row.arxiv}): {row.figure}\n"
            f"  paper: {row.theirs_in_words} ({row.their_setting})\n"
            f"  this run: {here} ({row.our_setting})\n"
            f"  stored: {row.stored_in_words}\n"
            f"  how: {row.how}; verdict: {row.verdict}; this run is {where if self.agrees else f'NOT {where}'}"
        )


def check(paper: str, value: float) -> Finding:
    """Hold what a cell found against the table: the last line of every cell that a row rests on.

    KeyError for a paper that is not in the table. ValueError when the value is not finite.

    Parameters
    ----------
    paper
        As in the table.
    value
        What was found, in the unit of the row: a ratio, a fraction of 1, a correlation.
    """
    if paper not in rows():
        raise KeyError(f"{paper!r} is no paper of the table; expected one of {', '.join(rows())}")
    if not math.isfinite(value):
        raise ValueError(f"the figure for {paper} is {value}, expected a finite number: the cell before went wrong")
    return Finding(rows()[paper], float(value))
