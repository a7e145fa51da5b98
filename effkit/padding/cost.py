"""Time of a training step as a function of its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from effkit.lab import SPREAD, Hull, rms
from effkit.least_squares import Floats, nonnegative

ATTENTION = ("padded", "block_mask", "varlen")
# Student's t that nine of ten draws stay within, by how many rows there are more than coefficients; 2 or less from 5
_STUDENT = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13}


@dataclass(frozen=True)
class CostModel:
    """A step takes ``c0 + a·BT + b·BU + q·BT² + e·BUT`` nanoseconds.

    Attributes
    ----------
    coefficients
        ``(c0, a, b, q, e)`` [ns, ns per cell, …], none negative.
    attention
        The attention path that was measured: ``padded`` rows, packed rows under a dense ``block_mask``, or packed
        rows with ``varlen`` kernels. Paths cost differently; a model of one says nothing certain of another.
    error_frac
        Root mean square error of each measured step predicted from the others, as a fraction
        (:func:`left_out_error`).
    num_steps
        How many steps were measured.
    largest
        The largest ``input_length``, ``output_length`` and ``BT`` that were measured.
    """

    coefficients: tuple[float, float, float, float, float]
    attention: str
    error_frac: float
    num_steps: int
    largest: tuple[float, float, float]

    def step_ns(self, rows: Any, input_length: Any, output_length: Any = 0) -> Floats:
        """Time of a batch of ``rows`` padded to these lengths [ns]. Broadcasts."""
        return _terms(rows, input_length, output_length) @ np.array(self.coefficients)

    def real_ns(self, input_real: float, output_real: float, input_squared: float, cross: float) -> float:
        """Time of the real cells alone, given their sums [ns]; no fixed part."""
        return float(np.dot(self.coefficients[1:], [input_real, output_real, input_squared, cross]))

    def doublings(self, rows: Any, input_length: Any, output_length: Any = 0) -> float:
        """By how many doublings the largest of these batches lies beyond what was measured; 0 within.

        Smaller batches count as within: no coefficient is negative, so time falls towards the fixed cost.
        """
        sizes = (input_length, output_length, np.multiply(rows, input_length))
        names = ("input_length", "output_length", "cells")
        hull = Hull(dict.fromkeys(names, 0.0), dict(zip(names, self.largest, strict=True)))
        return hull.doublings({name: float(np.max(size)) for name, size in zip(names, sizes, strict=True)})

    def covers(self, rows: Any, input_length: Any, output_length: Any = 0) -> bool:
        """Whether these batches stay within what was measured."""
        return self.doublings(rows, input_length, output_length) == 0


def left_out_error(design: Floats) -> float:
    """Root mean square of the errors at rows that the fit did not see, as one inside the range would have them.

    ``design @ coefficients`` is 1 where the fit is right. A row that is left out at the edge is predicted from afar:
    its squared error is 1 / (1 - h) times as large, h its leverage, which is taken out. Where there are hardly more
    rows than coefficients, they can agree by chance: two errors then hold nine of ten, as Student's t has it.
    """
    ones = np.ones(len(design))
    active = design[:, nonnegative(design, ones) > 0]
    errors = np.array([row @ nonnegative(np.delete(design, i, axis=0), ones[1:]) - 1 for i, row in enumerate(design)])
    free = len(design) - active.shape[1]
    if not free:
        return rms(errors)
    leverage = np.square(np.linalg.qr(active)[0]).sum(axis=1)
    return rms(errors * np.sqrt(np.clip(1 - leverage, 0, None))) * max(1.0, _STUDENT.get(free, 0.0) / SPREAD)


def fit_cost(measured_steps: pd.DataFrame, *, attention: str = "padded") -> CostModel:
    """Fit the cost model to measured steps, each weighted by its relative error.

    ValueError with fewer than three steps, or a column missing.

    Parameters
    ----------
    measured_steps
        Columns ``num_rows``, ``input_length`` and, where there are outputs, ``output_length`` [cells]; ``dur_ns``.
    attention
        Which attention path they ran.
    """
    if missing := {"num_rows", "input_length", "dur_ns"} - set(measured_steps.columns):
        raise ValueError(
            f"fit_cost() takes the columns num_rows, input_length, output_length, dur_ns; missing: {sorted(missing)}"
        )
    if len(measured_steps) < 3:
        raise ValueError(f"fit_cost() takes at least three measured steps; given: {len(measured_steps)}")
    if attention not in ATTENTION:
        raise ValueError(f"attention is one of {', '.join(ATTENTION)}; given: {attention!r}")
    rows = measured_steps["num_rows"].to_numpy(dtype="float64")
    inputs = measured_steps["input_length"].to_numpy(dtype="float64")
    outputs = measured_steps.get("output_length", pd.Series(0.0, measured_steps.index)).to_numpy(dtype="float64")
    times = measured_steps["dur_ns"].to_numpy(dtype="float64")
    design = _terms(rows, inputs, outputs) / times[:, None]
    c0, a, b, q, e = (float(value) for value in nonnegative(design, np.ones(len(times))))
    largest = (float(inputs.max()), float(outputs.max()), float((rows * inputs).max()))
    return CostModel((c0, a, b, q, e), attention, left_out_error(design), num_steps=len(times), largest=largest)


def _terms(rows: Any, input_length: Any, output_length: Any) -> Floats:
    """1, BT, BU, BT², BUT: shape ``[…, 5]``."""
    b, t, u = np.broadcast_arrays(*(np.asarray(x, dtype="float64") for x in (rows, input_length, output_length)))
    return np.stack([np.ones_like(b), b * t, b * u, b * t * t, b * u * t], axis=-1)
