"""Error, noise, range and band: how far a prediction may be off, and where it was calibrated.

``error``: how wrong the model was on runs that its fit did not see. ``noise``: how far repeats of one run lay apart.
``range``: the hull of what was run. ``band``: two standard errors of error and noise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.account import Account

SPREAD = 2.0  # a band is two standard errors wide on each side


@dataclass(frozen=True)
class Trust:
    """How far a lab's predictions can be trusted.

    Attributes
    ----------
    error_frac
        Error of the model, as a fraction of the time.
    noise_frac
        Distance of repeats of one run, as a fraction.
    least_error_frac, least_noise_frac, least_frac
        What error, noise and the band's half-width are at least: few runs can agree by chance.
    """

    error_frac: float
    noise_frac: float = 0.0
    least_error_frac: float = 0.0
    least_noise_frac: float = 0.0
    least_frac: float = 0.0

    @property
    def band_frac(self) -> float:
        """Half-width of the band: error and noise do not know of each other, so their squares add."""
        error, noise = max(self.error_frac, self.least_error_frac), max(self.noise_frac, self.least_noise_frac)
        return max(self.least_frac, SPREAD * math.hypot(error, noise))


@dataclass(frozen=True)
class Hull:
    """The sizes that a calibration ran: lowest and highest of each quantity.

    Attributes
    ----------
    low, high
        Quantity -> value.
    room
        A size counts as covered up to so many times the highest, and down to the lowest over it.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    room: float = 1.0

    @classmethod
    def of(cls, runs: Iterable[Mapping[str, float]], room: float = 1.0) -> Hull:
        """Around the sizes of these runs, which all name the same quantities."""
        runs = list(runs)
        names = runs[0].keys()
        return cls(
            {name: min(run[name] for run in runs) for name in names},
            {name: max(run[name] for run in runs) for name in names}, room,
        )  # fmt: skip

    def covers(self, sizes: Mapping[str, float]) -> bool:
        """Whether each of these sizes lies within what was run."""
        return all(self.low[name] / self.room <= size <= self.high[name] * self.room for name, size in sizes.items())


def rms(errors: Any) -> float:
    """Root mean square; 0 of none."""
    return float(np.sqrt(np.mean(np.square(errors)))) if len(errors) else 0.0


def interval(total: int, half_width: float) -> dict[str, Any]:
    """``low`` and ``high`` of a band around a total that cannot be negative, rounded outwards."""
    margin = math.ceil(half_width)
    return {"low": max(0, total - margin), "high": total + margin}


def banded(account: Account, band_frac: float) -> Account:
    """The account with a band of this half-width, a fraction of its total."""
    return replace(account, **interval(account.total, band_frac * account.total))
