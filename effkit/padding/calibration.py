"""What a measurement of the padding lab keeps for predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from effkit.lab import Trust
from effkit.padding.cost import CostModel
from effkit.padding.memory import MemoryModel
from effkit.padding.plans import Plan


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a measurement found, and all that :func:`~effkit.padding.predict` needs.

    ``plan`` was measured; ``cost`` and ``memory`` are time and peak memory of a step as functions of its shape.
    ``steps`` has a row per measured batch: ``num_rows, input_length, output_length`` [cells], ``whole`` (False for one
    that was cut down) and its number ``batch`` in the plan (-1), ``dur_ns``, ``peak_bytes``, and ``times_ns``, its
    times in the order they were run. ``noise_frac``: how far steps on the same batch lay apart
    (:func:`effkit.lab.noise`). ``anchor``: measured over modelled time of those batches, 1.0 when the model fits
    perfectly. ``shapes`` are those of the model's parameters, where they are known.
    """

    plan: Plan
    cost: CostModel
    memory: MemoryModel
    steps: pd.DataFrame
    noise_frac: float
    anchor: float
    shapes: Sequence[tuple[int, ...]] = ()

    def trust(self, frame: pd.DataFrame) -> Trust:
        """In the time of an epoch of these steps (``frame`` of a plan), which is predicted in relation to the measured
        one; every repeat of every step tells something of it."""
        error = self.cost.ratio_error_frac(frame, self.steps[self.steps["whole"]])
        return Trust(error, self.noise_frac, self.steps["times_ns"].map(len).sum())
