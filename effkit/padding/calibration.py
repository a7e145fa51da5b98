"""What a measurement of the padding lab keeps: time and peak memory of a step as functions of its shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from effkit.lab import SPREAD, Hull, Trust, rms
from effkit.least_squares import Floats, nonnegative
from effkit.padding.plans import Plan

_SHAPE = ("num_rows", "input_length", "output_length")
# Student's t that nine of ten draws stay within, by how many rows there are more than coefficients; 2 or less from 5
_STUDENT = {1: 6.31, 2: 2.92, 3: 2.35, 4: 2.13}


@dataclass(frozen=True)
class CostModel:
    """A step takes ``c0 + a·BT + b·BU + q·BT² + e·BUT`` nanoseconds.

    ``attention`` is the path that was measured: ``padded`` rows, packed ones under a dense ``block_mask``, or packed
    ones with ``varlen`` kernels. Paths cost differently; a model of one says nothing certain of another.
    """

    coefficients: tuple[float, ...]  # (c0, a, b, q, e) [ns, ns per cell, …], none negative
    attention: str
    num_steps: int  # that were measured
    largest: tuple[float, float, float]  # input length, output length and BT among them
    left_out: tuple[tuple[float, ...], ...]  # for each of them, the coefficients without it

    def step_ns(self, rows: Any, input_length: Any, output_length: Any = 0) -> Floats:
        """Time of a batch of ``rows`` padded to these lengths [ns]. Broadcasts."""
        return _step_terms(rows, input_length, output_length) @ np.array(self.coefficients)

    def ratio_error_frac(self, then: pd.DataFrame, now: pd.DataFrame) -> float:
        """Standard error of the time of the steps ``then`` over that of the steps ``now``, as a fraction of it.

        The jackknife (Efron 1979), each measured step left out of the cost model in turn: noise moves the ratio, and
        so does a step that the model does not fit.
        """
        fits = np.array(self.left_out)
        sums = [_step_terms(*(frame.get(name, 0) for name in _SHAPE)).sum(axis=0) for frame in (then, now)]
        ratios = (fits @ sums[0]) / (fits @ sums[1])
        error_frac = float(np.sqrt((len(fits) - 1) * np.var(ratios)) / np.mean(ratios))
        return error_frac * by_chance(len(fits) - sum(1 for cost in self.coefficients if cost))

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
    """Fit the cost model to measured steps, each weighted by its relative error: columns ``num_rows``, ``input_length``
    and, where there are outputs, ``output_length`` [cells]; ``dur_ns``."""
    names = ("num_rows", "input_length", "output_length", "dur_ns")
    rows, inputs, outputs, times = _columns(measured_steps, names, "fit_cost", "measured steps")
    design = _step_terms(rows, inputs, outputs) / times[:, None]

    def fitted(steps: Floats) -> tuple[float, ...]:
        return tuple(nonnegative(steps, np.ones(len(steps))).tolist())

    left_out = tuple(fitted(np.delete(design, i, axis=0)) for i in range(len(design)))
    largest = (float(inputs.max()), float(outputs.max()), float((rows * inputs).max()))
    return CostModel(fitted(design), attention, num_steps=len(times), largest=largest, left_out=left_out)


def _columns(frame: pd.DataFrame, names: Sequence[str], fit: str, what: str) -> list[Floats]:
    """These columns of what a model is fitted to; where there are no outputs, their length is 0."""
    if missing := set(names) - {"output_length"} - set(frame.columns):
        raise ValueError(f"{fit}() takes the columns {', '.join(names)}; missing: {sorted(missing)}")
    if len(frame) < 3:
        raise ValueError(f"{fit}() takes at least three {what}; given: {len(frame)}")
    return [frame.get(name, pd.Series(0.0, frame.index)).to_numpy(dtype="float64") for name in names]


def _step_terms(rows: Any, input_length: Any, output_length: Any) -> Floats:
    """1, BT, BU, BT², BUT: shape ``[…, 5]``."""
    b, t, u = np.broadcast_arrays(*(np.asarray(x, dtype="float64") for x in (rows, input_length, output_length)))
    return np.stack([np.ones_like(b), b * t, b * u, b * t * t, b * u * t], axis=-1)


@dataclass(frozen=True)
class MemoryModel:
    """Bytes of a step as ``fixed + B · (a·T + b·U + c·U·T + d·T²)``; so, at a budget, 1/B is linear in the shape.

    Attributes
    ----------
    per_example
        The coefficients of T, U, U·T and T² [budget per example and cell].
    fixed
        What does not grow with the batch, in the same unit (0 when the probes only said 1/B).
    budget
        What a batch may take, in the same unit (1 when the probes only said 1/B).
    shapes
        Lowest and highest T and U that the probes saw.
    error_frac
        Root mean square error of each probe predicted from the others, as a fraction
        (:func:`left_out_error`).
    """

    per_example: tuple[float, float, float, float]
    fixed: float
    budget: float
    shapes: tuple[tuple[float, float], tuple[float, float]]
    error_frac: float

    def amount(self, rows: Any, input_length: Any, output_length: Any = 0) -> Floats:
        """What a batch of ``rows`` padded to these lengths takes. Broadcasts."""
        return self.fixed + np.asarray(rows) * (_row_terms(input_length, output_length) @ np.array(self.per_example))

    def batch_size(self, input_length: Any, output_length: Any = 0) -> Floats:
        """The batch that just fits, as a real number. Broadcasts."""
        return (self.budget - self.fixed) / (_row_terms(input_length, output_length) @ np.array(self.per_example))

    def largest_batches(self, edges: pd.DataFrame) -> Floats:
        """The largest whole batch for each bucket, at its upper edges.

        ValueError when not even one example of a bucket fits.
        """
        output = edges["output_length"] if "output_length" in edges else self.shapes[1][1]
        sizes = np.floor(self.batch_size(edges["input_length"], output) * (1 + 1e-9)).astype("int64")
        if (sizes < 1).any():
            longest = int(edges["input_length"].iloc[int(np.argmax(sizes < 1))])
            raise ValueError(
                f"not one example of {longest:,} cells fits the memory budget: raise it or filter the list"
            )
        return np.broadcast_to(sizes, len(edges))


def left_out_error(design: Floats) -> float:
    """Root mean square of the errors at rows that the fit did not see, as one inside the range would have them.

    ``design @ coefficients`` is 1 where the fit is right. A row that is left out at the edge is predicted from afar:
    its squared error is 1 / (1 - h) times as large, h its leverage, which is taken out.
    """
    ones = np.ones(len(design))
    active = design[:, nonnegative(design, ones) > 0]
    errors = np.array([row @ nonnegative(np.delete(design, i, axis=0), ones[1:]) - 1 for i, row in enumerate(design)])
    if len(design) == active.shape[1]:
        return rms(errors)
    leverage = np.square(np.linalg.qr(active)[0]).sum(axis=1)
    return rms(errors * np.sqrt(np.clip(1 - leverage, 0, None))) * by_chance(len(design) - active.shape[1])


def fit_memory(probes: pd.DataFrame) -> MemoryModel:
    """Fit the memory model to probe shapes; its ``budget`` is 1 without ``peak_bytes``, else the largest probed peak.

    ValueError with fewer than three probes, or probes that do not vary.

    Parameters
    ----------
    probes
        Columns ``input_length`` and ``output_length`` [cells], ``batch_size``. Without ``peak_bytes``, ``batch_size``
        is the largest that fits each shape, and 1/B = a·T + b·U + c·U·T is fitted (four probes suffice: the corners
        of the shapes in use). With ``peak_bytes``, the fixed part and a T² term are fitted too.
    """
    names = ("input_length", "output_length", "batch_size")
    inputs, outputs, rows = _columns(probes, names, "fit_memory", "probe shapes")
    if "peak_bytes" not in probes and np.ptp(inputs) == 0:
        raise ValueError("fit_memory() needs probes of different input lengths; all have the same")
    terms = _row_terms(inputs, outputs)
    if "peak_bytes" in probes:
        peak = probes["peak_bytes"].to_numpy(dtype="float64")
        design = np.column_stack([np.ones(len(peak)), rows[:, None] * terms]) / peak[:, None]
        coefficients = nonnegative(design, np.ones(len(peak)))
        fixed, per_example, budget = float(coefficients[0]), coefficients[1:], float(peak.max())
    else:
        # the published size is the floor of what fits; half a row more is its expectation
        design = terms[:, :3] / (1 / (rows + 0.5))[:, None]
        fixed, per_example, budget = 0.0, np.append(nonnegative(design, np.ones(len(rows))), 0.0), 1.0
    a, b, c, d = (float(value) for value in per_example)
    shapes = ((float(inputs.min()), float(inputs.max())), (float(outputs.min()), float(outputs.max())))
    return MemoryModel((a, b, c, d), fixed, budget, shapes, left_out_error(design))


def _row_terms(input_length: Any, output_length: Any) -> Floats:
    """T, U, U·T, T²: shape ``[…, 4]``."""
    t, u = np.broadcast_arrays(np.asarray(input_length, dtype="float64"), np.asarray(output_length, dtype="float64"))
    return np.stack([t, u, u * t, t * t], axis=-1)


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a measurement found, and all that :func:`~effkit.padding.predict` needs."""

    plan: Plan  # that was measured
    cost: CostModel  # the time of a step as a function of its shape
    memory: MemoryModel  # its peak memory
    # A row per measured batch: num_rows, input_length, output_length [cells]; whole, False for one that was cut down,
    # and its number in the plan, batch (-1); dur_ns, peak_bytes; times_ns, in the order in which they were run
    steps: pd.DataFrame
    noise_frac: float  # how far steps on the same batch lay apart (effkit.lab.noise)
    anchor: float  # measured over modelled time of those batches, 1.0 when the model fits perfectly
    shapes: Sequence[tuple[int, ...]] = ()  # of the model's parameters, where they are known

    def trust(self, frame: pd.DataFrame) -> Trust:
        """In the time of an epoch of these steps (``frame`` of a plan), which is predicted in relation to the measured
        one; every repeat of every step tells something of it."""
        error = self.cost.ratio_error_frac(frame, self.steps[self.steps["whole"]])
        return Trust(error, self.noise_frac, self.steps["times_ns"].map(len).sum())
