"""A mini-lab: one training per arm from a seed. A cell runs one seed; `data/record.py minilabs` stores those of others.

What is stored is never shown without its date and machine, and never in the place of what a cell has computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import pandas as pd

from effkit.claims import check
from effkit.claims.table import HOMES
from lessons import meter
from lessons.verdict import shown

PATHS = tuple(home / "data" / "minilabs.csv" for home in HOMES)
COLUMNS = ("lab", "arm", "seed", "figure", "unit", "steps", "date", "machine", "commit")
SEEDS = tuple(range(8))  # that are stored
LIVE = 9  # the seed that cells run: none of them, so that it tests them
# Student's t, two-sided, 95%, by degrees of freedom. Of twenty live seeds one is expected outside of its interval:
# a cell says so where it is.
_T95 = {4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}

Result = TypeVar("Result")


class Arm(NamedTuple):
    """What one training gave: a figure in the lab's unit, and the steps that it took."""

    figure: float
    steps: int


class Interval(NamedTuple):
    """Several seeds in five numbers: their mean, its 95% interval, and the 95% interval of one more seed.

    Of ratios it is the geometric mean, and the intervals are as many times below as above it.
    """

    mean: float
    low: float
    high: float
    run_low: float
    run_high: float

    @classmethod
    def of(cls, values: Iterable[float], *, ratios: bool) -> Interval:
        """By Student's t. ValueError for fewer than 5 seeds or more than 8."""
        numbers = np.array(list(values), float)
        freedom = len(numbers) - 1
        if freedom not in _T95:
            raise ValueError(f"{len(numbers)} seeds, expected {min(_T95) + 1} to {max(_T95) + 1}")
        numbers = np.log(numbers) if ratios else numbers
        mean, deviation = numbers.mean(), numbers.std(ddof=1)
        half = _T95[freedom] * deviation / math.sqrt(len(numbers))
        one = _T95[freedom] * deviation * math.sqrt(1 + 1 / len(numbers))
        ends = np.array([mean, mean - half, mean + half, mean - one, mean + one])
        return cls(*(np.exp(ends) if ratios else ends).tolist())


@dataclass(frozen=True, eq=False)
class MiniLab(Generic[Result]):
    """One comparison of the lessons.

    Attributes
    ----------
    name
        Of the lab in ``data/minilabs.csv``.
    figure, unit
        What is stored of each arm, in words, and its unit.
    run
        From a seed to whatever the cell shows.
    arms
        From that to each arm's figure.
    claims
        By paper: the figure of its row, from the figures of all arms of one seed, or from columns of them.
    clocked
        Whether figures are times: then another processor gives others, and stored seeds are spread over conditions.
    """

    name: str
    figure: str
    unit: str
    run: Callable[[int], Result]
    arms: Callable[[Result], Mapping[str, Arm]]
    claims: Mapping[str, Callable[..., Any]]
    clocked: bool = False

    def live(self) -> Result:
        """The seed of the cells, run now."""
        return self.run(LIVE)

    def claim(self, paper: str, result: Result) -> float:
        """The figure of a paper's row from one result."""
        return float(self.claims[paper]({name: arm.figure for name, arm in self.arms(result).items()}))

    def stored(self) -> pd.DataFrame:
        """The stored figures: a column per arm, indexed by ``seed``."""
        rows = stored_rows()
        own = rows[rows["lab"] == self.name]
        if own.empty:
            raise ValueError(f"no run of {self.name!r} is stored: python data/record.py minilabs {self.name!r}")
        return own.pivot(index="seed", columns="arm", values="figure")[list(dict.fromkeys(own["arm"]))]

    def interval(self, paper: str, *, ratios: bool = True) -> Interval:
        """Of a row's figure over the stored seeds."""
        return Interval.of(self.claims[paper](self.stored()), ratios=ratios)

    def beside(self, result: Result) -> str:
        """Of each arm the mean of the stored seeds and its 95% interval, and this run's figure; to be printed."""
        stored, arms = self.stored(), self.arms(result)
        wide = max(map(len, arms))
        lines = [f"{self.figure}; stored: seeds {stored.index.min()} to {stored.index.max()} ({self.stored_where})"]
        for name, arm in arms.items():
            mean, low, high, *_ = (shown(value, self.unit) for value in Interval.of(stored[name], ratios=False))
            live = shown(arm.figure, self.unit)
            lines.append(f"  {name:{wide}}  stored {mean}, 95% interval {low} to {high}; live, seed {LIVE}: ≈{live}")
        return "\n".join(lines)

    def row(self, paper: str, result: Result | None = None) -> str:
        """A paper's row of the page, run now unless a result is given: each arm beside the stored seeds, then what it
        means; to be printed."""
        result = self.live() if result is None else result
        return f"{self.beside(result)}\n{check(paper, self.claim(paper, result))}\n"

    @property
    def stored_where(self) -> str:
        """Date and machine of the stored runs."""
        return ", ".join(stored_on(self.name))


def ratio(more: str, less: str) -> Callable[[Any], Any]:
    """One arm's figure over another's, of one seed or of a table of seeds."""
    return lambda arms: arms[more] / arms[less]


def to_target(
    name: str,
    figure: str,
    starts: Callable[[], Mapping[str, Callable[[int], Any]]],
    target: float,
    claims: Mapping[str, tuple[str, str]],
    *,
    by: str = "num_steps",
    every: int = 5,
    max_steps: int = 400,
    without: Mapping[str, tuple[str, str]] | None = None,
) -> MiniLab[dict[str, meter.ToTarget]]:
    """A mini-lab of trainings that the meter drives to a target.

    Parameters
    ----------
    starts
        Makes each arm's start for the meter.
    target, every, max_steps
        As of :func:`lessons.meter.to_target`.
    claims
        By paper: the arm that takes more, and the one that takes less.
    by
        What is stored: a column of the meter's ``runs``.
    without
        More arms: another's figure without one of its phases.
    """

    def run(seed: int) -> dict[str, meter.ToTarget]:
        return {
            arm: meter.to_target(start, target, seeds=(seed,), every=every, max_steps=max_steps)
            for arm, start in starts().items()
        }

    def arms(ways: Mapping[str, meter.ToTarget]) -> dict[str, Arm]:
        runs = {arm: way.runs.droplevel("seed") for arm, way in ways.items()}
        for arm, (of, phase) in (without or {}).items():
            runs[arm] = runs[of].drop(phase)
        return {arm: Arm(float(rows[by].sum()), int(rows["num_steps"].sum())) for arm, rows in runs.items()}

    unit = {"num_steps": "steps", "flops": "FLOPs", "num_tokens": "tokens"}[by]
    return MiniLab(name, figure, unit, run, arms, {paper: ratio(*both) for paper, both in claims.items()})


def stored_on(name: str) -> tuple[str, str]:
    """Date of a lab's first stored run, and the machine: with its condition, or with how many there were."""
    own = stored_rows().query("lab == @name")
    machines = own["machine"].unique()
    device = machines[0].rpartition(", ")[0]
    return own["date"].iloc[0], machines[0] if len(machines) == 1 else f"{device}, {len(machines)} conditions"


@cache
def stored_rows() -> pd.DataFrame:
    """All of ``data/minilabs.csv``. FileNotFoundError when the lessons were copied without it."""
    path = next((path for path in PATHS if path.exists()), None)
    if path is None:
        raise FileNotFoundError(f"no runs are stored (expected {' or '.join(map(str, PATHS))}): restore it from git")
    return pd.read_csv(path, dtype={"commit": str})
