"""Surface: the whole timeline of a step as a function of batch size and sequence length, from a few replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from effkit.activations.timeline import Timeline

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, eq=False)
class Surface:
    """Live bytes during operator i, by category: ``a + bB + cS + dBS + eS² + fBS²``, exact where it was fitted.

    Shapes are products of B and S, and attention's at most of B and S²; a peak is not of that form, since it moves from
    operator to operator, but the largest of these is.

    Attributes
    ----------
    coefficients
        Shape [num_terms, num_categories, num_ops], of the model's own operators.
    timeline
        One of the timelines: names and phases of the operators.
    rows, cells
        Smallest and largest batch size and sequence length (``None`` where there is none) that were replayed.
    """

    coefficients: Floats
    timeline: Timeline
    rows: tuple[int, int]
    cells: tuple[int, int] | None

    @classmethod
    def fit(cls, settings: Sequence[tuple[int, int | None]], timelines: Sequence[Timeline]) -> Surface:
        """Through as many replays as there are terms: two batch sizes, times three lengths where there are any.

        Raises
        ------
        ValueError
            When the replays ran different operators: the step is not one function of B and S.
        """
        if len({timeline.main_ops for timeline in timelines}) != 1:
            raise ValueError("the step runs other operators at other sizes, so no one timeline fits them all")
        design = np.array([_terms(*setting) for setting in settings])
        levels = np.stack([timeline.main_levels() for timeline in timelines]).astype("float64")
        scale = np.abs(design).max(axis=0)
        solved = np.linalg.solve(design / scale, levels.reshape(len(levels), -1))
        coefficients = (solved / scale[:, None]).reshape(levels.shape)
        rows, cells = zip(*settings, strict=True)
        known = [cell for cell in cells if cell is not None]
        span = (min(known), max(known)) if known else None
        return cls(coefficients, timelines[0], (min(rows), max(rows)), span)

    def peak(self, num_rows: int, num_cells: int | None) -> tuple[Floats, int]:
        """Bytes by category at the peak, shape [num_categories], and at which operator that is."""
        terms = np.array(_terms(num_rows, num_cells))
        totals = terms @ self.coefficients.sum(axis=1)
        op = int(totals.argmax())
        at_peak: Floats = terms @ self.coefficients[:, :, op]
        return at_peak, op

    def covers(self, num_rows: int, num_cells: int | None) -> bool:
        """Whether this lies between the sizes that were replayed."""
        low, high = self.cells or (num_cells, num_cells)
        inside = num_cells is None or low is None or high is None or low <= num_cells <= high
        return inside and self.rows[0] <= num_rows <= self.rows[1]


def _terms(num_rows: int, num_cells: int | None) -> list[float]:
    b = float(num_rows)
    if num_cells is None:
        return [1.0, b]
    s = float(num_cells)
    return [1.0, b, s, b * s, s * s, b * s * s]
