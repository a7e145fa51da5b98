"""Error, noise, range and band: how far a prediction may be off, and where it was calibrated.

``error``: how wrong the model was on runs that its fit did not see (:func:`rms` of errors left out in turn). ``noise``:
how far repeats of one run lay apart (:func:`noise`). ``range``: the hull of what was run (:class:`Hull`) and its
regimes. ``band``: two standard errors of error and noise (:class:`Trust`); wider beyond the range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.account import Account

SPREAD = 2.0  # a band is two standard errors wide on each side
# In a regime that no run has seen, a band is so many times as wide, and at least this: a convention, for nothing was
# measured there
_UNSEEN, _LEAST_UNSEEN_FRAC = 3.0, 0.3
_CLEARLY = 0.95  # of a band, or less: what more repeats must make of it to be worth their time
_ROOM = 1.05  # a size so many times beyond what was run is the same size: batches of an epoch are not equally long
# A median's standard error over that of a mean, of repeats that scatter as a normal does
OF_A_MEDIAN = math.sqrt(math.pi / 2)
_OF_DIFFERENCES = 1.4826 / math.sqrt(2)  # a normal's standard deviation over the median distance of two draws


@dataclass(frozen=True)
class Trust:
    """How far a lab's predictions can be trusted.

    ``error_frac`` is the error of the model on runs that were left out of its fit, as a fraction of the time;
    ``noise_frac``, how far repeats of one run lie apart (:func:`noise`); ``num_repeats``, the repeats that a figure is
    the median of; ``least_frac``, what the band's half-width is at least.
    """

    error_frac: float
    noise_frac: float = 0.0
    num_repeats: float = 1.0
    least_frac: float = 0.0

    @property
    def band_frac(self) -> float:
        """Half-width of the band. Error, and the noise of the figure that it is held against, do not know of each
        other: their squares add."""
        noise_of_figure = OF_A_MEDIAN * self.noise_frac / math.sqrt(self.num_repeats)
        return max(self.least_frac, SPREAD * math.hypot(self.error_frac, noise_of_figure))

    def shrinks(self, num_repeats: float) -> bool:
        """Whether so many repeats in place of these would make the band clearly narrower."""
        return replace(self, num_repeats=num_repeats).band_frac < _CLEARLY * self.band_frac

    def beyond(self, doublings: float, seen: bool = True) -> float:
        """Half-width of the band outside the range: so many doublings beyond the sizes that were run, or in a regime
        that no run has seen."""
        wider = self.band_frac * (1.0 + doublings)
        return wider if seen else max(_LEAST_UNSEEN_FRAC, _UNSEEN * wider)


@dataclass(frozen=True)
class Hull:
    """The sizes that a calibration ran: lowest and highest of each quantity, ``low`` and ``high``.

    A size counts as covered up to ``room`` times the highest, and down to the lowest over it.
    """

    low: Mapping[str, float]
    high: Mapping[str, float]
    room: float = _ROOM

    @classmethod
    def of(cls, runs: Iterable[Mapping[str, float]], room: float = _ROOM) -> Hull:
        """Around the sizes of these runs, which all name the same quantities."""
        runs = list(runs)
        names = runs[0].keys()
        return cls(
            {name: min(run[name] for run in runs) for name in names},
            {name: max(run[name] for run in runs) for name in names}, room,
        )  # fmt: skip

    def covers(self, sizes: Mapping[str, float]) -> bool:
        """Whether each of these sizes lies within what was run."""
        return self.doublings(sizes) == 0

    def doublings(self, sizes: Mapping[str, float]) -> float:
        """By how many doublings, or halvings, the size farthest outside lies beyond what was run; 0 within."""
        return max((self._doublings(name, size) for name, size in sizes.items()), default=0.0)

    def _doublings(self, name: str, size: float) -> float:
        low, high = self.low[name], self.high[name]
        if low / self.room <= size <= high * self.room:
            return 0.0
        less, more = (size, low) if size < low else (high, size)
        return math.log2(more / less) if less > 0 else 1.0  # from nothing to something


def noise(repeats: Iterable[Sequence[float]]) -> float:
    """How far repeats of one run lie apart: their standard deviation, as a fraction of their median.

    From the distances of successive repeats, pooled over the runs, by their median: a disturbed repeat does not count,
    nor does a machine whose speed drifts. ``repeats`` are of each run the times of its repeats in the order they were
    run; a run with one says nothing. 0 of none.
    """
    distances = [np.abs(np.diff(times)) / np.median(times) for times in repeats if len(times) > 1]
    return _OF_DIFFERENCES * float(np.median(np.concatenate(distances))) if distances else 0.0


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
