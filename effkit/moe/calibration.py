"""What a measurement keeps for predictions: fitted costs, the range they were fitted in, and how wrong they were."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from effkit.lab import Hull, Trust, noise, rms
from effkit.moe import breakdown, costs, routing
from effkit.moe.recorded import Array, Run, Step
from effkit.moe.setting import Setting
from effkit.moe.simulating import simulate

_LEVERS: Mapping[str, Mapping[str, Any]] = {
    "lsh": {"compress": "lsh"},
    "bfloat16": {"message_dtype": "bfloat16"},
    "float8": {"message_dtype": "float8"},
}
_EXACTLY = 1e6  # weight beside those of other runs
_NUM_AROUND = 7  # settings that the costs of plain steps are fitted on; those of levers follow


@dataclass(frozen=True, eq=False)
class Calibration:
    """What a measurement keeps.

    Attributes
    ----------
    setting, num_ranks, ranks_per_node, link_bytes_per_s
        What was measured, and on what; with a base, the setting is not one of those that the costs were fitted on.
    costs
        Fitted times.
    settings
        Those that the costs were fitted on.
    loads
        Token copies kept, int [num_steps, num_ranks (source), num_experts].
    owner
        The rank that holds each expert, [num_experts]; -1 for every rank.
    anchors
        Number of pieces -> measured over modelled time. That of the measured setting is its own; the others', of all
        settings around it.
    lever_anchors
        The same of each lever's run, over that of the settings without it.
    error_frac, pieces_error_frac
        Root mean square error of the time of a setting that was left out of the fit: inside the range, of those with
        whole exchanges and of those in pieces. One that lay outside the others' sizes was off by more than that, as
        much as the band is wider there.
    noise_frac
        How far steps of the same setting and routing lay apart, from round to round, relative to the measured setting.
    launch_noise_frac
        How far the time of runs in pieces, relative to the measured setting beside them, lies from one launch of ranks
        to the next: of another launch, against the mean of those that were calibrated on.
    step
        One step of the measured setting, rank by rank: of its first routing, the one of median time.
    walls_ns
        Times of steps, round after round, for each setting and routing.
    """

    setting: Setting
    num_ranks: int
    ranks_per_node: int
    link_bytes_per_s: float
    num_steps: int
    costs: costs.Costs
    settings: Sequence[Setting]
    loads: Array
    owner: Array
    anchors: Mapping[int, float]
    error_frac: float
    pieces_error_frac: float
    noise_frac: float
    launch_noise_frac: float
    step: Step
    walls_ns: Sequence[Sequence[int]] = ()
    lever_anchors: Mapping[str, float] = field(default_factory=dict)

    @property
    def trust(self) -> Trust:
        """In a step's time, the median of the rounds, averaged over the routings."""
        num_repeats = self.num_steps * max(map(len, self.walls_ns), default=1)
        return Trust(self.error_frac, self.noise_frac, num_repeats)

    @property
    def band_frac(self) -> float:
        """Half-width of the band on a step's time, inside the range."""
        return self.trust.band_frac

    @property
    def shrinks(self) -> bool:
        """Whether one more round would make the band clearly narrower."""
        return self.trust.shrinks(self.trust.num_repeats + self.num_steps)

    def anchor(self, setting: Setting) -> float:
        """What a modelled time is multiplied by: the mean over the directions, of which each overlaps or does not, and
        what is known of the setting's levers."""
        of_levers = [anchor for lever, anchor in self.lever_anchors.items() if _uses(setting, lever)]
        return _anchor(self.anchors, setting) * math.prod(of_levers)

    def band_at(self, setting: Setting, on: Mapping[str, float]) -> tuple[float, bool]:
        """Half-width of the band at a setting on these ranks and links, and whether it is in range. A lever is in range
        at all sizes that were run; its band widens with the distance from those of its own runs."""
        seen = set().union(*map(_regimes, (*self.settings, self.setting))) >= _regimes(setting)
        here = {name: float(getattr(self, name)) for name in on}
        ran = {one: _sizes(one, self.num_ranks) | here for one in self.settings}
        own = [sizes for one, sizes in ran.items() if _levers(one) == _levers(setting)]
        sizes = _sizes(setting, int(on["num_ranks"])) | dict(on)
        doublings, error_frac = Hull.of(own or ran.values()).doublings(sizes), self.error_frac
        if _overlaps(setting) or _overlaps(self.setting):  # no repeat within a launch averages out what differs in it
            error_frac = math.hypot(self.pieces_error_frac, self.launch_noise_frac)
        elif _levers(setting) != _levers(self.setting):  # no run with a lever was left out: it may err as either kind
            error_frac = rms([self.error_frac, self.pieces_error_frac])
        trust = replace(self.trust, error_frac=error_frac)
        return trust.beyond(doublings, seen), seen and Hull.of(ran.values()).covers(sizes)

    def steps(
        self, setting: Setting, *, num_ranks: int = 0, ranks_per_node: int = 0, link_bytes_per_s: float = 0.0,
        traffic: Sequence[routing.Traffic] = (),
    ) -> list[Step]:  # fmt: skip
        """Every step of a setting, played through; on other ranks, another link or with other traffic, if given."""
        num_ranks, per_node = num_ranks or self.num_ranks, ranks_per_node or self.ranks_per_node
        fitted = self.costs
        if link_bytes_per_s and link_bytes_per_s != self.link_bytes_per_s:
            moving = fitted.moving.copy()
            moving[1] = 1e9 / link_bytes_per_s
            fitted = replace(fitted, moving=moving)
        of_steps = traffic or [routing.traffic(setting, num_ranks, n) for n in range(self.num_steps)]
        return [simulate(setting, n, num_ranks, per_node, fitted, own) for n, own in enumerate(of_steps)]

    def moved(self, run: Run, job: int, scale: float) -> Calibration:
        """The same costs, at rest at another setting that was run: its times, times ``scale``, are the truth there."""
        setting, steps, walls = run.settings[job], run.of_job(job), _walls_ns(run)
        numbers = sorted({step.number for step in steps})
        known = self.anchor(setting) / _anchor(self.anchors, setting)  # of its levers
        beyond = scale * total_ns(steps) / total_ns(self.steps(setting)) / known / _anchor(self.anchors, setting)
        own = {degree: beyond * _of_degree(self.anchors, degree) for degree in setting.degrees}
        return replace(
            self, setting=setting, anchors={**self.anchors, **own},
            loads=np.stack([run.kept[job, n] for n in numbers]), owner=routing.owners(setting, self.num_ranks),
            noise_frac=noise(times for _, times in _beside_first(walls)), walls_ns=list(walls.values()),
            step=_typical([step for step in steps if step.number == numbers[0]]),
        )  # fmt: skip

    def knows(self, setting: Setting) -> None:
        """Raise ValueError when the time of a lever that the setting uses was never measured."""
        for lever, change in _LEVERS.items():
            if _uses(setting, lever) and not any(_uses(probe, lever) for probe in self.settings):
                ((knob, value),) = change.items()
                raise ValueError(f"the time of {knob}={value!r} was not measured: measure(..., levers=({lever!r},))")


def probes(setting: Setting, num_ranks: int, levers: Sequence[str]) -> list[Setting]:
    """The settings that costs are fitted on: this one, six others around it, one per lever (ValueError if unknown)."""
    if unknown := set(levers) - set(_LEVERS):
        raise ValueError(f"levers are {', '.join(_LEVERS)}; given: {', '.join(sorted(unknown))}")
    half, num_experts, placement = max(1, setting.num_tokens // 2), 2 * setting.num_experts, setting.placement
    # half as wide, and a multiple of 128 where the whole is
    hidden = setting.hidden if setting.hidden % 256 == 128 else max(1, setting.hidden // 2)
    if isinstance(placement, tuple):
        placement = tuple(expert % num_ranks for expert in range(num_experts))
    around = [
        setting,
        setting.change(num_tokens=half, skew=setting.skew + 1.0),
        setting.change(num_tokens=2 * setting.num_tokens, skew=0.0),
        setting.change(hidden=hidden, ffn=max(1, setting.ffn // 2), num_tokens=setting.num_tokens + half,
                       num_chunks=2, num_chunks_backward=4),
        setting.change(num_chunks=4, num_chunks_backward=0),
        setting.change(num_chunks=2, num_chunks_backward=0),
        setting.change(num_experts=num_experts, ffn=2 * setting.ffn, top_k=max(1, setting.top_k - 1),
                       placement=placement, num_replicas=2 * setting.num_replicas),
    ]  # fmt: skip
    return [*around, *(setting.change(**{"pad": False, **_LEVERS[lever]}) for lever in levers
                       if setting.change(pad=False, **_LEVERS[lever]) != setting)]  # fmt: skip


def calibrate(run: Run) -> Calibration:
    """Fit the costs to a run of :func:`probes`; the first setting is the measured one.

    The settings around it are left out in turn to see how wrong the fit is on what it has not seen; levers are not, for
    nothing else tells their time.
    """
    num_around = min(_NUM_AROUND, len(run.settings))
    per_node, num_ranks = int(run.facts["ranks_per_node"]), run.num_ranks

    def fitted(left_out: int | None) -> costs.Costs:
        return costs.fit(run.settings, [step for step in run.steps if step.job != left_out], per_node)

    numbers = sorted({step.number for step in run.steps})
    measured = [total_ns(run.of_job(job)) for job in range(len(run.settings))]

    def modelled(job: int, fitted: costs.Costs) -> float:
        return total_ns([simulate(run.settings[job], n, num_ranks, per_node, fitted) for n in numbers])

    def anchors(fitted: costs.Costs, left_out: int | None) -> dict[int, float]:
        return _anchors([(run.settings[job], measured[job] / modelled(job, fitted))
                         for job in range(num_around) if job != left_out])  # fmt: skip

    errors: dict[bool, list[float]] = {True: [], False: []}
    sizes = [_sizes(setting, num_ranks) for setting in run.settings[:num_around]]
    for job in range(1, num_around):
        without = fitted(job)
        guess = _anchor(anchors(without, job), run.settings[job]) * modelled(job, without)
        others = Hull.of(sizes[:job] + sizes[job + 1 :])
        apart = (guess / measured[job] - 1) / (1.0 + others.doublings(sizes[job]))
        errors[_overlaps(run.settings[job])].append(apart)
    whole, base = fitted(None), run.settings[0]
    known, of_levers = anchors(whole, None), {}
    for job in range(num_around, len(run.settings)):
        (lever,) = (name for name in _LEVERS if _uses(run.settings[job], name) and not _uses(base, name))
        of_levers[lever] = measured[job] / modelled(job, whole) / _anchor(known, run.settings[job])
    walls = _walls_ns(run)
    totals = {(job, 0): np.mean([walls[job, n] for n in numbers], axis=0) for job in range(num_around)}
    cut = {job for job, setting in enumerate(run.settings) if _overlaps(base) or _overlaps(setting)}
    whole_ones = [times for job, times in _beside_first(walls) if job not in cut]
    in_pieces = [times for job, times in _beside_first(totals) if job in cut]
    return Calibration(
        base, num_ranks, per_node, float(run.facts["link_bytes_per_s"]), len(numbers), whole, run.settings,
        np.stack([run.kept[0, n] for n in numbers]), routing.owners(base, num_ranks), known,
        rms(errors[False] or errors[True]), rms(errors[True] or errors[False]),
        noise(whole_ones or in_pieces), math.sqrt(1 + 1 / len(totals[0, 0])) * noise(in_pieces),
        _typical([step for step in run.of_job(0) if step.number == numbers[0]]), list(walls.values()), of_levers,
    )  # fmt: skip


def _uses(setting: Setting, lever: str) -> bool:
    return all(getattr(setting, knob) == value for knob, value in _LEVERS[lever].items())


def _overlaps(setting: Setting) -> bool:
    return max(setting.degrees) > 1


def _anchors(ratios: Sequence[tuple[Setting, float]]) -> dict[int, float]:
    """Measured over modelled time by number of pieces, from that of settings; the first one's is met exactly."""
    degrees = sorted({degree for setting, _ in ratios for degree in setting.degrees})
    design = np.array([[setting.degrees.count(degree) / 2 for degree in degrees] for setting, _ in ratios])
    weight = np.array([_EXACTLY, *(1.0 for _ in ratios[1:])])
    found = np.linalg.lstsq(design * weight[:, None], np.array([ratio for _, ratio in ratios]) * weight, rcond=None)[0]
    return dict(zip(degrees, found.tolist(), strict=True))


def _anchor(anchors: Mapping[int, float], setting: Setting) -> float:
    return float(np.mean([_of_degree(anchors, degree) for degree in setting.degrees]))


def _of_degree(anchors: Mapping[int, float], degree: int) -> float:
    """Between two numbers of pieces on the line in their logarithms; whole exchanges and those in pieces apart. Where
    no run was of its kind, what the model says."""
    known = sorted(one for one in anchors if (one > 1) == (degree > 1))
    return float(np.interp(math.log(degree), np.log(known), [anchors[one] for one in known])) if known else 1.0


def total_ns(steps: Sequence[Step]) -> float:
    """Time of a step: the median over rounds, averaged over the steps' routings."""
    return breakdown.typical(steps, lambda step: {"wall": breakdown.wall_ns(step)})["wall"]


def _typical(steps: Sequence[Step]) -> Step:
    return sorted(steps, key=breakdown.wall_ns)[len(steps) // 2]


def _walls_ns(run: Run) -> dict[tuple[int, int], list[int]]:
    """Times of the steps of each setting and routing, in the order they were run."""
    by_step: dict[tuple[int, int], list[int]] = defaultdict(list)
    for step in sorted(run.steps, key=lambda step: step.round):
        by_step[step.job, step.number].append(breakdown.wall_ns(step))
    return by_step


def _beside_first(times: Mapping[tuple[int, int], Any]) -> list[tuple[int, Any]]:
    """Times by setting and routing, relative to those of the first setting in the same rounds: a machine whose speed
    drifts slows both down."""
    return [(job, np.divide(own, times[0, number])) for (job, number), own in times.items() if job]


def _levers(setting: Setting) -> tuple[Any, ...]:
    """What runs other code: levers, formats, copies of experts."""
    return setting.compress, setting.message_dtype, setting.dtype, setting.num_replicas > 0


def _regimes(setting: Setting) -> set[tuple[Any, ...]]:
    """Its levers, with a plain or an overlapped exchange, in each direction."""
    directions = (True, False) if setting.backward else (True,)
    return {(forward, degree > 1, *_levers(setting))
            for forward, degree in zip(directions, setting.degrees, strict=False)}  # fmt: skip


def _sizes(setting: Setting, num_ranks: int) -> dict[str, float]:
    """What the time depends on, for the range; of the first step's routing."""
    traffic = routing.traffic(setting, num_ranks, 0)
    held = [float(traffic.held(rank).sum()) for rank in range(num_ranks)]
    rows = sum(held) / num_ranks
    return {
        "products of experts": rows * setting.hidden * setting.ffn, "values of messages": rows * setting.hidden,
        "tokens": setting.num_tokens, "load of the busiest rank": max(held) / max(rows, 1.0),
        "pieces forward": setting.degrees[0], "pieces backward": setting.degrees[1],
    }  # fmt: skip
