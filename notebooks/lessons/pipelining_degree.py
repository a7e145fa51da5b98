"""Pipelining degree of an expert-parallel layer: into how many chunks to cut the exchange (FSMoE, arXiv 2501.10714)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import NamedTuple

_TIE = 1e-9  # relative: two degrees this close are equally good, and the smaller one is taken


@dataclass(frozen=True)
class Task:
    """One task of a layer, cut into chunks, each of ``alpha_ns + size / r * beta_ns`` (FSMoE's performance model).

    Parameters
    ----------
    alpha_ns
        Start-up time of every chunk [ns].
    beta_ns
        Time of one unit of work [ns per byte, or ns per FLOP].
    size
        Work of the whole task, in the unit that ``beta_ns`` counts [bytes or FLOP].

    Raises
    ------
    ValueError
        When a value is negative or not finite.
    """

    alpha_ns: float = 0.0
    beta_ns: float = 0.0
    size: float = 0.0

    def __post_init__(self) -> None:
        for name in ("alpha_ns", "beta_ns", "size"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(
                    f"{name} is {value}, expected a finite number of at least 0; use 0 for an absent task."
                )

    @property
    def work_ns(self) -> float:
        """What the task takes beyond its start-ups, whatever the number of chunks [ns]."""
        return self.size * self.beta_ns

    def chunk_ns(self, num_chunks: int) -> float:
        """One chunk of ``num_chunks`` [ns]."""
        return self.alpha_ns + self.work_ns / num_chunks


_ABSENT = Task()


@dataclass(frozen=True)
class LayerCosts:
    """Tasks of one pass through an expert-parallel layer; an absent one is ``Task()``.

    Three streams run one task at a time each. Between nodes: ``dispatch``, ``gradient_ns`` (an all-reduce that is not
    cut and waits for nothing) and ``combine``. Within a node: ``all_gather`` and ``reduce_scatter`` of expert-sharding
    parallelism. On the compute units: ``experts``.

    Raises
    ------
    ValueError
        When ``gradient_ns`` is negative or not finite.
    """

    dispatch: Task
    experts: Task
    combine: Task
    all_gather: Task = _ABSENT
    reduce_scatter: Task = _ABSENT
    gradient_ns: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.gradient_ns) and self.gradient_ns >= 0):
            raise ValueError(
                f"gradient_ns is {self.gradient_ns}, expected a finite number of at least 0; use 0 for no all-reduce."
            )

    @property
    def chain(self) -> tuple[Task, Task, Task, Task, Task]:
        """The tasks of one chunk in the order in which they depend on one another."""
        return self.dispatch, self.all_gather, self.experts, self.reduce_scatter, self.combine

    def backward(self, gradient_ns: float = 0.0) -> LayerCosts:
        """The same layer's backward pass: the messages of the forward pass, experts twice (dX and dW, each as long)."""
        twice = replace(self.experts, alpha_ns=2 * self.experts.alpha_ns, beta_ns=2 * self.experts.beta_ns)
        return replace(self, experts=twice, gradient_ns=gradient_ns)


def pipelined_ns(costs: LayerCosts, num_chunks: int) -> float:
    """Time of one pass at degree ``num_chunks`` [ns]: the schedule, task by task.

    Chunk i goes through dispatch, all-gather, experts, reduce-scatter, combine. Each stream is first in, first out:
    between nodes all dispatches, the gradient all-reduce, all combines; within a node all gathers, then all scatters
    (Tutel's order, which FSMoE keeps).

    Raises
    ------
    ValueError
        When ``num_chunks`` is below 1.
    """
    _check_degree("num_chunks", num_chunks)
    dispatch, gather, experts, scatter, combine = (task.chunk_ns(num_chunks) for task in costs.chain)
    chunks = range(num_chunks)
    between = within = compute = 0.0
    arrived, computed, scattered = [], [], []
    for _ in chunks:
        between += dispatch
        arrived.append(between)
    gathered = []
    for i in chunks:
        within = max(within, arrived[i]) + gather
        gathered.append(within)
    for i in chunks:
        compute = max(compute, gathered[i]) + experts
        computed.append(compute)
    for i in chunks:
        within = max(within, computed[i]) + scatter
        scattered.append(within)
    between += costs.gradient_ns
    for i in chunks:
        between = max(between, scattered[i]) + combine
    return between


class Piece(NamedTuple):
    """``slope_ns * r + constant_ns + falling_ns / r`` [ns]: the schedule's length while one thing binds."""

    binds: str
    slope_ns: float
    constant_ns: float
    falling_ns: float

    def at(self, num_chunks: float) -> float:
        """Its value at a degree [ns]."""
        return self.slope_ns * num_chunks + self.constant_ns + self.falling_ns / num_chunks


def pieces(costs: LayerCosts) -> list[Piece]:
    """The closed forms whose largest is :func:`pipelined_ns`, at any degree.

    The time of a schedule is its longest chain of tasks that wait for one another. All chunks of a task are alike, so
    that the longest chain spends all its r - 1 further chunks on one task:

    * ``compute``, ``inter-node``, ``intra-node``: every task once, and r - 1 more of the one that is longest. With the
      experts it is FSMoE's compute-bound case, 2 t_a2a + t_ag + t_rs + r t_exp.
    * the first scatter waits for the last gather: r - 1 more of dispatch or gather, and of scatter or combine. With the
      two exchanges it is FSMoE's case bound by inter-node messages, 2 r t_a2a + t_ag + t_rs; with gather and scatter
      the one bound by intra-node messages, 2 t_a2a + r t_ag + r t_rs.
    * ``gradient``: the inter-node stream never idle, r t_dispatch + t_gradient + r t_combine: FSMoE's fourth case.

    Each t is alpha + w / r, hence the form.
    """
    chain = costs.chain
    dispatch, gather, experts, scatter, combine = chain
    start_ups, work = sum(task.alpha_ns for task in chain), sum(task.work_ns for task in chain)
    where = ("inter-node", "intra-node", "compute", "intra-node", "inter-node")
    # (r - 1) t = alpha r - alpha + w - w / r
    found = [
        Piece(bound, task.alpha_ns, start_ups - task.alpha_ns + task.work_ns, work - task.work_ns)
        for bound, task in zip(where, chain, strict=True)
    ]
    start_ups, work = start_ups - experts.alpha_ns, work - experts.work_ns
    for (first, a), (second, b) in itertools.product(
        (("inter-node", dispatch), ("intra-node", gather)), (("intra-node", scatter), ("inter-node", combine))
    ):
        bound = first if first == second else "inter-node and intra-node"
        slope, whole = a.alpha_ns + b.alpha_ns, a.work_ns + b.work_ns
        found.append(Piece(bound, slope, start_ups - slope + whole, work - whole))
    slope, whole = dispatch.alpha_ns + combine.alpha_ns, dispatch.work_ns + combine.work_ns
    # A chain without a gradient to reduce is shorter than the one that waits for gathers, and need not be considered.
    if costs.gradient_ns:
        found.append(Piece("gradient", slope, whole + costs.gradient_ns, 0.0))
    return found


def binding(costs: LayerCosts, num_chunks: int) -> str:
    """What a pass at degree ``num_chunks`` waits for: ``compute``, ``inter-node``, ``intra-node``, ``gradient``.

    ``inter-node and intra-node`` where one binds before the experts and the other after.
    """
    _check_degree("num_chunks", num_chunks)
    return max(pieces(costs), key=lambda piece: piece.at(num_chunks)).binds


def best_degree(costs: LayerCosts, max_degree: int, *, allowed: Sequence[int] | None = None) -> int:
    """The degree from 1 to ``max_degree`` at which :func:`pipelined_ns` is least; of equals the smallest.

    Not a search: each of :func:`pieces` is convex in r, so their maximum is, and its minimum lies where a piece has its
    own, r = sqrt(falling / slope), or where two cross; the integers beside these are all that need be looked at.

    Parameters
    ----------
    costs
        The layer's tasks.
    max_degree
        The largest degree to consider.
    allowed
        Only these degrees, such as ``(1, 2, 4, 8)``. Since the maximum is convex, the best of them is a neighbour of
        the best integer.

    Raises
    ------
    ValueError
        When ``max_degree`` is below 1, or no allowed degree lies from 1 to ``max_degree``.
    """
    _check_degree("max_degree", max_degree)
    forms = pieces(costs)
    places = {1.0, float(max_degree)}
    places.update(math.sqrt(max(form.falling_ns, 0.0) / form.slope_ns) for form in forms if form.slope_ns > 0)
    for one, other in itertools.combinations(forms, 2):
        places.update(_crossings(one, other))
    inside = [min(max(place, 1.0), float(max_degree)) for place in places]
    candidates = {degree for place in inside for degree in (math.floor(place), math.ceil(place))}
    best = _least(forms, candidates)
    if allowed is None:
        return best
    usable = sorted({degree for degree in allowed if 1 <= degree <= max_degree})
    if not usable:
        raise ValueError(f"allowed is {list(allowed)}, expected a degree from 1 to {max_degree}; add 1.")
    beside = [[d for d in usable if d <= best][-1:], [d for d in usable if d > best][:1]]
    return _least(forms, set(itertools.chain(*beside)))


def exhaustive_degree(costs: LayerCosts, degrees: Sequence[int]) -> int:
    """The best of ``degrees`` by running the schedule of each, of equals the smallest: what the scheduler is held to.

    Raises
    ------
    ValueError
        When ``degrees`` is empty, or one of them is below 1.
    """
    if not degrees:
        raise ValueError("degrees is empty, expected at least one whole number; give range(1, 9) for instance.")
    times = {degree: pipelined_ns(costs, degree) for degree in sorted(degrees)}
    bound = min(times.values()) * (1 + _TIE)
    return next(degree for degree, dur_ns in times.items() if dur_ns <= bound)


def _least(forms: Sequence[Piece], degrees: set[int]) -> int:
    times = {degree: max(form.at(degree) for form in forms) for degree in sorted(degrees)}
    bound = min(times.values()) * (1 + _TIE)
    return next(degree for degree, dur_ns in times.items() if dur_ns <= bound)


def _crossings(one: Piece, other: Piece) -> list[float]:
    """Positive degrees at which two pieces are equal: roots of slope r^2 + constant r + falling."""
    slope = one.slope_ns - other.slope_ns
    constant = one.constant_ns - other.constant_ns
    falling = one.falling_ns - other.falling_ns
    roots = [] if constant == 0 else [-falling / constant]
    if slope != 0:
        under = constant**2 - 4 * slope * falling
        # The form that does not subtract two almost equal numbers, and its partner from the product of the roots.
        half = 0.0 if under < 0 else -(constant + math.copysign(math.sqrt(under), constant)) / 2
        roots = [] if under < 0 else [half / slope] + ([falling / half] if half else [])
    return [root for root in roots if root > 0 and math.isfinite(root)]


def _check_degree(name: str, degree: int) -> None:
    if isinstance(degree, bool) or not isinstance(degree, Integral) or degree < 1:
        raise ValueError(f"{name} is {degree!r}, expected a whole number of at least 1; use 1 for no pipelining.")
