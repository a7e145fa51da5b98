"""The mini-labs of 06 itself: rows of the page whose figure is a ratio of times."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from effkit import Account, models, padding
from lessons import token_merging
from lessons.minilabs import Arm, MiniLab, ratio

PACKED: dict[str, Any] = {"strategy": "pack", "max_input_cells": 320, "batch_size": 8}


def image_text_lengths(seed: int) -> pd.DataFrame:
    """Lengths [tokens] of 2,000 samples: an image of many or few tokens or none, and a text; a quarter of the usual."""
    random = np.random.default_rng(seed)
    image = random.choice([0, 144, 729], size=2000, p=[0.2, 0.5, 0.3]) // 4
    text = random.lognormal(4, 0.8, 2000).clip(4, 512).astype(int) // 4 + 1
    return padding.lengths(image + text)


class Epochs(NamedTuple):
    """One epoch of the same samples, measured: in random batches, and in packed rows."""

    random: Account
    packed: Account


def _epochs(seed: int) -> Epochs:
    lengths, model = image_text_lengths(seed), models.text(layers=2, hidden=64)
    plans = padding.plan(lengths, batch_size=16), padding.plan(lengths, **PACKED)
    return Epochs(*(padding.measure(plan, model, num_batches=8) for plan in plans))


INFIMED = MiniLab(
    "InfiMed-Foundation", "time of one epoch", "ns", _epochs,
    lambda epochs: {name: Arm(float(epoch.total), 8) for name, epoch in epochs._asdict().items()},
    {"InfiMed-Foundation": ratio("random", "packed")}, clocked=True,
)  # fmt: skip

BUS = MiniLab(
    "BUS", "step of a vision transformer, by the tokens that are kept", "ns",
    lambda seed: token_merging.kept_ratios((1.0, 0.5, 0.25), seed=seed, repeats=9),
    lambda table: {f"{kept:.0%}": Arm(float(dur_ns), 9) for kept, dur_ns in table["step_ns"].items()},
    {"BUS": ratio("100%", "50%")}, clocked=True,
)  # fmt: skip

LABS = (BUS, INFIMED)
