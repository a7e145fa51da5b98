"""Time of a training step as a function of its shape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from effkit.lab import SPREAD, Hull
from effkit.least_squares import Floats, nonnegative

ATTENTION = ("padded", "block_mask", "varlen")
_SHAPE = ("num_rows", "input_length", "output_length")
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
    num_steps
        How many steps were measured.
    largest
        The largest ``input_length``, ``output_length`` and ``BT`` that were measured.
    left_out
        For each measured step, the coefficients without it.
    """

    coefficients: tuple[float, ...]
    attention: str
    num_steps: int
    largest: tuple[float, float, float]
    left_out: tuple[tuple[float, ...], ...]

    def step_ns(self, rows: Any, input_length: Any, output_length: Any = 0) -> Floats:
        """Time of a batch of ``rows`` padded to these lengths [ns]. Broadcasts."""
        return _terms(rows, input_length, output_length) @ np.array(self.coefficients)

    def ratio_error_frac(self, then: pd.DataFrame, now: pd.DataFrame) -> float:
        """Standard error of the time of the steps ``then`` over that of the steps ``now``, as a fraction of it.

        The jackknife (Efron 1979), each measured step left out of the cost model in turn: noise moves the ratio, and
        so does a step that the model does not fit.
        """
        fits = np.array(self.left_out)
        sums = [_terms(*(frame.get(name, 0) for name in _SHAPE)).sum(axis=0) for frame in (then, now)]
        ratios = (fits @ sums[0]) / (fits @ sums[1])
        error_frac = float(np.sqrt((len(fits) - 1) * np.var(ratios)) / np.mean(ratios))
        return error_frac * by_chance(len(fits) - sum(1 for cost in self.coefficients if cost))

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


def by_chance(num_free: int) -> float:
    """What to multiply an error with where a fit had only so many more points than coefficients, which can agree by
    chance: two errors then hold nine of ten, as Student's t has it."""
    return max(1.0, _STUDENT.get(num_free, 0.0) / SPREAD)


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

    def fitted(steps: Floats) -> tuple[float, ...]:
        return tuple(nonnegative(steps, np.ones(len(steps))).tolist())

    left_out = tuple(fitted(np.delete(design, i, axis=0)) for i in range(len(design)))
    largest = (float(inputs.max()), float(outputs.max()), float((rows * inputs).max()))
    return CostModel(fitted(design), attention, num_steps=len(times), largest=largest, left_out=left_out)


def _terms(rows: Any, input_length: Any, output_length: Any) -> Floats:
    """1, BT, BU, BT², BUT: shape ``[…, 5]``."""
    b, t, u = np.broadcast_arrays(*(np.asarray(x, dtype="float64") for x in (rows, input_length, output_length)))
    return np.stack([np.ones_like(b), b * t, b * u, b * t * t, b * u * t], axis=-1)
