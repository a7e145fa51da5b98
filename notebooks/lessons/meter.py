"""Time to target: the steps, seconds, FLOPs and tokens that a training takes until its held-out loss is low enough."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from effkit import Account
from lessons import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COUNTS = ("num_steps", "dur_ns", "flops", "num_tokens")
_TITLES = {"num_steps": ("Steps to the target", "steps"), "dur_ns": ("Time to the target", "ns"),
           "flops": ("FLOPs to the target", "FLOPs"), "num_tokens": ("Tokens to the target", "tokens")}  # fmt: skip


class Training(Protocol):
    """One training from scratch that the meter drives.

    ``phase`` names what the next step is of (``"warm-up"``, ``"with SVD"``): it gets a row of its own, and steps of one
    phase cost the same. ``num_tokens`` is what the next step reads.
    """

    phase: str
    num_tokens: int

    def step(self) -> None:
        """Take one step."""

    def loss(self) -> float:
        """The loss on held-out data; its cost is not counted."""


@dataclass(frozen=True, eq=False)
class ToTarget:
    """What it took, seed by seed.

    Attributes
    ----------
    runs
        Indexed by ``seed`` and ``phase``: ``num_steps, dur_ns, flops, num_tokens``. Times are the median step of a
        phase times its steps, so that one busy moment counts little; FLOPs are those of products, counted by torch.
    curves
        Held-out loss, a column per seed, indexed by ``step``.
    reached
        Per seed, whether the target was reached; where it was not, the counts are of the whole attempt.
    """

    runs: pd.DataFrame
    curves: pd.DataFrame
    reached: pd.Series[bool]

    def totals(self) -> pd.DataFrame:
        """All phases together: a row per seed."""
        return self.runs.groupby("seed").sum()

    def account(self, by: str = "flops") -> Account:
        """The median seed's way, phase by phase; ``by`` is a column of ``runs``. The other counts are companions."""
        totals = self.totals()
        seed = (totals["num_steps"] - totals["num_steps"].median()).abs().idxmin()
        rows = self.runs.loc[seed]
        made = {
            name: Account.of(
                title, unit, rows[name].to_dict(), total=int(totals.loc[seed, name]), source=f"the run of seed {seed}"
            )
            for name, (title, unit) in _TITLES.items()
        }
        return made[by].with_companions(*(made[name] for name in COUNTS if name != by))


def to_target(
    start: Callable[[int], Training],
    target: float,
    *,
    seeds: Sequence[int] = (0, 1, 2),
    every: int = 5,
    max_steps: int = 400,
) -> ToTarget:
    """Train until the held-out loss is at most the target.

    Parameters
    ----------
    start
        Makes a training from a seed.
    target
        Loss to reach.
    seeds
        One training each.
    every
        Steps between two looks at the loss.
    max_steps
        After which it is given up.

    Raises
    ------
    ValueError
        When a number is not positive.
    """
    if every < 1 or max_steps < 1 or not seeds:
        raise ValueError(f"every is {every}, max_steps {max_steps}, {len(seeds)} seeds; expected at least 1 of each")
    counts, curves, reached = {}, {}, {}
    for seed in seeds:
        training = start(seed)
        times: dict[str, list[int]] = {}
        flops: dict[str, int] = {}
        steps: dict[str, int] = {}
        tokens: dict[str, int] = {}
        losses = {0: training.loss()}
        for number in range(1, max_steps + 1):
            phase = training.phase
            tokens[phase] = tokens.get(phase, 0) + training.num_tokens
            steps[phase] = steps.get(phase, 0) + 1
            if phase in flops:
                begin = time.perf_counter_ns()
                training.step()
                times.setdefault(phase, []).append(time.perf_counter_ns() - begin)
            else:  # counting slows a step down: this one is not timed
                with FlopCounterMode(display=False) as counter:
                    training.step()
                flops[phase] = counter.get_total_flops()
            if number % every == 0:
                losses[number] = training.loss()
                if losses[number] <= target:
                    break
        reached[seed], curves[seed] = min(losses.values()) <= target, losses
        for phase, number in steps.items():
            typical = float(np.median(times[phase])) if phase in times else np.nan
            counts[seed, phase] = number, round(np.nan_to_num(typical) * number), flops[phase] * number, tokens[phase]
    runs = pd.DataFrame.from_dict(counts, orient="index", columns=list(COUNTS))
    runs.index = pd.MultiIndex.from_tuples(list(counts), names=["seed", "phase"])
    frame = pd.DataFrame(curves).rename_axis("step")
    return ToTarget(runs, frame, pd.Series(reached, name="reached"))


def times_less(less: ToTarget, more: ToTarget, by: str = "num_steps") -> pd.Series[float]:
    """How many times less one takes than another, seed by seed: ``median``, ``low`` and ``high`` over the seeds.

    ``by`` is one of ``num_steps, dur_ns, flops, num_tokens``. Where ``more`` never reached the target: a lower bound.
    """
    ratio = more.totals()[by] / less.totals()[by]
    return pd.Series({"median": ratio.median(), "low": ratio.min(), "high": ratio.max()}, name=by)


def summary(ways: Mapping[str, ToTarget]) -> pd.DataFrame:
    """One row per way: the median over seeds of each count, the spread of the steps, and how many runs arrived."""
    rows = {}
    for name, way in ways.items():
        totals = way.totals()
        rows[name] = {**totals.median().round().astype("int64").to_dict(),
                      "fewest_steps": int(totals["num_steps"].min()), "most_steps": int(totals["num_steps"].max()),
                      "arrived": f"{int(way.reached.sum())} of {len(way.reached)}"}  # fmt: skip
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")


def mean_curves(ways: Mapping[str, ToTarget]) -> pd.DataFrame:
    """Held-out loss over steps, averaged over the seeds that still ran: one column per way, to be drawn."""
    return pd.DataFrame({name: way.curves.mean(axis="columns") for name, way in ways.items()}).rename_axis("step")


def draw(ways: Mapping[str, ToTarget], unit: str, title: str, target: float | None = None) -> Axes:
    """The mean curve of each way, each seed thin beside it, and the target; without the first look, before training.

    That loss is far above all others: with it, what is compared would lie on one line.
    """
    runs = {name: way.curves.iloc[1:] for name, way in ways.items()}
    means = mean_curves(ways).interpolate(limit_area="inside").iloc[1:]
    return drawing.curves(means, unit, title=title, target=target, runs=runs)


def reproducible(seed: int) -> torch.Generator:
    """A generator of that seed, with torch's own set to it too: what a training's ``start`` begins with."""
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)
