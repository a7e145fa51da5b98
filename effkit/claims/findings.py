"""check(): what a cell found, beside the paper's figure and the stored one of the row that rests on it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from effkit.claims.table import Claim, figure, rows

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
        """Whether this run is where stored runs lie: within the rounding of the stored figure if nothing varies."""
        row = self.claim
        low, high = (row.run_low, row.run_high) if row.stored_seeds > 0 else (row.stored_low, row.stored_high)
        return low <= self.value <= high if row.varies else math.isclose(self.value, row.stored, rel_tol=_ROUNDING)

    def __repr__(self) -> str:
        row = self.claim
        here = f"{'≈' if row.varies else ''}{figure(self.value, row.unit)}"
        runs = "inside the interval of one more seed" if row.stored_seeds > 0 else "where stored runs lie"
        where = runs if row.varies else "as stored"
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
