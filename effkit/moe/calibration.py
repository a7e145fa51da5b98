"""What a measurement keeps for predictions: fitted costs, the range they were fitted in, and how wrong they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.lab import Hull, Trust, rms
from effkit.moe import breakdown, costs, routing
from effkit.moe.recorded import Array, Run, Step
from effkit.moe.setting import Setting
from effkit.moe.simulating import simulate

_LEVERS: Mapping[str, Mapping[str, Any]] = {
    "lsh": {"compress": "lsh"},
    "bfloat16": {"message_dtype": "bfloat16"},
    "float8": {"message_dtype": "float8"},
}
_NUM_AROUND = 6  # settings that the costs of plain steps are fitted on; those of levers follow
_LEAST_BAND_FRAC = 0.02
_ROOM = 1.05  # beyond what was seen, and still in range


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
        Measured over modelled time: of the measured setting, and of those of the other kind, whose exchanges overlap or
        do not; in the order not overlapped, overlapped.
    error_frac
        Root mean square error of the time of a setting that was left out of the fit.
    noise_frac
        Spread of the measured setting's time over the rounds.
    step
        One step of the measured setting, rank by rank: of its first routing, the one of median time.
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
    anchors: tuple[float, float]
    error_frac: float
    noise_frac: float
    step: Step

    @property
    def band_frac(self) -> float:
        """Half-width of the band on a step's time."""
        return Trust(self.error_frac, self.noise_frac, least_frac=_LEAST_BAND_FRAC).band_frac

    def anchor(self, setting: Setting) -> float:
        """What a modelled time is multiplied by: the mean over the directions, of which each overlaps or does not."""
        return _anchor(self.anchors, setting)

    def covers(self, setting: Setting, num_ranks: int) -> bool:
        """Whether a setting asks for no more and no less than what was seen, number by number."""
        if num_ranks != self.num_ranks or setting.dtype != self.setting.dtype:
            return False
        return Hull.of(map(_sizes, self.settings), _ROOM).covers(_sizes(setting))

    def moved(self, run: Run, job: int, scale: float) -> Calibration:
        """The same costs, at rest at another setting that was run: its times, times ``scale``, are the truth there."""
        setting, steps = run.settings[job], run.of_job(job)
        numbers = sorted({step.number for step in steps})
        modelled = [simulate(setting, n, self.num_ranks, self.ranks_per_node, self.costs) for n in numbers]
        anchors = [scale * total_ns(steps) / total_ns(modelled) if kind == _overlaps(setting) else anchor
                   for kind, anchor in enumerate(self.anchors)]  # fmt: skip
        return replace(
            self, setting=setting, anchors=(anchors[0], anchors[1]),
            loads=np.stack([run.kept[job, n] for n in numbers]), owner=routing.owners(setting, self.num_ranks),
            noise_frac=noise_frac(steps), step=_typical([step for step in steps if step.number == numbers[0]]),
        )  # fmt: skip

    def knows(self, setting: Setting) -> None:
        """Raise ValueError when the time of a lever that the setting uses was never measured."""
        for lever, change in _LEVERS.items():
            ((knob, value),) = change.items()
            if getattr(setting, knob) == value and not any(getattr(probe, knob) == value for probe in self.settings):
                raise ValueError(f"the time of {knob}={value!r} was not measured: measure(..., levers=({lever!r},))")


def probes(setting: Setting, num_ranks: int, levers: Sequence[str]) -> list[Setting]:
    """The settings that costs are fitted on: this one, five others around it, one per lever (ValueError if unknown)."""
    if unknown := set(levers) - set(_LEVERS):
        raise ValueError(f"levers are {', '.join(_LEVERS)}; given: {', '.join(sorted(unknown))}")
    half = max(1, setting.num_tokens // 2)
    narrow = {"hidden": _half(setting.hidden), "ffn": max(1, setting.ffn // 2)}
    around = [
        setting,
        setting.change(num_tokens=half, skew=setting.skew + 0.5),
        setting.change(num_tokens=2 * setting.num_tokens),
        setting.change(**narrow, num_tokens=setting.num_tokens + half, num_chunks=2, num_chunks_backward=4),
        setting.change(num_chunks=4, num_chunks_backward=0),
        _other_experts(setting, num_ranks),
    ]
    return [*around, *(setting.change(**{"pad": False, **_LEVERS[lever]}) for lever in levers
                       if setting.change(pad=False, **_LEVERS[lever]) != setting)]  # fmt: skip


def calibrate(run: Run) -> Calibration:
    """Fit the costs to a run of :func:`probes`; the first setting is the measured one.

    The settings around it are left out in turn to see how wrong the fit is on what it has not seen; levers are not, for
    nothing else tells their time.
    """
    num_around = min(_NUM_AROUND, len(run.settings))
    per_node, num_ranks = int(run.facts["ranks_per_node"]), run.num_ranks

    def traffic(setting: Setting, number: int) -> routing.Traffic:
        return routing.traffic(setting, num_ranks, number)

    def fitted(left_out: int | None) -> costs.Costs:
        steps = [step for step in run.steps if step.job != left_out]
        return costs.fit(run.settings, steps, traffic, per_node)

    numbers = sorted({step.number for step in run.steps})
    measured = [total_ns(run.of_job(job)) for job in range(len(run.settings))]

    def modelled(job: int, fitted: costs.Costs) -> float:
        return total_ns([simulate(run.settings[job], n, num_ranks, per_node, fitted) for n in numbers])

    def anchors(fitted: costs.Costs, left_out: int | None) -> tuple[float, float]:
        ratios: tuple[list[float], list[float]] = ([], [])
        for job in range(num_around):
            if job != left_out:
                ratios[_overlaps(run.settings[job])].append(measured[job] / modelled(job, fitted))
        own = _overlaps(run.settings[0])  # the measured setting stands for its kind alone: there, all is exact
        first, second = (float(np.mean(of_kind[:1] if kind == own else of_kind)) if of_kind else 1.0
                         for kind, of_kind in enumerate(ratios))  # fmt: skip
        return first, second

    errors = []
    for job in range(1, num_around):
        without = fitted(job)
        guess = _anchor(anchors(without, job), run.settings[job]) * modelled(job, without)
        errors.append(guess / measured[job] - 1)
    whole = fitted(None)
    base = run.settings[0]
    return Calibration(
        base, num_ranks, per_node, float(run.facts["link_bytes_per_s"]), len(numbers), whole, run.settings,
        np.stack([run.kept[0, n] for n in numbers]), routing.owners(base, num_ranks), anchors(whole, None),
        rms(errors), noise_frac(run.of_job(0)),
        _typical([step for step in run.of_job(0) if step.number == numbers[0]]),
    )  # fmt: skip


def _overlaps(setting: Setting) -> bool:
    return max(setting.degrees) > 1


def _anchor(anchors: tuple[float, float], setting: Setting) -> float:
    return float(np.mean([anchors[degree > 1] for degree in setting.degrees]))


def total_ns(steps: Sequence[Step]) -> float:
    """Time of a step: the median over rounds, averaged over the steps' routings."""
    return breakdown.typical(steps, lambda step: {"wall": breakdown.wall_ns(step)})["wall"]


def _typical(steps: Sequence[Step]) -> Step:
    return sorted(steps, key=breakdown.wall_ns)[len(steps) // 2]


def noise_frac(steps: Sequence[Step]) -> float:
    """Spread of the time over rounds, relative to its median (median absolute deviation, as of a normal's)."""
    by_round = np.array([
        [breakdown.wall_ns(step) for step in steps if step.round == around] for around in {s.round for s in steps}
    ]).mean(axis=1)  # fmt: skip
    middle = float(np.median(by_round))
    return 1.4826 * float(np.median(np.abs(by_round - middle))) / middle


def _sizes(setting: Setting) -> dict[str, float]:
    """What the time depends on, for the range."""
    rows = setting.num_tokens * setting.top_k
    return {
        "products of experts": rows * setting.hidden * setting.ffn, "values of messages": rows * setting.hidden,
        "tokens": setting.num_tokens, "pieces forward": setting.degrees[0], "pieces backward": setting.degrees[1],
    }  # fmt: skip


def _half(hidden: int) -> int:
    """Half as wide, and a multiple of 128 where the whole is."""
    return max(1, hidden // 2) if hidden % 256 == 0 or hidden % 128 else hidden


def _other_experts(setting: Setting, num_ranks: int) -> Setting:
    """Twice as many experts, wider, and one fewer choice."""
    num_experts, placement = 2 * setting.num_experts, setting.placement
    if isinstance(placement, tuple):
        placement = tuple(expert % num_ranks for expert in range(num_experts))
    return setting.change(num_experts=num_experts, ffn=2 * setting.ffn, top_k=max(1, setting.top_k - 1),
                          placement=placement, num_replicas=2 * setting.num_replicas)  # fmt: skip
