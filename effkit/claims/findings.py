"""check(): what a cell found, held against the row of the table that rests on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from effkit.account import Account
from effkit.claims.table import UNITS, Claim, figure, rows
from effkit.receipt import Receipt

_ROUNDING = 5e-3  # of a figure that is computed and not measured: what three digits leave open


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
        """Whether this run is where the row says that runs lie: within its rounding if nothing in it is measured."""
        low, high = self.claim.ours_low, self.claim.ours_high
        if math.isnan(low):
            return math.isclose(self.value, self.claim.ours, rel_tol=_ROUNDING)
        return low <= self.value <= high

    @property
    def receipt(self) -> Receipt | None:
        """The published figure as the prediction, this run as the measurement; None where no number was published."""
        published = self.claim.published
        if published is None:
            return None
        _, unit, per_one = UNITS[self.claim.unit]
        value = round(self.value * per_one)
        measured = Account.of(self.claim.figure, unit, {"here": value}, total=value, source=self.claim.scale)
        return Receipt(published, measured)

    def __repr__(self) -> str:
        row = self.claim
        gap = "" if row.gap is None else f" (theirs / ours: {row.gap:+.1%})"
        ours, low, high = (figure(value, row.unit) for value in (row.ours, row.ours_low, row.ours_high))
        between = "" if math.isnan(row.ours_low) else f", between {low} and {high}"
        differs = f"THIS RUN SAYS {figure(self.value, row.unit)}, the table is not of it"
        return (
            f"{row.paper} (arXiv {row.arxiv}): {row.figure}\n"
            f"  theirs: {row.theirs_in_words}; ours: {ours}{between}{gap}\n"
            f"  {row.status}; {'this run agrees' if self.agrees else differs}"
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
    table = rows()
    if paper not in table:
        raise KeyError(f"{paper!r} is no paper of the table; expected one of {', '.join(table)}")
    if not math.isfinite(value):
        raise ValueError(f"the figure for {paper} is {value}, expected a finite number: the cell before went wrong")
    return Finding(table[paper], float(value))
