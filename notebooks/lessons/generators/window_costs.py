"""An iteration of rewarding, in time and FLOPs: measured, and predicted for another window or number of steps.

Time is the process's own: it stands still while another program has the core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch.utils.flop_counter import FlopCounterMode

from effkit import Account, WhatIf
from effkit.whatif import Slider
from lessons.generators.sampling_windows import WindowedTraining, iteration_flops, plane_model

TIME, FLOPS = "Processor time of one iteration", "FLOPs of one iteration"
LEAST_PASSES = 3  # forward passes that a trained step costs at least: a forward and a backward pass
CALIBRATED = ((25, 14), (25, 4), (15, 14), (15, 4), (5, 4))  # (sampling steps, window); the first is the base


class WindowLaw(NamedTuple):
    """What the calibration found.

    Attributes
    ----------
    pass_flops
        FLOPs of one forward pass of the whole batch.
    sampled_ns, trained_ns
        Time of a sampling step, and of the update for one step of the window.
    error_frac
        Root mean square error on runs that were left out in turn, with the noise of repeats.
    steps, windows
        Fewest and most of each that were run.
    """

    pass_flops: float
    sampled_ns: float
    trained_ns: float
    error_frac: float
    steps: tuple[int, int]
    windows: tuple[int, int]

    def rows(self, num_steps: int, window: int) -> dict[str, int]:
        """Time [ns] of the two parts of an iteration."""
        return {"sampling": round(num_steps * self.sampled_ns), "update": round(window * self.trained_ns)}


def measure(settings: Sequence[tuple[int, int]], *, repeats: int = 9) -> list[Account]:
    """Run iterations of each (sampling steps, window) in turn; the fastest one of each, with its FLOPs as a companion.

    ``calibration`` of each Account are the times [ns] of all its repeats.
    """
    trainings = [WindowedTraining(plane_model(), window, num_steps=steps) for steps, window in settings]
    counts = [_flops(training) for training in trainings]
    times: list[list[tuple[int, int, int]]] = [[] for _ in trainings]
    for _ in range(repeats):
        for training, found in zip(trainings, times, strict=True):
            start = time.process_time_ns()
            begin = time.process_time_ns()
            rollout = training.rollout()
            middle = time.process_time_ns()
            training.update(*rollout)
            end = time.process_time_ns()
            found.append((time.process_time_ns() - start, middle - begin, end - middle))
    accounts = []
    for (num_steps, window), found, flops in zip(settings, times, counts, strict=True):
        total, sampling, update = min(found)
        accounts.append(
            Account.of(
                TIME, "ns", {"sampling": sampling, "update": update}, total=total, source="the process's clock",
                setting={"window": window, "num_steps": num_steps}, calibration=[one[0] for one in found],
            ).with_companions(flops)
        )  # fmt: skip
    return accounts


def calibrate(runs: Sequence[Account]) -> Account:
    """The first run, carrying the law of all: of each part of an iteration the median time of one step.

    Raises
    ------
    ValueError
        For fewer than three runs: each is left out once, to say how wrong the law of the others is.
    """
    if len(runs) < 3:
        raise ValueError(f"{len(runs)} runs, expected at least 3: each is left out once")
    law, errors = _law(runs), []
    for place, run in enumerate(runs):
        others = _law([*runs[:place], *runs[place + 1 :]])
        errors.append(sum(others.rows(run.setting["num_steps"], run.setting["window"]).values()) / run.total - 1)
    noises = [sorted(run.calibration)[1] / min(run.calibration) - 1 for run in runs]
    error = math.hypot(float(np.sqrt(np.mean(np.square(errors)))), float(np.median(noises)))
    return replace(runs[0], calibration=law._replace(error_frac=error))


def _law(runs: Sequence[Account]) -> WindowLaw:
    steps, windows = ([int(run.setting[name]) for run in runs] for name in ("num_steps", "window"))
    parts = [run.frame["value"] for run in runs]
    return WindowLaw(
        float(runs[0].companion(FLOPS).frame["value"]["sampling"]) / steps[0],
        float(np.median([part["sampling"] / num for part, num in zip(parts, steps, strict=True)])),
        float(np.median([part["update"] / num for part, num in zip(parts, windows, strict=True)])),
        0.0, (min(steps), max(steps)), (min(windows), max(windows)),
    )  # fmt: skip


def predict(base: Account, *, window: int, num_steps: int) -> Account:
    """Time and FLOPs of an iteration at another setting; a pure function of the calibrated base.

    Time follows the law, in a band of two errors. FLOPs are ``iteration_flops`` forward passes; at least, three passes
    for a trained step in place of four.

    Raises
    ------
    ValueError
        When the window is longer than the sampling.
    """
    if window > num_steps:
        raise ValueError(f"the window is {window} of {num_steps} sampling steps: it has to fit in")
    setting = {"window": window, "num_steps": num_steps}
    if setting == dict(base.setting):
        return base
    law: WindowLaw = base.calibration
    rows, margin = law.rows(num_steps, window), 2 * law.error_frac
    inside = law.steps[0] <= num_steps <= law.steps[1] and law.windows[0] <= window <= law.windows[1]
    passes, fewest = iteration_flops(num_steps, window), num_steps + LEAST_PASSES * window
    sampling, total = round(num_steps * law.pass_flops), round(passes * law.pass_flops)
    flops = Account.of(
        FLOPS, "FLOPs", {"sampling": sampling, "update": total - sampling}, total=total, source="the formula",
        basis="derived", low=round(fewest * law.pass_flops), high=total, setting=setting,
    )  # fmt: skip
    time_ns = sum(rows.values())
    return Account.of(
        TIME, "ns", rows, total=time_ns, source=f"{len(CALIBRATED)} calibrated runs", basis="derived",
        low=max(0, round(time_ns * (1 - margin))), high=round(time_ns * (1 + margin)), in_range=inside,
        setting=setting, calibration=law,
    ).with_companions(flops)  # fmt: skip


def whatif(base: Account) -> WhatIf:
    """Sliders over window and sampling steps; its button runs the setting."""

    def run(progress: Callable[[int, int], None], *, window: int, num_steps: int) -> Account:
        progress(0, 1)
        (found,) = measure([(num_steps, window)])
        progress(1, 1)
        return found

    knobs = (
        Slider("window", "Window [steps]", 1, 25, 1, "Sampling steps of an iteration that are trained"),
        Slider("num_steps", "Sampling [steps]", 5, 50, 1, "Steps from noise to a sample"),
    )
    return WhatIf(base, predict, knobs, run)


def _flops(training: WindowedTraining) -> Account:
    """Of the two parts of one iteration, and of another one as a whole."""
    with FlopCounterMode(display=False) as sampling:
        rollout = training.rollout()
    with FlopCounterMode(display=False) as update:
        training.update(*rollout)
    with FlopCounterMode(display=False) as whole:
        training.step()
    rows = {"sampling": sampling.get_total_flops(), "update": update.get_total_flops()}
    return Account.of(FLOPS, "FLOPs", rows, total=whole.get_total_flops(), source="torch's counter, a whole iteration")
