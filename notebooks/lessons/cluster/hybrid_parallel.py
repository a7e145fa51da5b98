"""ByteScale (arXiv 2502.21231): sequences of different length, on a static mesh or each on the ranks it needs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from effkit import Account
from effkit.least_squares import nonnegative

if TYPE_CHECKING:
    from effkit.whatif import WhatIf

_COLUMNS = ["rank", "length", "shared_by", "window"]
MESH, NAIVE, BALANCED = "static mesh", "hybrid, naive", "hybrid, balanced"


@dataclass(frozen=True)
class SequenceCost:
    """Time of one sequence, forward and backward: T(s) = a s² + b s + c, of attention and the rest.

    Attributes
    ----------
    quadratic_ns, linear_ns, fixed_ns
        a [ns per token²], b [ns per token] and c [ns].
    spread_frac
        Typical relative error: root mean square of the residuals of the fit.
    longest
        Longest sequence that was timed [tokens].
    """

    quadratic_ns: float
    linear_ns: float
    fixed_ns: float
    spread_frac: float = 0.0
    longest: int = 0

    def time_ns(self, lengths: Any, num_ranks: int = 1) -> Any:
        """Time on each of the ranks that share sequences of these lengths [tokens]; the fixed part is not shared."""
        lengths = np.asarray(lengths, dtype=np.float64)
        return (self.quadratic_ns * lengths**2 + self.linear_ns * lengths) / num_ranks + self.fixed_ns


def fit(lengths: Sequence[int], times_ns: Sequence[float]) -> SequenceCost:
    """The cost with coefficients of at least 0 that has the least relative squared error.

    Raises
    ------
    ValueError
        With fewer than three lengths, or when a time is not positive.
    """
    s, t = np.asarray(lengths, dtype=np.float64), np.asarray(times_ns, dtype=np.float64)
    if len(np.unique(s)) < 3 or len(s) != len(t) or (t <= 0).any():
        raise ValueError("a fit needs times above 0 of at least three different lengths, as many times as lengths")
    design = np.stack([s**2, s, np.ones_like(s)], axis=1) / t[:, None]
    a, b, c = nonnegative(design, np.ones_like(t))
    residual = design @ np.array([a, b, c]) - 1
    return SequenceCost(float(a), float(b), float(c), float(np.sqrt((residual**2).mean())), int(s.max()))


def run(model: Any, length: int) -> int:
    """Forward and backward of one random sequence; the processor time it took [ns], without that of others."""
    batch = model.random_batch(1, int(length))
    begin = time.process_time_ns()
    model(**batch).loss.backward()
    spent = time.process_time_ns() - begin
    model.zero_grad(set_to_none=True)
    return spent


def _typical_ns(model: Any, length: int, repeats: int) -> float:
    return float(np.median([run(model, length) for _ in range(repeats)]))


def calibrate(
    model: Any, lengths: Sequence[int] = (64, 128, 256, 512, 1024, 2048), *, repeats: int = 5
) -> SequenceCost:
    """Time sequences of a few lengths on a model of :func:`effkit.models.text`, and fit their cost.

    One warm-up per length; then all lengths in turn, so that a busy moment is no one length's, and of the repeats the
    median counts. The spread is that of single runs where that is larger.

    Raises
    ------
    ValueError
        For a model on another device, where the processor's time says nothing.
    """
    if torch.device(model.device).type != "cpu":
        raise ValueError(f"the model is on {model.device}, expected one on the CPU: its processor time is what is read")
    for length in lengths:
        run(model, length)
    times = np.array([[run(model, length) for length in lengths] for _ in range(repeats)], dtype=np.float64)
    cost = fit(lengths, np.median(times, axis=0).tolist())
    off = 1.4826 * float(np.median(np.abs(times / cost.time_ns(lengths) - 1)))  # as a standard deviation, of one run
    return replace(cost, spread_frac=max(cost.spread_frac, off))


def skewed_lengths(num: int, *, median: int, longest: int, seed: int, sigma: float = 1.2) -> Any:
    """Lengths [tokens], log-normal and cut at the longest, integers of shape (num,): many short ones, few long ones.

    The middle one is exactly the longest: a context is as long as it is because there are such sequences.
    """
    drawn = np.random.default_rng(seed).lognormal(math.log(median), sigma, num).clip(16, longest).astype(int)
    drawn[num // 2] = longest
    return drawn


@dataclass(frozen=True, eq=False)
class Schedule:
    """Who computes what.

    Attributes
    ----------
    name
        ``MESH``, ``NAIVE`` or ``BALANCED``.
    num_ranks
        How many there are.
    pieces
        One row per sequence and rank: ``rank``, ``length`` of the whole sequence [tokens], ``shared_by`` ranks,
        ``window``: the packed row that a piece of the mesh belongs to, -1 elsewhere.
    """

    name: str
    num_ranks: int
    pieces: pd.DataFrame

    def rank_ns(self, cost: SequenceCost, moving_frac: float = 0.0) -> pd.Series[float]:
        """Time of every rank [ns].

        A rank that shares a sequence with k - 1 others receives their keys and values in a ring: (k - 1) / k of its
        tokens, each in ``moving_frac`` of what the linear part of its own cost takes, all of it hidden behind computing
        where there is as much of that. The fixed cost is paid per sequence by hybrid schedules and once per packed row
        by the mesh: that favours the mesh.
        """
        p = self.pieces
        work = pd.Series(cost.time_ns(p["length"], p["shared_by"]) - cost.fixed_ns, index=p.index)
        moved = moving_frac * cost.linear_ns * p["length"] * (p["shared_by"] - 1) / p["shared_by"]
        frame = p.assign(work=work, moved=moved, piece=np.where(p["window"] >= 0, p["window"], -1 - p.index))
        rows = frame.groupby(["rank", "piece"])[["work", "moved"]].sum()
        times = rows.max(axis="columns") + cost.fixed_ns
        return times.groupby("rank").sum().reindex(range(self.num_ranks), fill_value=0.0).rename("rank_ns")

    @property
    def moved_tokens(self) -> int:
        """Tokens whose keys and values a rank receives from another, all ranks together."""
        p = self.pieces
        return round(float((p["length"] * (p["shared_by"] - 1) / p["shared_by"]).sum()))


def moving_frac(
    *, num_params: float = 7e9, kv_bytes: float = 524_288, flops_per_s: float = 200e12, bytes_per_s: float = 50e9
) -> float:
    """Moving a token's keys and values, over the linear part of its computing. All defaults are assumed.

    They move three times: forward, again for backward, and their gradients. 6 x parameters FLOPs are computed. A Llama
    of 7 billion keeps 524,288 bytes per token (32 layers x 2 x 4,096 in 2 bytes).
    """
    if min(num_params, kv_bytes, flops_per_s, bytes_per_s) <= 0:
        raise ValueError("parameters, bytes, FLOP/s and bytes/s are above 0")
    return (3 * kv_bytes / bytes_per_s) / (6 * num_params / flops_per_s)


def _checked(lengths: Any, num_ranks: int, capacity: int) -> tuple[list[int], int]:
    """The lengths, and how many ranks the longest of them needs."""
    given = [int(length) for length in lengths]
    needed = math.ceil(max(given, default=0) / capacity) if capacity > 0 else 0
    if not given or min(given) < 1 or capacity < 1 or needed > num_ranks:
        raise ValueError(
            f"{len(given)} sequences on {num_ranks} ranks of {capacity} tokens each: expected lengths of at least 1, "
            f"and that the longest fits on all ranks together ({needed} are needed)"
        )
    return given, needed


def mesh(lengths: Any, num_ranks: int, capacity: int) -> Schedule:
    """Data parallel times context parallel, the same for all: every sequence is cut over the ranks of one group.

    A group is as large as the longest sequence needs (a power of two); sequences are packed in their order into rows of
    group x ``capacity`` tokens, and rows are dealt to the groups in turn.
    """
    given, needed = _checked(lengths, num_ranks, capacity)
    group = 1 << (needed - 1).bit_length()
    if num_ranks % group:
        raise ValueError(f"{num_ranks} ranks are no multiple of the {group} that a group needs")
    rows, window, filled = [], 0, 0
    for length in given:
        if filled + length > group * capacity:
            window, filled = window + 1, 0
        filled += length
        first = window % (num_ranks // group) * group
        rows += [(first + i, length, group, window) for i in range(group)]
    return Schedule(MESH, num_ranks, pd.DataFrame(rows, columns=_COLUMNS))


def _hybrid(name: str, order: list[int], num_ranks: int, capacity: int, load: Callable[[int, int], float]) -> Schedule:
    """Each sequence on as few ranks as it fits on: those with the smallest load so far."""
    loads = np.zeros(num_ranks)
    rows = []
    for length in order:
        shared_by = math.ceil(length / capacity)
        for rank in np.argsort(loads, kind="stable")[:shared_by]:
            loads[rank] += load(length, shared_by)
            rows.append((int(rank), length, shared_by, -1))
    return Schedule(name, num_ranks, pd.DataFrame(rows, columns=_COLUMNS))


def naive(lengths: Any, num_ranks: int, capacity: int) -> Schedule:
    """Hybrid data parallelism that evens out tokens: in their order, each sequence goes where the fewest tokens are."""
    given, _ = _checked(lengths, num_ranks, capacity)
    return _hybrid(NAIVE, given, num_ranks, capacity, lambda length, shared_by: length / shared_by)


def balanced(lengths: Any, num_ranks: int, capacity: int, cost: SequenceCost) -> Schedule:
    """Hybrid data parallelism that evens out time: dearest sequence first, each to the ranks that are free first."""
    given, _ = _checked(lengths, num_ranks, capacity)
    order = sorted(given, reverse=True)
    return _hybrid(BALANCED, order, num_ranks, capacity, lambda n, k: float(cost.time_ns(n, k)))


def predict(schedule: Schedule, cost: SequenceCost, moving_frac: float = 0.0) -> Account:
    """The step of a schedule [ns]: what the average rank computes, and what it then waits for the slowest.

    The band is three times the spread of the calibration.
    """
    times = schedule.rank_ns(cost, moving_frac)
    beyond = int(schedule.pieces["length"].max()) > cost.longest
    return _account(schedule, times, "the slowest rank, predicted", "derived", 3 * cost.spread_frac, not beyond)


def measure(
    schedule: Schedule, model: Any, *, repeats: int = 3,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Account:  # fmt: skip
    """Run every rank's sequences on this machine, one rank after the other; the slowest rank is the step [ns].

    Each sequence is run a few times, of which the median counts.

    Raises
    ------
    ValueError
        When a sequence is shared by ranks: pieces of sequences cannot be run alone.
    """
    if (schedule.pieces["shared_by"] > 1).any():
        raise ValueError("this schedule cuts sequences over ranks, expected one whose sequences fit on one rank each")
    run(model, int(schedule.pieces["length"].max()))  # memory is taken from the system once, not in a rank's time
    times = pd.Series(0.0, index=range(schedule.num_ranks))
    for rank, rows in schedule.pieces.groupby("rank")["length"]:
        progress(int(str(rank)), schedule.num_ranks)
        times[rank] = sum(_typical_ns(model, n, repeats) for n in rows)
    return _account(schedule, times, "the slowest rank, run alone", "measured", None, True)


def _account(
    schedule: Schedule, times: pd.Series[float], source: str, basis: str, band: float | None, in_range: bool
) -> Account:
    slowest, mean = round(times.max()), round(times.mean())
    ends: Mapping[str, int] = (
        {} if band is None else {"low": round(slowest * max(0.0, 1 - band)), "high": round(slowest * (1 + band))}
    )
    return Account.of(
        "Step of the slowest rank", "ns", {"computing": mean, "waiting": slowest - mean}, total=slowest,
        source=source, basis=basis, in_range=in_range,
        setting={"schedule": schedule.name, "num_ranks": schedule.num_ranks}, **ends,
    )  # fmt: skip


def whatif(base: Account, model: Any, lengths: Any, capacity: int, cost: SequenceCost) -> WhatIf:
    """A slider over the number of ranks and a choice of schedule, predicted by the cost; the button runs every rank."""
    from effkit.whatif import Choice, Slider, WhatIf

    knobs: list[Slider | Choice] = [
        Slider("num_ranks", "Ranks [count]", 1, 12, 1, "Ranks that share the sequences"),
        Choice("schedule", "Schedule", [NAIVE, BALANCED], "What is evened out: tokens, or time"),
    ]

    def at(num_ranks: int, schedule: str) -> Schedule:
        if schedule == NAIVE:
            return naive(lengths, num_ranks, capacity)
        return balanced(lengths, num_ranks, capacity, cost)

    def predicted(_: Account, *, num_ranks: int, schedule: str) -> Account:
        return predict(at(num_ranks, schedule), cost)

    def run_all(progress: Callable[[int, int], None], *, num_ranks: int, schedule: str) -> Account:
        return measure(at(num_ranks, schedule), model, progress=progress)

    return WhatIf(base, predicted, knobs, run_all)


def slowest_ns(ranks: Sequence[Sequence[int]], cost: SequenceCost) -> float:
    """Time of the rank whose sequences take longest [ns]; of each rank the lengths of its sequences [tokens]."""
    return max(float(np.sum(cost.time_ns(lengths))) for lengths in ranks)


def compare(schedules: Sequence[Schedule], cost: SequenceCost, moving_frac: float) -> pd.DataFrame:
    """Per schedule ``makespan_ns, waiting_frac`` (of all ranks)``, moved_tokens, in_range, times_shortest``."""
    rows = {}
    for one in schedules:
        step = predict(one, cost, moving_frac)
        rows[one.name] = {"makespan_ns": step.total, "waiting_frac": step.share["waiting"],
                          "moved_tokens": one.moved_tokens, "in_range": step.in_range}  # fmt: skip
    table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("schedule")
    table["times_shortest"] = table["makespan_ns"] / table["makespan_ns"].min()
    return table
