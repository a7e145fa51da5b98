"""One slow rank or link, found in the matrix of delays between ranks."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

# Half way, as ratios go, between as quick as the others and twice as slow: either is mistaken by the same factor
THRESHOLD = math.sqrt(2)
_MOST_SLOW_FRAC = 0.25  # of links that can be slow ones: where more are, the links are of two kinds
_FALSE_ALARM_FRAC = 1e-3  # of matrices of pure noise that may raise an alarm
_MEDIAN_VARIANCE = math.pi / 2  # of a median, relative to a mean's, for normal noise
_TO_SIGMA = 1.4826  # from the median absolute deviation to a normal's standard deviation
_FEWEST = 6  # cells whose spread may overrule that of the rounds
_EFFICIENCY = 0.37  # of that estimate: as sure as a standard deviation of this many times the values


@dataclass(frozen=True)
class Finding:
    """What is slow.

    ``kind`` is ``"sender"`` (all that the rank sends is late: a row), ``"receiver"`` (all that it is sent: a column),
    ``"rank"`` (both), ``"link"`` (one cell), or ``"direction"``: between two ranks these cannot be told apart.
    """

    kind: str
    rank: int  # the sender of a link or direction
    peer: int | None  # the receiver of a link or direction
    ratio: float  # its delay over that of the others, > 1
    sentence: str  # the same in words


def find_slow(delays: Any, threshold: float = THRESHOLD) -> Finding | None:
    """The slow rank or link in a matrix of delays, or None: C4 (arXiv 2406.04594, analysis of the delay matrix).

    A row that stands out is a slow sender, a column a slow receiver, both a slow rank, one cell a slow link. Of several
    rounds the median of each cell is taken, in logarithms, so that one late round says nothing. A row stands out when
    the median of its cells exceeds that of the cells with which this rank has nothing to do; a cell, when it exceeds
    the median of the others in its row and column. The excess must reach ``threshold`` and 4.5 times its own standard
    error, from the spread (median absolute deviation) of the other cells and of each cell over the rounds. ValueError
    when the delays are not such an array, hold a time that is not positive, or nothing at all.

    Parameters
    ----------
    delays
        Times [ns] from each sender (row) to each receiver (column), shape [num_ranks, num_ranks] or
        [num_rounds, num_ranks, num_ranks]; NaN where nothing was measured. The diagonal is not looked at. The links
        must be alike: of a cluster, give those within nodes and those between nodes one after the other, the rest NaN.
    threshold
        The least ratio to the others that counts as slow. The default, 2 ** 0.5, is half way between 1 and 2 as ratios
        go. How many rounds it takes depends on their noise: to find what is twice as slow among delays that vary by
        20%, 9 rounds of 8 ranks, 15 of 4, 20 of 3. With fewer there is no alarm, rightly or wrongly.

    Returns
    -------
    Finding or None
        The slowest thing, if any is; None too where more than a quarter of the links stand out: they are of two kinds.

    Examples
    --------
    >>> find_slow([[0, 1, 1, 1], [3, 0, 3, 3], [1, 1, 0, 1], [1, 1, 1, 0]]).sentence
    'rank 1 is slow as a sender: what it sends takes 3.0 times as long as between the others'
    """
    logs = _checked(delays, threshold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # cells that are NaN in all rounds
        cells = np.nanmedian(logs, axis=0)
    num, least, noise = len(cells), math.log(threshold), _noise_of_rounds(logs, cells)
    if num == 2:
        return _of_two(cells, least, noise)
    rows = [_row(cells, rank, least, noise) for rank in range(num)]
    columns = [_row(cells.T, rank, least, noise) for rank in range(num)]
    best = max(range(num), key=lambda rank: max(rows[rank], columns[rank]))
    sends, receives = rows[best], columns[best]
    if sends > 0 and receives > 0:
        return _finding("rank", best, None, math.exp((sends + receives) / 2))
    if sends > 0 or receives > 0:
        return _finding("sender" if sends > 0 else "receiver", best, None, math.exp(max(sends, receives)))
    return _slowest_link(cells, least, noise)


class _Noise(NamedTuple):
    """A standard deviation (of logarithms), and from how many independent values it seems to come."""

    sigma: float
    freedom: float


def _checked(delays: Any, threshold: float) -> Array:
    """Logarithms of the delays, [num_rounds, num_ranks, num_ranks], NaN on the diagonals."""
    form = "[num_ranks, num_ranks] or [num_rounds, num_ranks, num_ranks]"
    try:
        times = np.array(delays, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"delays are times in ns in an array {form}; given: {type(delays).__name__}") from error
    if times.ndim not in (2, 3) or times.shape[-1] != times.shape[-2] or times.shape[-1] < 2 or not times.size:
        raise ValueError(f"delays are an array {form}, of two ranks or more; given: shape {list(times.shape)}")
    if not threshold > 1:
        raise ValueError(f"threshold is a ratio above 1, as in “1.4 times as slow as the others”; given: {threshold}")
    times = times if times.ndim == 3 else times[None]
    times[:, np.eye(times.shape[-1], dtype=bool)] = np.nan
    measured = times[~np.isnan(times)]
    if not len(measured):
        raise ValueError("no delay between two ranks was measured: all cells off the diagonal are NaN")
    if not ((measured > 0) & np.isfinite(measured)).all():
        raise ValueError("delays are positive times in ns, and NaN where nothing was measured")
    return np.log(times)


def _median(values: Array) -> float:
    """The lower one of two: half of a row's cells being late does not make the row late."""
    return float(np.sort(values)[(len(values) - 1) // 2])


def _spread(values: Array) -> _Noise:
    return _Noise(_TO_SIGMA * float(np.median(np.abs(values - np.median(values)))), _EFFICIENCY * (len(values) - 1))


def _noise_of_rounds(logs: Array, cells: Array) -> _Noise:
    """Of a cell's median, from how its rounds scatter; nothing where there is one round."""
    num_rounds = (~np.isnan(logs)).sum(axis=0)
    often = num_rounds >= 2
    if not often.any():
        return _Noise(0.0, 0.0)
    apart = np.abs((logs - cells)[:, often])
    apart = apart[apart > 0]  # of an odd number of rounds one is the median itself
    num = float(np.median(num_rounds[often]))
    sigma = _TO_SIGMA * float(np.median(apart)) * math.sqrt(num / (num - 1)) if len(apart) else 0.0
    freedom = _EFFICIENCY * float((num_rounds[often] - 1).sum())
    return _Noise(sigma * math.sqrt(_MEDIAN_VARIANCE / num), freedom)


def _clear(excess: float, noise: tuple[_Noise, _Noise], variance: float, num_tried: int) -> bool:
    """Whether noise alone, of ``variance`` times its square, would hardly bring one of ``num_tried`` so far."""
    of_rounds, of_cells = noise
    # few cells say little of the noise: where rounds do, only links that are plainly unlike one another add to it
    unlike = of_cells.freedom >= _EFFICIENCY * (_FEWEST - 1) and of_cells.sigma > 2 * of_rounds.sigma
    sigma = of_cells.sigma if unlike or not of_rounds.freedom else of_rounds.sigma
    freedom = of_rounds.freedom or of_cells.freedom
    if not freedom:
        return True
    z = NormalDist().inv_cdf(1 - _FALSE_ALARM_FRAC / num_tried)
    quantile = z + (z**3 + z) / (4 * freedom)  # Student's, the first term of its expansion
    return excess >= quantile * sigma * math.sqrt(variance)


def _row(cells: Array, rank: int, least: float, noise: _Noise) -> float:
    """By how much a rank's row clearly exceeds what the others do among themselves (logarithm); else -inf."""
    own = cells[rank][~np.isnan(cells[rank])]
    apart = np.delete(np.delete(cells, rank, 0), rank, 1)
    others = apart[~np.isnan(apart)]
    if len(own) < 2 or not len(others):  # one cell of a row may as well be one of a column, or just a link
        return -math.inf
    excess = _median(own) - float(np.median(others))
    variance = _MEDIAN_VARIANCE * (1 / len(own) + 1 / len(others))
    clear = excess >= least and _clear(excess, (noise, _spread(others)), variance, 2 * len(cells))
    return excess if clear else -math.inf


def _slowest_link(cells: Array, least: float, noise: _Noise) -> Finding | None:
    links = np.argwhere(~np.isnan(cells)).tolist()
    slow = []
    for sender, receiver in links if len(links) > 1 else []:
        others = cells.copy()
        others[sender, receiver] = np.nan
        near = np.concatenate([others[sender], others[:, receiver]])
        near, everywhere = near[~np.isnan(near)], others[~np.isnan(others)]
        near = near if len(near) > 1 else everywhere
        excess = float(cells[sender, receiver] - np.median(near))
        variance = 1 + _MEDIAN_VARIANCE / len(near)
        if excess >= least and _clear(excess, (noise, _spread(everywhere)), variance, len(links)):
            slow.append((excess, sender, receiver))
    if not slow or len(slow) > max(1, _MOST_SLOW_FRAC * len(links)):
        return None
    excess, sender, receiver = max(slow)
    return _finding("link", sender, receiver, math.exp(excess))


def _of_two(cells: Array, least: float, noise: _Noise) -> Finding | None:
    excess = float(cells[0, 1] - cells[1, 0])
    if math.isnan(excess) or abs(excess) < least or not _clear(abs(excess), (noise, _Noise(0.0, 0.0)), 2.0, 2):
        return None
    sender = 0 if excess > 0 else 1
    return _finding("direction", sender, 1 - sender, math.exp(abs(excess)))


def _finding(kind: str, rank: int, peer: int | None, ratio: float) -> Finding:
    times = f"{ratio:.1f} times as long as"
    sentence = {
        "sender": f"rank {rank} is slow as a sender: what it sends takes {times} between the others",
        "receiver": f"rank {rank} is slow as a receiver: what it is sent takes {times} between the others",
        "rank": f"rank {rank} is slow: what it sends and what it is sent takes {times} between the others",
        "link": f"the link from rank {rank} to rank {peer} is slow: it takes {times} the others of these two ranks",
        "direction": f"from rank {rank} to rank {peer} it takes {times} back; between two ranks a slow sender, a slow "
        "receiver and a slow link look the same: measure with a third",
    }[kind]
    return Finding(kind, rank, peer, ratio, sentence)
