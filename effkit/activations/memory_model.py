"""Surface: the whole timeline of a step as a function of batch size and sequence length, from a few replays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from effkit.activations.timeline import Timeline
from effkit.lab import Hull
from effkit.least_squares import Floats


@dataclass(frozen=True, eq=False)
class Surface:
    """Live bytes during operator i, by category: ``a + bB + cS + dBS + eS² + fBS²``, exact where it was fitted.

    Shapes are products of B and S, and attention's at most of B and S²; a peak is not of that form, since it moves from
    operator to operator, but the largest of these is.

    ``coefficients`` [num_terms, num_categories, num_ops] are of the model's own operators; ``settings`` are the batch
    sizes and sequence lengths (``None`` where there is none) that were replayed, ``timelines`` the replays.
    """

    coefficients: Floats
    settings: tuple[tuple[int, int | None], ...]
    timelines: tuple[Timeline, ...]

    @cached_property
    def _totals(self) -> Floats:
        return self.coefficients.sum(axis=1)

    @classmethod
    def fit(cls, settings: Sequence[tuple[int, int | None]], timelines: Sequence[Timeline]) -> Surface:
        """Through as many replays as there are terms: two batch sizes, times three lengths where there are any.

        ValueError when the replays ran different operators: the step is not one function of B and S.
        """
        if len({timeline.main_ops for timeline in timelines}) != 1:
            raise ValueError("the step runs other operators at other sizes, so no one timeline fits them all")
        levels = np.stack([timeline.main_levels() for timeline in timelines]).astype("float64")
        return cls(_solved(settings, levels), tuple(settings), tuple(timelines))

    def peak(self, num_rows: int, num_cells: int | None, first: int = 0, last: int | None = None) -> tuple[Floats, int]:
        """Bytes by category at the peak, shape [num_categories], and at which operator, of ``first`` to ``last``."""
        terms = np.array(_terms(num_rows, num_cells))
        totals = terms @ self._totals[:, first:last]
        op = first + int(totals.argmax())
        return terms @ self.coefficients[:, :, op], op

    def amount(self, amounts: Floats, num_rows: int, num_cells: int | None) -> float:
        """Any other amount that grows as the levels do, such as time, from what it is at each of the settings."""
        return float(np.array(_terms(num_rows, num_cells)) @ _solved(self.settings, amounts))

    def doublings(self, num_rows: int, num_cells: int | None) -> float:
        """How far this lies beyond the sizes that were replayed (see :meth:`Hull.doublings`); 0 between them."""
        hull = Hull.of([{"rows": rows, "cells": cells or 1} for rows, cells in self.settings], room=1.0)
        return hull.doublings({"rows": num_rows, "cells": num_cells or 1})


def _solved(settings: Sequence[tuple[int, int | None]], amounts: Floats) -> Floats:
    """Coefficients, shape [num_terms, …], of amounts of shape [num_settings, …]."""
    design = np.array([_terms(*setting) for setting in settings])
    scale = np.abs(design).max(axis=0)  # squared lengths beside ones
    solved = np.linalg.solve(design / scale, amounts.reshape(len(amounts), -1))
    return (solved / scale[:, None]).reshape(amounts.shape)


def _terms(num_rows: int, num_cells: int | None) -> list[float]:
    b, s = float(num_rows), float(num_cells or 0)
    return [1.0, b] if num_cells is None else [1.0, b, s, b * s, s * s, b * s * s]
