"""Peak memory of a step as a function of its shape, and the largest batch that fits, without running out of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from effkit.lab import rms
from effkit.least_squares import Floats, nonnegative
from effkit.padding.cost import by_chance


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
        return self.fixed + np.asarray(rows) * (_terms(input_length, output_length) @ np.array(self.per_example))

    def batch_size(self, input_length: Any, output_length: Any = 0) -> Floats:
        """The batch that just fits, as a real number. Broadcasts."""
        return (self.budget - self.fixed) / (_terms(input_length, output_length) @ np.array(self.per_example))

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
    """Fit the memory model to probe shapes.

    ValueError with fewer than three probes, or probes that do not vary.

    Parameters
    ----------
    probes
        Columns ``input_length`` and ``output_length`` [cells], ``batch_size``. Without ``peak_bytes``, ``batch_size``
        is the largest that fits each shape, and 1/B = a·T + b·U + c·U·T is fitted (four probes suffice: the corners
        of the shapes in use). With ``peak_bytes``, the fixed part and a T² term are fitted too.

    Returns
    -------
    MemoryModel
        ``budget`` is 1 without ``peak_bytes``, else the largest peak that was probed.
    """
    if missing := {"input_length", "batch_size"} - set(probes.columns):
        raise ValueError(
            f"fit_memory() takes the columns input_length, output_length, batch_size; missing: {sorted(missing)}"
        )
    if len(probes) < 3:
        raise ValueError(f"fit_memory() takes at least three probe shapes; given: {len(probes)}")
    inputs = probes["input_length"].to_numpy(dtype="float64")
    outputs = probes.get("output_length", pd.Series(0.0, probes.index)).to_numpy(dtype="float64")
    rows = probes["batch_size"].to_numpy(dtype="float64")
    if "peak_bytes" not in probes and np.ptp(inputs) == 0:
        raise ValueError("fit_memory() needs probes of different input lengths; all have the same")
    terms = _terms(inputs, outputs)
    if "peak_bytes" in probes:
        peak = probes["peak_bytes"].to_numpy(dtype="float64")
        design = np.column_stack([np.ones(len(peak)), rows[:, None] * terms])
        design = design / peak[:, None]
        coefficients = nonnegative(design, np.ones(len(peak)))
        fixed, per_example, budget = float(coefficients[0]), coefficients[1:], float(peak.max())
    else:
        # the published size is the floor of what fits; half a row more is its expectation
        occupied = 1 / (rows + 0.5)
        design = terms[:, :3] / occupied[:, None]
        fixed, per_example, budget = 0.0, np.append(nonnegative(design, np.ones(len(rows))), 0.0), 1.0
    a, b, c, d = (float(value) for value in per_example)
    shapes = ((float(inputs.min()), float(inputs.max())), (float(outputs.min()), float(outputs.max())))
    return MemoryModel((a, b, c, d), fixed, budget, shapes, left_out_error(design))


def _terms(input_length: Any, output_length: Any) -> Floats:
    """T, U, U·T, T²: shape ``[…, 4]``."""
    t, u = np.broadcast_arrays(np.asarray(input_length, dtype="float64"), np.asarray(output_length, dtype="float64"))
    return np.stack([t, u, u * t, t * t], axis=-1)
