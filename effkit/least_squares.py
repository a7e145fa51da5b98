"""Least squares with coefficients that cannot be negative: no step gets cheaper by being larger."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np

Floats = np.ndarray[Any, np.dtype[np.float64]]


def nonnegative(design: Floats, target: Floats) -> Floats:
    """The ``x >= 0`` that minimises ``|design @ x - target|``.

    For the handful of terms that we fit, trying every set of active terms is exact and instant: the optimum is the
    unconstrained solution on its own support. Sets with more terms than there are rows are left out. Shapes: ``design``
    ``[num_rows, num_terms]``, at most 8 terms, ``target`` ``[num_rows]``.

    >>> nonnegative(np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([2.0, -1.0])).tolist()
    [2.0, 0.0]
    """
    num_rows, num_terms = design.shape
    scale = np.abs(design).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = design / scale  # lengths squared beside ones: keep the solver's cut-off meaningful
    best, best_error = np.zeros(num_terms), float(np.linalg.norm(target))
    for size in range(1, min(num_terms, num_rows) + 1):
        for active in combinations(range(num_terms), size):
            columns = list(active)
            solution = np.linalg.lstsq(scaled[:, columns], target, rcond=None)[0]
            if (solution >= 0).all():
                error = float(np.linalg.norm(scaled[:, columns] @ solution - target))
                if error < best_error * (1 - 1e-9):
                    best = np.zeros(num_terms)
                    best[columns] = solution
                    best_error = error
    return best / scale
