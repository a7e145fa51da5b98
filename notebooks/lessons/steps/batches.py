"""Steps by batch size: a law with two numbers, fitted at two batch sizes, and the run of another one.

The gradient of a batch is an estimate. With B pieces a training needs S = S_min (1 + N / B) steps, where S_min are the
steps that an exact gradient would need and N, in pieces, says how noisy the gradient of one piece is (arXiv 1812.06162,
equation 2.11).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from effkit import Account, WhatIf
from effkit.whatif import Slider
from lessons import meter
from lessons.minilabs import LIVE, Interval
from lessons.steps import labs, language

TARGET = 3.0  # nats per held-out letter
FITTED = (8, 32)  # pieces a step, of which the mini-lab stores seeds
_TITLE = f"Steps to a held-out loss of {TARGET:g} nats"


class Law(NamedTuple):
    """``least_steps`` at any batch size, and ``noise_pieces``: the batch size at which twice as many are needed."""

    least_steps: float
    noise_pieces: float

    def steps(self, batch_size: float) -> float:
        """Steps with so many pieces each."""
        return self.least_steps * (1 + self.noise_pieces / batch_size)


def through(steps_small: float, steps_large: float) -> Law:
    """The law that needs these steps at the two batch sizes of ``FITTED``."""
    small, large = FITTED
    slope = (steps_small - steps_large) / (1 / small - 1 / large)  # S_min N
    least = steps_large - slope / large
    return Law(least, slope / least)


def _laws() -> tuple[Law, Law, Law]:
    """From the stored seeds' mean, and from both ends of the 95% interval of one more seed."""
    stored = labs.LAMB.stored()
    small, large = (Interval.of(stored[f"AdamW, batch {size}"], ratios=False) for size in FITTED)
    ends = ((small.run_low, large.run_low), (small.run_high, large.run_high))
    return through(small.mean, large.mean), through(*ends[0]), through(*ends[1])


def law() -> Law:
    """The law of the stored seeds' mean, trained by AdamW."""
    return _laws()[0]


def predict(base: Account | None = None, *, batch_size: int) -> Account:
    """Steps and letters of one training at a batch size, from the law.

    The band is where one more seed may lie, in 95%, if the law holds. ``base`` is what a slider gives, and not used.
    """
    mean, low, high = (law.steps(batch_size) for law in _laws())
    source = f"S_min (1 + N / B), fitted at {FITTED[0]} and {FITTED[1]} pieces"
    inside = FITTED[0] <= batch_size <= FITTED[1]
    return _account(mean, batch_size, source, basis="derived", low=low, high=high, in_range=inside)


def measure(progress: Callable[[int, int], Any] | None = None, *, batch_size: int, seed: int = LIVE) -> Account:
    """One training at a batch size, run now; every fifth step looks whether its loss is low enough."""
    start = language.optimizing("AdamW", batch_size=batch_size)
    runs = meter.to_target(start, TARGET, seeds=(seed,), every=5).runs
    return _account(runs["num_steps"].sum(), batch_size, "the run")


def _account(
    steps: float, batch_size: int, source: str, basis: str = "measured", low: float | None = None,
    high: float | None = None, in_range: bool = True,
) -> Account:  # fmt: skip
    """Steps, and the letters that they read."""
    made = []
    for title, unit, of_step in ((_TITLE, "steps", 1), ("Letters read", "letters", batch_size * language.LENGTH)):
        band = {} if low is None or high is None else {"low": round(low * of_step), "high": round(high * of_step)}
        total = round(steps) * of_step
        made.append(
            Account.of(
                title, unit, {unit: total}, total=total, source=source, basis=basis, in_range=in_range,
                setting={"batch_size": batch_size}, **band,
            )
        )  # fmt: skip
    return made[0].with_companions(made[1])


def whatif(base: Account) -> WhatIf:
    """A slider over the batch size, predicted by the law, and a button that trains at it."""
    knob = Slider("batch_size", "Batch [pieces]", 4, 64, 4, "Pieces of 32 letters in one step", rest=FITTED[0])
    return WhatIf(base, predict, [knob], measure)
