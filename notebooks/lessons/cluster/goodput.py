"""C4 (arXiv 2406.04594): the time that failures cost a training job, and flows that collide when paths are hashed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from effkit import Account

DAY_S = 86_400
_PARTS = ("detecting", "isolating", "restarting", "lost work")
# Error-induced downtime of a job, of all its time, before C4D and with it. Only the totals, 31.19% and 1.16%, have a
# source: pages about the paper. How they divide into parts is assumed; it was not found in any source.
DOWNTIME_FRAC: Mapping[str, tuple[float, float]] = {
    "detecting": (0.0341, 0.0005),
    "isolating": (0.1965, 0.0073),
    "restarting": (0.0060, 0.0015),
    "lost work": (0.0753, 0.0023),
}


@dataclass(frozen=True)
class Failures:
    """How often a job fails, and what one failure takes.

    Attributes
    ----------
    per_day
        Failures of the whole job per day.
    detect_s
        Until somebody knows: the time-out of a watchdog, or a look at the collectives.
    isolate_s
        Until the faulty node is found and taken out.
    restart_s
        Until the job runs again.
    checkpoint_s
        Between two checkpoints; half of it is lost work on average.
    """

    per_day: float
    detect_s: float
    isolate_s: float
    restart_s: float
    checkpoint_s: float

    def __post_init__(self) -> None:
        if min(asdict(self).values()) < 0:
            raise ValueError(f"rates and times are at least 0; given: {asdict(self)}")


# All assumed, and chosen so that the parts come near those above: 40 failures a month, a watchdog of half an hour,
# hours of searching by hand.
BEFORE = Failures(per_day=4 / 3, detect_s=1800, isolate_s=10_800, restart_s=600, checkpoint_s=9000)
AFTER = Failures(per_day=4 / 3, detect_s=30, isolate_s=300, restart_s=180, checkpoint_s=600)


def downtime(failures: Failures, title: str = "Lost to failures per day") -> Account:
    """What failures take of a day [ns]: failures/day x (detect + isolate + restart + half of a checkpoint interval).

    Raises
    ------
    ValueError
        When more than a day is lost per day: the job makes no progress.
    """
    seconds = (failures.detect_s, failures.isolate_s, failures.restart_s, failures.checkpoint_s / 2)
    rows = {part: round(1e9 * failures.per_day * one) for part, one in zip(_PARTS, seconds, strict=True)}
    if sum(rows.values()) > 1e9 * DAY_S:
        raise ValueError(
            f"failures take {sum(rows.values()) / 1e9 / 3600:.0f} hours of a day: the job makes no progress"
        )
    total = round(1e9 * failures.per_day * sum(seconds))
    return Account.of(title, "ns", rows, total=total, source="failures/day x time of one", basis="assumed")


def goodput(failures: Failures) -> float:
    """The fraction of time in which the job gets on."""
    return 1 - downtime(failures).total / (1e9 * DAY_S)


def levers(before: Failures = BEFORE, after: Failures = AFTER) -> pd.DataFrame:
    """What each improvement is worth alone, and all together.

    Returns
    -------
    DataFrame
        Indexed by ``lever``: ``goodput_frac``; ``saved_frac``, of all time; ``cut_frac``, of the downtime before.
    """
    changes: dict[str, Failures] = {"as it was": before}
    names = {"detecting": "detect_s", "isolating": "isolate_s", "restarting": "restart_s", "lost work": "checkpoint_s"}
    for part, name in names.items():
        changes[f"{part} alone"] = replace(before, **{name: getattr(after, name)})
    changes["all of it"] = replace(after, per_day=before.per_day)
    table = pd.DataFrame({"goodput_frac": {name: goodput(one) for name, one in changes.items()}}).rename_axis("lever")
    table["saved_frac"] = table["goodput_frac"] - table["goodput_frac"].iloc[0]
    table["cut_frac"] = table["saved_frac"] / (1 - table["goodput_frac"].iloc[0])
    return table


def published() -> pd.DataFrame:
    """Downtime before and after as fractions of all time: the total is published (second-hand), its parts are assumed.

    Indexed by ``part``: ``before_frac``, ``after_frac``.
    """
    table = pd.DataFrame.from_dict(DOWNTIME_FRAC, orient="index", columns=["before_frac", "after_frac"])
    table.loc["total"] = table.sum()
    return table.rename_axis("part")


def most_loaded(num_flows: int, num_links: int) -> float:
    """Expected flows on the fullest link when each flow is hashed to one of the links, all alike.

    P(no link has more than k) is n! / mⁿ times the coefficient of xⁿ in (1 + x + ... + xᵏ / k!)ᵐ: the ways to deal n
    flows to m links with at most k each. The expectation is the sum over k of the chance that some link has more.
    It is computed with Poisson's chances of mean n / m in place of 1 / k!, since factorials would overflow: Poisson
    numbers, given their sum, are dealt alike.

    Raises
    ------
    ValueError
        When a number is less than 1.
    """
    if num_flows < 1 or num_links < 1:
        raise ValueError(f"{num_flows} flows on {num_links} links, expected at least 1 of each")
    chances = _poisson(num_flows, num_flows / num_links)
    all_of_them = _poisson(num_flows, num_flows)[num_flows]
    expected = 0.0
    for most in range(num_flows):
        ways = np.ones(1)
        for _ in range(num_links):
            ways = np.convolve(ways, chances[: most + 1])[: num_flows + 1]
        within = ways[num_flows] / all_of_them if len(ways) > num_flows else 0.0
        expected += 1 - min(1.0, float(within))
    return expected


def _poisson(most: int, mean: float) -> np.ndarray:
    """Chances of 0, 1, ..., most events."""
    return np.array([math.exp(j * math.log(mean) - mean - math.lgamma(j + 1)) for j in range(most + 1)])


def hashed(num_flows: int, num_links: int, *, num_trials: int = 2000, seed: int = 0) -> float:
    """The same, simulated: mean over trials of the largest number of flows on a link."""
    links = np.random.default_rng(seed).integers(num_links, size=(num_trials, num_flows))
    counts = (links[:, :, None] == np.arange(num_links)).sum(axis=1)
    return float(counts.max(axis=1).mean())


def collisions(num_links: int, flows: Sequence[int], *, seed: int = 0) -> pd.DataFrame:
    """How much longer hashed flows take than planned ones, which share links evenly.

    Returns
    -------
    DataFrame
        Indexed by ``flows``: ``simulated`` and ``formula`` [flows on the fullest link], ``planned``, and
        ``times_longer``, formula over planned.
    """
    rows = {num: {"simulated": hashed(num, num_links, seed=seed), "formula": most_loaded(num, num_links),
                  "planned": math.ceil(num / num_links)} for num in flows}  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("flows")
    table["times_longer"] = table["formula"] / table["planned"]
    return table
