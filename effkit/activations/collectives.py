"""What ranks send each other in a step: its collectives, their bytes, and the time that a rank waits for them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch

from effkit.activations.levers import Levers
from effkit.activations.sharding import DDP, FSDP2, ZERO1, ZERO2, ZERO3
from effkit.activations.time_model import Clock
from effkit.activations.timeline import Timeline
from effkit.lab import Trust, noise, rms
from effkit.ranks.links import ALL_REDUCE, Link

COLLECTIVES_OF = {  # which of the operator's tensors is whole: the one that no rank has only a part of
    "c10d::_allgather_base_": ("all-gather", 0), "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": (ALL_REDUCE, 0), "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::all_reduce": (ALL_REDUCE, 0), "_c10d_functional::all_reduce_": (ALL_REDUCE, 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0), "_c10d_functional::broadcast": ("broadcast", 0),
}  # fmt: skip
# whose overhead each strategy has: that of torch's wrapper for it
_WRAPPER = {FSDP2: FSDP2, ZERO2: FSDP2, ZERO3: FSDP2, DDP: DDP, ZERO1: ZERO1}


class Collective(NamedTuple):
    """One of a step: its kind, bytes of its whole tensor, how often it is run, and whether it is a bucket of gradients
    that DistributedDataParallel averages while backward goes on."""

    kind: str
    size_bytes: int
    times: int
    beside_backward: bool


def collectives(timeline: Timeline, levers: Levers) -> list[Collective]:
    """Those of a step of rank 0, in order."""
    found = []
    for signature, count in zip(timeline.signatures, timeline.times_run(levers.micro_batches), strict=True):
        if signature.name in COLLECTIVES_OF:
            kind, whole = COLLECTIVES_OF[signature.name]
            shape, _, dtype = signature.given[whole]
            size_bytes = math.prod(shape) * getattr(torch, dtype.removeprefix("torch.")).itemsize
            found.append(Collective(kind, size_bytes, int(count), levers.replicates and kind == ALL_REDUCE))
    return found


def collective_bytes(timeline: Timeline, levers: Levers) -> dict[str, int]:
    """Bytes of the whole tensors of all collectives in a step, by kind, the largest first.

    On a ring of n ranks each sends (n - 1) / n of that in an all-gather and in a reduce-scatter, twice as much in an
    all-reduce.
    """
    amounts: Counter[str] = Counter()
    for one in collectives(timeline, levers):
        amounts[one.kind] += one.times * one.size_bytes
    return dict(amounts.most_common())


class RanksRun(NamedTuple):
    """A step that ranks ran, all at once: its levers, its replay, the time of each repeat on the slowest rank [ns], and
    how many times as much its batch held as that of the base."""

    levers: Levers
    timeline: Timeline
    repeats_ns: Sequence[int]
    growth: float = 1.0


@dataclass(frozen=True, eq=False)
class RanksClock:
    """The time of a step on ranks [ns]: ``slower * clock + added * collectives``, and what a rank waits for beside.

    ``clock`` knows the step of one process, which takes ``slower`` times as long where all ranks compute at once;
    ``added_ns`` is what a wrapper does for each of its collectives, by the wrapper; ``links`` are the times of
    collectives between the ranks (:func:`effkit.ranks.links.links`). ``errors`` are those of steps that were run to
    check it (predicted over measured, minus 1), which it did not see; noise and repeats as in :class:`Clock`.
    """

    clock: Clock
    links: Mapping[str, Link]
    slower: float = 1.0
    added_ns: Mapping[str, float] = field(default_factory=dict)
    errors: tuple[float, ...] = ()
    noise_frac: float = 0.0
    num_repeats: int = 1

    @classmethod
    def fit(
        cls, clock: Clock, links: Mapping[str, Link], runs: Sequence[RanksRun], checks: Sequence[RanksRun]
    ) -> RanksClock:
        """From a step of which nothing is sent, and one of each kind of wrapper."""
        plain, *spread = runs
        slower = min(plain.repeats_ns) / clock.step_ns(plain.timeline, plain.levers)
        bare = cls(clock, links, slower)
        added = {run.levers.shard: max(0.0, bare._short_ns(run)) for run in spread}
        fitted = replace(bare, added_ns=added)
        errors = tuple(sum(fitted.step_ns(run.timeline, run.levers, run.growth)) / min(run.repeats_ns) - 1
                       for run in checks)  # fmt: skip
        every = [run.repeats_ns for run in (*runs, *checks)]
        return replace(fitted, errors=errors, noise_frac=noise(every), num_repeats=len(plain.repeats_ns))

    @property
    def link(self) -> Link:
        """Any of the links: all are between the same ranks."""
        return next(iter(self.links.values()))

    @property
    def trust(self) -> Trust:
        """How far its times can be trusted."""
        return Trust(rms(self.errors), self.noise_frac, self.num_repeats)

    def _short_ns(self, run: RanksRun) -> float:
        """What the run took more than computing and waiting, for each of its collectives."""
        count = sum(one.times for one in collectives(run.timeline, run.levers))
        return (min(run.repeats_ns) - sum(self.step_ns(run.timeline, run.levers))) / max(1, count)

    def step_ns(self, timeline: Timeline, levers: Levers, growth: float = 1.0) -> tuple[float, float]:
        """What a rank computes in such a step, and what it waits for the others beyond that: the exposed time."""
        sent = collectives(timeline, levers)
        computing = self.slower * self.clock.step_ns(timeline, levers, growth)
        added = self.added_ns.get(_WRAPPER[levers.shard], 0.0) * sum(one.times for one in sent)
        waiting = sum(one.times * self._takes(one) for one in sent if not one.beside_backward)
        buckets = [one for one in sent if one.beside_backward]
        buckets = buckets[: len(buckets) // min(2, levers.micro_batches)]  # those of one backward pass
        if buckets:
            backward_ns = computing * self.clock.backward_frac(timeline, levers) / levers.micro_batches
            waiting += levers.micro_batches * self._exposed(buckets, backward_ns)
        return computing + added, waiting

    def _takes(self, one: Collective) -> float:
        return self.links[one.kind].dur_ns(self._message(one)).dur_ns

    def _message(self, one: Collective) -> float:
        """Its bytes to each rank; smaller ones take as long as the smallest that were measured."""
        return max(one.size_bytes / self.link.num_ranks, self.link.frame.index[0])

    def _exposed(self, buckets: Sequence[Collective], backward_ns: float) -> float:
        """From backward's end to that of its last bucket: each is sent when it is full, after the one before. Gradients
        are taken to come evenly over backward."""
        done, ended, whole = 0, 0.0, sum(one.size_bytes for one in buckets)
        for one in buckets:
            done += one.size_bytes
            ended = max(ended, backward_ns * done / whole) + self._takes(one)
        return max(0.0, ended - backward_ns)

    def doublings(self, timeline: Timeline, levers: Levers) -> float:
        """How far the messages of a step lie beyond those that the links were measured with."""
        sent = collectives(timeline, levers)
        return max((self.links[one.kind].doublings(self._message(one)) for one in sent), default=0.0)
