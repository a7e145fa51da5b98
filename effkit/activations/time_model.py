"""Clock: how long a replayed step would take on this machine, from a few steps that were really run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from effkit.activations.levers import NONE, Levers
from effkit.activations.sharding import SAME
from effkit.activations.stepping import BACKWARD
from effkit.activations.timeline import FLOPS, HALF_FLOPS, MOVED, Ints, Timeline
from effkit.lab import Hull, Trust, noise, rms
from effkit.least_squares import Floats, nonnegative

_AGAIN = "offload, in every further micro-batch"  # what it costs by the tensor, not by the byte
_APART = 1.5  # sizes that differ by less are one size
_AS_MEASURED = Hull({"growth": 1.0, "parts": 1.0}, {"growth": 1.0, "parts": 1.0})


@dataclass(frozen=True, eq=False)
class Run:
    """A step that was run: followed once, and timed without being followed.

    ``durations_ns`` is the time of each operator, ``step_ns`` the wall time of the whole step, the middle one of
    ``repeats_ns``; ``growth``, how many times as much its batch held as that of the plain step.
    """

    levers: Levers
    timeline: Timeline
    durations_ns: Ints
    step_ns: int
    repeats_ns: tuple[int, ...] = ()
    growth: float = 1.0


@dataclass(frozen=True, eq=False)
class Clock:
    """The time of a step [ns]: ``s * inside + p * operators + q * deciding``, and a correction for each lever.

    An operator takes a constant, and so much per byte moved and per FLOP, by its name and precision: that is the time
    *inside*. What Python, autograd and the dispatcher add is the same for every one of the *operators*; selective
    checkpointing decides about each of the *deciding* in Python. Each lever was run once alone: by what that run took
    more or less, its combinations are corrected, in proportion to how much of the lever is in force. Micro-batches are
    corrected as a smaller batch is: by how many rows run at once, on which caches and kernels depend.

    ``costs`` maps (name, whether in half precision) to ns per call, per byte and per FLOP; ``weights`` are ``s``,
    ``p`` [ns] and ``q`` [ns]; ``corrections`` maps a lever to ns at full force; ``missing``, the number of parts that a
    plain batch was cut into (1: whole) to what the law is short of there [ns]; ``errors`` are those of steps that were
    run to check it (predicted over measured, minus 1) and that it did not see; ``noise_frac`` is how far repeats of one
    step lay apart, ``num_repeats`` how many there were; ``sizes`` are those of the batches that were run.
    """

    costs: dict[tuple[str, bool], Floats]
    weights: Floats
    corrections: dict[Hashable, float]
    missing: dict[int, float]
    errors: tuple[float, ...] = ()
    noise_frac: float = 0.0
    num_repeats: int = 1
    sizes: Hull = _AS_MEASURED

    @property
    def trust(self) -> Trust:
        """How far its times can be trusted."""
        return Trust(rms(self.errors), self.noise_frac, self.num_repeats)

    @classmethod
    def fit(cls, runs: Sequence[Run], checks: Sequence[Run] = ()) -> Clock:
        """From a plain step, one for each lever alone at full force, and then those that have a lever more, of which
        nothing is known yet; ``checks`` are combinations and sizes."""
        samples: dict[tuple[str, bool], list[tuple[Floats, float]]] = defaultdict(list)
        for run in runs:
            for key, features, duration in zip(*_features(run.timeline), run.durations_ns, strict=True):
                samples[key].append((features, float(duration)))
        floor_ns = min(duration for points in samples.values() for _, duration in points)
        costs = {key: _cost(points, floor_ns) for key, points in samples.items()}
        parts = np.array([_parts(run.timeline, costs, run.levers) for run in runs])
        truth = np.array([run.step_ns for run in runs], dtype="float64")
        weights = nonnegative(parts / truth[:, None], np.ones(len(runs)))
        short = list(zip(runs, (truth - parts @ weights).tolist(), strict=True))
        missing = {run.levers.micro_batches: ns for run, ns in short if not _forces(run.levers)}
        clock, every = cls(costs, weights, {}, dict(sorted(missing.items()))), [*runs, *checks]
        for run, ns in short:
            more = ns - clock._short_ns(run.levers)
            for lever, force in _forces(run.levers).items():
                clock.corrections.setdefault(lever, more / force)
        errors = tuple(clock.step_ns(run.timeline, run.levers, run.growth) / run.step_ns - 1 for run in checks)
        return replace(
            clock, errors=errors, noise_frac=noise(run.repeats_ns for run in every),
            num_repeats=max(1, *(len(run.repeats_ns) for run in every)),
            sizes=Hull.of(_sizes(run.levers, run.growth) for run in every),
        )  # fmt: skip

    def step_ns(self, timeline: Timeline, levers: Levers, growth: float = 1.0) -> float:
        """The time of a replayed step, of a batch that holds ``growth`` times what the runs did."""
        law = float(np.array(_parts(timeline, self.costs, levers)) @ self.weights)
        return max(0.0, law + self._short_ns(levers, growth))

    def _short_ns(self, levers: Levers, growth: float = 1.0) -> float:
        """What the law is short of in such a step, by the number of rows at once and the levers in force."""
        plain = np.interp(_sizes(levers, growth)["parts"], [*self.missing], [*self.missing.values()])
        forces = _forces(levers, growth).items()
        return growth * float(plain) + sum(self.corrections.get(lever, 0.0) * force for lever, force in forces)

    def doublings(self, levers: Levers, growth: float) -> float:
        """How far such a step lies beyond the sizes that were run: see :meth:`Hull.doublings`."""
        return self.sizes.doublings(_sizes(levers, growth))

    def backward_frac(self, timeline: Timeline, levers: Levers) -> float:
        """Which share of a step its backward passes take."""
        inside, count = _inside(timeline, self.costs, levers)
        times = count * (inside * self.weights[0] + self.weights[1])
        return float(times[np.array(timeline.phases) == BACKWARD].sum() / times.sum())

    def knows(self, levers: Levers) -> bool:
        """Whether each of these levers was run."""
        return all(lever in self.corrections for lever in _forces(levers))


def _sizes(levers: Levers, growth: float) -> dict[str, float]:
    """How much a step holds, in plain batches; and into how many parts as large as its own a plain batch would fall."""
    return {"growth": growth, "parts": levers.micro_batches / growth}


def _forces(levers: Levers, growth: float = 1.0) -> dict[Hashable, float]:
    """Which levers are in force, and how much: 1 where they were run alone. What they cost beyond their operators comes
    with every row; of checkpointing, where Python calls blocks again, with every micro-batch; in an update, once."""
    every, parts = levers.checkpoint_every, levers.micro_batches
    forces: dict[Hashable, float] = {
        ("checkpoint", levers.keep): parts / every if every else 0.0,
        ("compress", levers.compress): growth * (levers.compress != NONE),
        "offload": growth * (levers.offload_frac > 0),  # every saved tensor is looked at, whether it is moved or not
        _AGAIN: (parts - 1.0) * (levers.offload_frac > 0),
        ("autocast", levers.autocast): growth * (levers.autocast != NONE),
        ("optimizer_states", levers.optimizer_states): float(levers.optimizer_states != "float32"),
        "param_dtype": growth * (levers.param_dtype != SAME),  # of ranks; no run has it
    }
    return {lever: force for lever, force in forces.items() if force}


def _features(timeline: Timeline) -> tuple[list[tuple[str, bool]], Floats]:
    """Of each operator its key, and 1, bytes moved, FLOPs."""
    work = timeline.work.astype("float64")
    half = [signature.half for signature in timeline.signatures]
    features = np.column_stack([np.ones(len(work)), work[:, MOVED], work[:, FLOPS] + work[:, HALF_FLOPS]])
    return list(zip(timeline.ops, half, strict=True)), features


def _cost(points: Sequence[tuple[Floats, float]], floor_ns: float) -> Floats:
    """Of calls of one size nobody can tell a constant from a rate: then all beyond the quickest call is a rate."""
    design = np.array([features for features, _ in points])
    duration = np.maximum(1.0, np.array([duration for _, duration in points]))
    moved = design[:, 1]
    if moved.max() > _APART * moved.min():
        return nonnegative(design / duration[:, None], np.ones(len(duration)))
    rate, mean_ns = (2 if design[0, 2] else 1), duration.mean()
    if not design[0, rate]:
        return np.array([mean_ns, 0.0, 0.0])
    cost = np.array([min(floor_ns, mean_ns), 0.0, 0.0])
    cost[rate] = max(0.0, mean_ns - floor_ns) / design[:, rate].mean()
    return cost


def _parts(timeline: Timeline, costs: dict[tuple[str, bool], Floats], levers: Levers) -> tuple[float, float, float]:
    """Time inside operators [ns]; number of operators; number of those about which selective checkpointing decides. An
    operator that was never timed costs what the median one does."""
    inside, count = _inside(timeline, costs, levers)
    deciding = sum(count[: timeline.segments[-1].first]) if levers.checkpoint_every and levers.keep != NONE else 0
    return float((inside * count).sum()), float(count.sum()), float(deciding)


def _inside(timeline: Timeline, costs: dict[tuple[str, bool], Floats], levers: Levers) -> tuple[Floats, Ints]:
    """Time inside each operator [ns], and how often it is run."""
    keys, features = _features(timeline)
    usual = np.median(np.array(list(costs.values())), axis=0)
    table = np.array([costs.get(key, usual) for key in keys])
    return (table * features).sum(axis=1), timeline.times_run(levers.micro_batches)
