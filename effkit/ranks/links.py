"""What the links between ranks cost: an alpha and a bandwidth of each collective, from live ones."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.distributed as dist

from effkit.arguments import checked_whole
from effkit.device import synchronize
from effkit.lab import Hull, Progress, Trust, noise, rms
from effkit.least_squares import Floats, nonnegative
from effkit.progress_bar import working
from effkit.ranks.group import joined
from effkit.ranks.launching import Ranks
from effkit.units import readable

ALL_TO_ALL, ALL_REDUCE = "all-to-all", "all-reduce"
# of each kind, on a flat tensor with a part for each rank, and one like it
COLLECTIVES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    ALL_TO_ALL: lambda out, back: dist.all_to_all_single(back, out),
    ALL_REDUCE: lambda out, back: dist.all_reduce(out),
    "all-gather": lambda out, back: dist.all_gather_into_tensor(back, out[: len(out) // dist.get_world_size()]),
    "reduce-scatter": lambda out, back: dist.reduce_scatter_tensor(back[: len(out) // dist.get_world_size()], out),
    "broadcast": lambda out, back: dist.broadcast(out, 0),
}
_SIZES = tuple(2**power for power in range(10, 23))  # bytes to each other rank
_SMALL_SIZES = _SIZES[:7]  # they scatter more, and cost less to repeat
_FEWEST = 3  # sizes in a regime: one may be left out and a line is left
_NEAR = 5  # neighbouring sizes, itself among them
_CLEARLY_BETTER = 0.8  # two lines must leave this much of one line's error, or less


class Regime(NamedTuple):
    """Messages up to ``most_bytes`` take ``alpha_ns + num_messages * size_bytes / bandwidth_bytes_per_s``."""

    most_bytes: float
    alpha_ns: float
    bandwidth_bytes_per_s: float


class Duration(NamedTuple):
    """A time with its band [ns]; ``in_range``: whether such messages were measured."""

    dur_ns: float
    low_ns: float
    high_ns: float
    in_range: bool


@dataclass(frozen=True, eq=False)
class Link:
    """What a collective takes: ``alpha + bytes that cross / bandwidth`` (Hockney's model).

    Attributes
    ----------
    kind
        One of :data:`COLLECTIVES`. Of all but an all-to-all a message is a whole tensor's part for one rank, as a ring
        sends it; in an all-reduce it crosses twice.
    num_ranks, ranks_per_node
        Between whom.
    nominal_bytes_per_s
        The rate that the link was limited to; 0: it was not.
    num_messages
        Messages of one collective that are counted as crossing. On a limited link those between different nodes, both
        ways, for they share one trunk: ``num_ranks * (num_ranks - ranks_per_node)``. Without a limit all that go from
        one rank to another, though the cores copy several at a time: the bandwidth is then that of the machine.
    regimes
        One line, or one for small and one for large messages where two leave clearly less error.
    frame
        Indexed by ``size_bytes`` (to each other rank): ``dur_ns`` from the first rank's arrival to the last one's
        departure, the lower quartile of the repeats, for what else runs on the machine only adds; ``fitted_ns``;
        ``held_out_ns`` and ``held_out_error``, of a fit that had not seen this size (NaN for the smallest and the
        largest, which would be extrapolated); ``spread_frac``, how far the repeats lie apart
        (:func:`effkit.lab.noise`).
    error_frac
        Root mean square of the held-out errors.
    noise_frac
        How far repeats lie apart, of all sizes; divided, for the time is one of many.
    """

    num_ranks: int
    ranks_per_node: int
    nominal_bytes_per_s: float
    num_messages: int
    regimes: tuple[Regime, ...]
    frame: pd.DataFrame
    error_frac: float
    noise_frac: float = 0.0
    kind: str = ALL_TO_ALL

    @property
    def alpha_ns(self) -> float:
        """Of small messages."""
        return self.regimes[0].alpha_ns

    @property
    def bandwidth_bytes_per_s(self) -> float:
        """Of large messages."""
        return self.regimes[-1].bandwidth_bytes_per_s

    @property
    def shaped(self) -> bool:
        """Whether the link was limited to a rate."""
        return self.nominal_bytes_per_s > 0

    @property
    def between(self) -> dict[str, Any]:
        """How other ranks are connected alike: keywords of :class:`effkit.ranks.launching.Ranks`."""
        return {"link_bytes_per_s": self.nominal_bytes_per_s, "ranks_per_node": self.ranks_per_node * self.shaped}

    def doublings(self, size_bytes: float) -> float:
        """How far a message lies beyond those that were measured; 0 among them."""
        return Hull.of({"size_bytes": size} for size in self.frame.index).doublings({"size_bytes": size_bytes})

    def dur_ns(self, size_bytes: float) -> Duration:
        """One collective with messages of ``size_bytes``, within two standard errors, and more beyond the sizes that
        were measured; ValueError for a negative size."""
        if not size_bytes >= 0:
            raise ValueError(f"size_bytes is the size of one message, 0 or more; given: {size_bytes}")
        dur_ns, doublings = _at(self.regimes, size_bytes, self.num_messages), self.doublings(size_bytes)
        margin = Trust(self.error_frac, self.noise_frac).beyond(doublings) * dur_ns
        return Duration(dur_ns, max(0.0, dur_ns - margin), dur_ns + margin, doublings == 0)

    def __repr__(self) -> str:
        where = f"{'An' if self.kind.startswith('a') else 'A'} {self.kind} of {self.num_ranks} ranks "
        if self.shaped:
            apart = "each on a node of its own" if self.ranks_per_node == 1 else f"{self.ranks_per_node} on a node"
            where += f"({apart}), through one trunk limited to {self.nominal_bytes_per_s / 1e6:,.0f} MB/s"
        else:
            where += "on this machine's loopback, not limited"
        lines = [f"{where}:"]
        of = "all" if len(self.regimes) == 1 else f"up to {readable(self.regimes[0].most_bytes, 'bytes')}"
        for regime in self.regimes:
            rate = f"{regime.bandwidth_bytes_per_s / 1e6:,.1f} MB/s".replace("inf MB/s", "no time per byte")
            if regime is self.regimes[-1] and self.shaped:
                rate += f", {regime.bandwidth_bytes_per_s / self.nominal_bytes_per_s:.1%} of the limit"
            lines.append(f"  {of} messages: {readable(regime.alpha_ns, 'ns')} and {rate}")
            of = "larger"
        first, last = (readable(size, "bytes") for size in (self.frame.index[0], self.frame.index[-1]))
        lines.append(f"  {self.num_messages} messages of {first} to {last} cross each time; held-out error "
                     f"{self.error_frac:.1%}")  # fmt: skip
        return "\n".join(lines)


@working("Measuring the links between ranks")
def links(
    num_ranks: int = 2, *, link_bytes_per_s: float = 0.0, ranks_per_node: int = 0, num_repeats: int = 9,
    backend: str = "auto", timeout_s: float = 120.0, kinds: Sequence[str] = tuple(COLLECTIVES),
    progress: Progress | None = None,
) -> dict[str, Link]:  # fmt: skip
    """Time collectives between ranks of their own, 1 KiB to 4 MiB to each, and fit each kind's alpha and bandwidth.

    The clock runs from the first rank's arrival to the last one's departure, for a rank that comes early may be sent to
    at once: started at the last arrival it would miss up to three quarters of the transfer. ValueError when such ranks
    or such a link cannot be had here. RuntimeError when a rank fails or hangs.

    Parameters
    ----------
    num_ranks
        2 to 8, processes on this machine.
    link_bytes_per_s, ranks_per_node
        A slower network, made for real: see :class:`effkit.ranks.launching.Ranks`. 0: this machine's loopback.
    num_repeats
        All sizes in turn, this many times.
    kinds
        Of :data:`COLLECTIVES`.
    """
    num_repeats = checked_whole("num_repeats", num_repeats, 1)
    if not isinstance(kinds, list | tuple) or not kinds or any(kind not in tuple(COLLECTIVES) for kind in kinds):
        raise ValueError(f"kinds are some of {', '.join(COLLECTIVES)}, in a list; given: {kinds!r}")
    on: dict[str, Any] = {"link_bytes_per_s": link_bytes_per_s, "ranks_per_node": ranks_per_node, "backend": backend}
    with Ranks(num_ranks, __name__, **on) as ranks:
        run = {"num_repeats": num_repeats, "kinds": list(kinds)}
        folder = ranks.run(run, timeout_s=timeout_s * len(kinds), progress=progress)
        seen = [json.loads(path.read_text()) for path in folder.glob("rank*.json")]
    found = {}
    for kind in kinds:
        times = np.array([rank["times"][kind] for rank in seen])  # on one clock: [num_ranks, num_collectives, 3]
        durations = times[:, :, 2].max(axis=0) - times[:, :, 1].min(axis=0)
        measured = pd.DataFrame({"size_bytes": times[0, :, 0], "dur_ns": durations})
        found[kind] = fit(measured, num_ranks, seen[0]["local_world_size"], link_bytes_per_s, kind)
    return found


def link(
    num_ranks: int = 2, *, link_bytes_per_s: float = 0.0, ranks_per_node: int = 0, num_repeats: int = 9,
    backend: str = "auto", timeout_s: float = 120.0, progress: Progress | None = None,
) -> Link:  # fmt: skip
    """That of all-to-alls, as :func:`links` finds it."""
    return links(**locals(), kinds=(ALL_TO_ALL,))[ALL_TO_ALL]


def main(folder: Path, met: Path) -> None:
    """On each rank: collectives of equal messages, all sizes in turn; each with its size, its start and its end."""
    with joined(folder, met) as member:
        times: dict[str, list[Any]] = {kind: [] for kind in member.run["kinds"]}
        for repeat in range(-1, member.run["num_repeats"]):  # the first one warms up
            for kind, size in itertools.product(times, sorted([*_SIZES, *_SMALL_SIZES, *_SMALL_SIZES])):
                out = torch.zeros(member.num_ranks * size // 4, device=member.travels_on)  # in single precision
                back = torch.zeros_like(out)
                dist.barrier()
                start = time.perf_counter_ns()
                COLLECTIVES[kind](out, back)
                synchronize()
                if repeat >= 0:
                    times[kind].append([size, start, time.perf_counter_ns()])
        member.write({"times": times})


def fit(
    measured: pd.DataFrame, num_ranks: int, ranks_per_node: int, nominal_bytes_per_s: float = 0.0,
    kind: str = ALL_TO_ALL,
) -> Link:  # fmt: skip
    """A :class:`Link` from measured collectives of four sizes or more: ``size_bytes`` (to each other rank), ``dur_ns``.

    Relative errors are minimised, in units of what the repeats leave uncertain (at most sizes near it, at least):
    small messages count as much as large ones, unless they scatter. Fewer sizes are a ValueError.
    """
    by_size = measured.groupby("size_bytes")["dur_ns"]
    frame = pd.DataFrame({"dur_ns": by_size.quantile(0.25)})
    if len(frame) < _FEWEST + 1:
        raise ValueError(f"a fit that is also tested takes {_FEWEST + 1} sizes or more; given: {len(frame)}")
    between = nominal_bytes_per_s > 0 and ranks_per_node < num_ranks
    num_messages = num_ranks * (num_ranks - (ranks_per_node if between else 1)) * (1 + (kind == ALL_REDUCE))
    frame["spread_frac"] = by_size.agg(lambda times: noise([times.to_numpy()]))
    doubt = frame["spread_frac"] / np.sqrt(by_size.size())
    # few repeats can agree by chance: no size is surer than most of those near it
    near = doubt.rolling(_NEAR, center=True, min_periods=1).median()
    doubt = doubt.clip(lower=near) if near.all() else doubt * 0.0 + 1.0
    points = np.stack([frame.index.to_numpy(float), frame["dur_ns"].to_numpy(float), doubt.to_numpy(float)])
    regimes = _regimes(points, num_messages)
    frame["fitted_ns"] = [_at(regimes, size, num_messages) for size in points[0]]
    frame["held_out_ns"] = np.nan
    for i, size in enumerate(frame.index[1:-1], start=1):
        frame.loc[size, "held_out_ns"] = _at(_regimes(np.delete(points, i, axis=1), num_messages), size, num_messages)
    frame["held_out_error"] = frame["held_out_ns"] / frame["dur_ns"] - 1
    error_frac = rms(frame["held_out_error"].dropna())
    noise_frac = noise(times.to_numpy() for _, times in by_size) / by_size.size().median() ** 0.5
    return Link(num_ranks, ranks_per_node, nominal_bytes_per_s, num_messages, regimes, frame, error_frac, noise_frac,
                kind)  # fmt: skip


def _regimes(points: Floats, num_messages: int) -> tuple[Regime, ...]:
    """One line, or the pair of lines with the least left-out error, if that is clearly less. ``points``: size, time and
    relative doubt, shape [3, num_sizes]."""

    def error(*parts: Floats) -> float:
        """Of each size by the line through the others of its part, relative, in units of its doubt."""
        errors = []
        for part in parts:
            for i, (size, time_ns, doubt) in enumerate(part.T):
                alpha_ns, ns_per_byte = _line(np.delete(part, i, axis=1))
                errors.append(((alpha_ns + ns_per_byte * size) / time_ns - 1) / doubt)
        return float(np.linalg.norm(errors))

    cuts = range(_FEWEST, points.shape[1] - _FEWEST + 1)
    least, cut = min(((error(points[:, :cut], points[:, cut:]), cut) for cut in cuts), default=(math.inf, 0))
    if least > _CLEARLY_BETTER * error(points):
        cut = 0
    parts = [points[:, :cut], points[:, cut:]] if cut else [points]
    lines, ends = [_line(part) for part in parts], [math.inf]
    if cut:  # where the lines cross, if that is where one gives way to the other
        cross = (lines[0][0] - lines[1][0]) / (lines[1][1] - lines[0][1] or math.inf)
        near = points[0, cut - 2] <= cross <= points[0, cut + 1]
        ends.insert(0, cross if near else math.sqrt(points[0, cut - 1] * points[0, cut]))
    return tuple(
        Regime(float(most), alpha_ns, num_messages * 1e9 / ns_per_byte if ns_per_byte else math.inf)
        for most, (alpha_ns, ns_per_byte) in zip(ends, lines, strict=True)
    )


def _line(points: Floats) -> tuple[float, float]:
    """Nanoseconds at once, and per byte of a message."""
    sizes, times, doubt = points
    alpha_ns, ns_per_byte = nonnegative(np.stack([1 / times, sizes / times], axis=1) / doubt[:, None], 1 / doubt)
    return float(alpha_ns), float(ns_per_byte)


def _at(regimes: Sequence[Regime], size_bytes: float, num_messages: int) -> float:
    regime = next(regime for regime in regimes if size_bytes <= regime.most_bytes)
    return regime.alpha_ns + num_messages * size_bytes / regime.bandwidth_bytes_per_s * 1e9
