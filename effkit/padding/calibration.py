"""What a measurement of the padding lab keeps for predictions."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from effkit.lab import Trust
from effkit.padding.cost import CostModel
from effkit.padding.memory import MemoryModel
from effkit.padding.plans import Plan


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a measurement found, and all that :func:`~effkit.padding.predict` needs.

    Attributes
    ----------
    plan
        The plan that was measured.
    cost, memory
        Time and peak memory of a step as functions of its shape.
    steps
        One row per measured batch: ``num_rows, input_length, output_length`` [cells], ``whole`` (False for one that
        was cut down) and its number ``batch`` in the plan (-1), ``dur_ns``, ``peak_bytes``.
    noise_frac
        How far the two fastest runs of the same batch lay apart (median of second / fastest - 1).
    anchor
        Measured over modelled time of those batches: 1.0 when the model fits perfectly.
    """

    plan: Plan
    cost: CostModel
    memory: MemoryModel
    steps: pd.DataFrame
    noise_frac: float
    anchor: float

    @property
    def band_frac(self) -> float:
        """Half-width of the band on an epoch's time: steps left out in turn, and repeats of one step."""
        return Trust(self.cost.error_frac, self.noise_frac).band_frac
