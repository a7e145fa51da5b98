"""What an intervention would save, from a few small steps with it and without it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_map_only

from effkit import activations, lab
from effkit.advice.step_hooks import Intervention, gradients_to_none, without_intervening
from effkit.lab import Trust
from effkit.recording import steady_peak
from effkit.timing import elapsed_ns, interleaved_ns
from effkit.training import drop_gradients, residents, size_bytes, states_replaced

Step = Callable[[Any], object]
_FEWEST, _MOST, _BUDGET_NS = 4, 25, 2_500_000_000  # runs of each small step; of a middling batch, together
_TURNS, _NARROWER_FRAC = 3, 0.1  # a band that so many more runs narrow by less than this has stopped shrinking
_APART = 1.2  # times of small steps
_LEAST_DOUBT_FRAC = 0.03  # of all steps: repeats may agree by chance
PLAIN = ""


@dataclass(frozen=True)
class Saving:
    """Time that an intervention saved in the steps that were tried."""

    plain_ns: tuple[float, ...]  # of each without it
    saved_ns: tuple[float, ...]
    noise_frac: float  # how far repeats of one step lay apart
    num_repeats: int = 1

    def over(self, steps_ns: Sequence[float]) -> tuple[float, float]:
        """What it would save in all of these steps, and half the width of its band [ns].

        Two models: saving in proportion to time, and a fixed saving per step plus one in proportion. The prediction is
        the mean of both; the band holds both, and adds two standard errors of noise: a saving is the difference of two
        figures.
        """
        plain, saved = np.array(self.plain_ns), np.array(self.saved_ns)
        steps = np.array(steps_ns, dtype="float64")
        proportional = saved.sum() / plain.sum() * steps.sum()
        line = proportional
        if plain.max() > _APART * plain.min():  # else nobody can tell a fixed part from one in proportion
            rate, fixed = np.polyfit(plain, saved, 1)
            line = fixed * len(steps) + rate * steps.sum()
        middle = (proportional + line) / 2
        doubt = abs(proportional - line) / 2
        return middle, doubt + _band_frac(self.noise_frac, self.num_repeats) * steps.sum()


def _band_frac(noise_frac: float, num_repeats: int) -> float:
    return Trust(0.0, noise_frac, num_repeats / 2, _LEAST_DOUBT_FRAC).band_frac


def rows_of(batch: Any) -> int | None:
    """Size of dimension 0, if all tensors of the batch share it."""
    try:
        return activations.rows(batch)
    except ValueError:
        return None


def cut(batch: Any, num_rows: int) -> Any:
    """The first rows of a batch: views, not copies."""
    return tree_map_only(torch.Tensor, lambda t: t[:num_rows] if t.dim() else t, batch)


def probes(batches: Sequence[Any], steps_ns: Sequence[int], whole: bool = True) -> list[Any]:
    """A third of a middling batch and all of it; two thirds where a ``whole`` one may not fit. Where batches cannot be
    cut, a short one and a middling one."""
    order = np.argsort(np.array(steps_ns), kind="stable")
    middle = batches[int(order[len(order) // 2])]
    few, more = parts(middle) or (batches[int(order[0])], middle)
    return [few, middle if whole else more]


def parts(batch: Any) -> list[Any]:
    """A third and two thirds of a batch; none where it cannot be cut."""
    rows = rows_of(batch)
    if rows is None or rows < 2:
        return []
    few, more = max(1, rows // 3), -(-2 * rows // 3)
    return [cut(batch, few), cut(batch, more if few < more else rows)]


def savings(
    step: Step, model: torch.nn.Module, tried: Sequence[Any], interventions: Mapping[str, Intervention]
) -> dict[str, Saving]:
    """Run small steps with each intervention and without any, in turn, until that narrows the band no more; the fastest
    of each counts."""
    everything = {PLAIN: without_intervening, **interventions}
    calls = {(name, i): intervention(model)(partial(step, batch))
             for name, intervention in everything.items() for i, batch in enumerate(tried)}  # fmt: skip
    runs: list[list[int]] = []
    bands: list[float] = []

    def settled(so_far: list[list[int]]) -> bool:
        num = len(so_far[0])
        bands.append(_band_frac(lab.noise(so_far), num))
        at_least = num >= _FEWEST and bands[-1] <= _LEAST_DOUBT_FRAC
        return at_least or (num >= _FEWEST + _TURNS and bands[-1] > (1 - _NARROWER_FRAC) * bands[-1 - _TURNS])

    def fastest(times: list[int]) -> float:
        runs.append(times)
        return min(times)

    most = max(_FEWEST, min(_MOST, _BUDGET_NS // elapsed_ns(partial(step, tried[-1]))))
    times = interleaved_ns(calls, most, fastest, settled)
    plain = tuple(float(times[PLAIN, i]) for i in range(len(tried)))
    return {name: Saving(plain, tuple(ns - times[name, i] for i, ns in enumerate(plain)), lab.noise(runs), len(runs[0]))
            for name in interventions}  # fmt: skip


@dataclass(frozen=True)
class Peaks:
    """Peaks of somebody's step, on any batch."""

    step: Step
    model: torch.nn.Module
    optimizers: Sequence[torch.optim.Optimizer]
    let_go: bool  # the step lets go of its gradients before it makes others
    settle: Step | None = None  # runs as many as make the next a steady one, unless one is enough

    def of(self, batch: Any, intervention: Intervention = without_intervening) -> int:
        """What is in memory at the most [bytes], what is there all through the step included."""
        with intervention(self.model):
            (self.settle or self.step)(batch)  # the state of a steady step
            gc.collect()
            let_go = self.let_go or intervention is gradients_to_none

            def resident_bytes() -> int:
                return sum(map(size_bytes, self.there(batch, let_go=let_go).values()))

            return steady_peak(partial(self.step, batch), resident_bytes, states_replaced(self.optimizers))[0]

    def there(self, batch: Any, *, let_go: bool) -> dict[str, list[torch.Tensor]]:
        """What is in memory all through a steady step, by category: gradients too, unless they are let go of, now."""
        if let_go:  # before: the profiler of a CPU does not see that older blocks are freed
            drop_gradients(self.model.parameters())
        resident = residents(self.model, self.optimizers, batch)
        held = [parameter.grad for parameter in self.model.parameters() if parameter.grad is not None]
        return resident | {"gradient": held} if held else resident

    def at_full(self, tried: Sequence[Any], full: Any, intervention: Intervention) -> tuple[int, int]:
        """Peak of a whole batch with an intervention, from two parts of it; and half the width of its band [bytes].

        A step's memory is a constant and so much per row. The two parts without the intervention, against the whole
        batch, tell how far that holds.
        """
        sizes = [rows_of(part) or 1 for part in tried]
        whole = rows_of(full) or sizes[-1]
        guess = _line(sizes, [self.of(part, intervention) for part in tried], whole)
        plain = _line(sizes, [self.of(part) for part in tried], whole)
        return round(guess), round(abs(plain - self.of(full)) + 0.01 * guess)


def _line(sizes: Sequence[int], peaks: Sequence[int], at: int) -> float:
    if sizes[0] == sizes[1]:
        return float(max(peaks))
    slope = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    return peaks[0] + slope * (at - sizes[0])
