"""The step of a sparse-wide perceptron by the clock: calibrated on dense ones, predicted with zeros, and run.

A dense kernel multiplies zeros as it does other weights, so that the time follows the weights that it reads, and the
FLOPs on paper those that are kept.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit import Account
from effkit.least_squares import nonnegative
from effkit.timing import interleaved_ns
from lessons.precision.sparse_layers import compressed_rows, flops_per_example, perceptron, width_factor

if TYPE_CHECKING:
    from effkit.whatif import WhatIf

SIZES = (64, 512, 512, 512, 64)  # of the dense network: inputs, hidden layers, outputs
CALIBRATED = (256, 512, 1024, 1664)  # widths of the hidden layers of dense networks that are timed
EXAMPLES = 256
TITLE = "Time of one step"
_SLACK_FRAC = 0.1  # a shared machine changes its speed from one minute to the next


@dataclass(frozen=True)
class StepCost:
    """T = c + r w: the time of a step whose dense kernels read w weights, zeros or not.

    Attributes
    ----------
    fixed_ns, weight_ns
        c [ns] and r [ns per weight].
    low_times, high_times
        Least and largest time of the calibration over that of the fit, and a tenth beyond.
    most_weights
        Of the largest network that was timed.
    """

    fixed_ns: float
    weight_ns: float
    low_times: float
    high_times: float
    most_weights: int

    def time_ns(self, weights: int) -> float:
        """Of a step that reads as many weights."""
        return self.fixed_ns + self.weight_ns * weights


def fit(weights: Sequence[int], times_ns: Sequence[float]) -> StepCost:
    """The cost with coefficients of at least 0 that has the least relative squared error.

    Raises
    ------
    ValueError
        With fewer than two different networks, or when a time is not positive.
    """
    w, t = np.asarray(weights, float), np.asarray(times_ns, float)
    if len(np.unique(w)) < 2 or len(w) != len(t) or (t <= 0).any():
        raise ValueError("a fit needs times above 0 of at least two different networks, as many times as networks")
    fixed, each = nonnegative(np.stack([1 / t, w / t], axis=1), np.ones_like(t))
    off = t / (fixed + each * w)
    low, high = min(1.0, float(off.min())), max(1.0, float(off.max()))
    return StepCost(float(fixed), float(each), low * (1 - _SLACK_FRAC), high * (1 + _SLACK_FRAC), int(w.max()))


def wide(sizes: Sequence[int], zeros_percent: float) -> list[int]:
    """The sizes with hidden layers that are wider by the width factor; inputs and outputs stay."""
    factor = width_factor(zeros_percent / 100)
    return [sizes[0], *(round(size * factor) for size in sizes[1:-1]), sizes[-1]]


def num_weights(sizes: Sequence[int]) -> int:
    """Weights of all layers, zeros included."""
    return sum(inputs * outputs for inputs, outputs in itertools.pairwise(sizes))


def counted(percents: Sequence[int], sizes: Sequence[int] = SIZES) -> pd.DataFrame:
    """By ``zeros [%]``: the ``width`` of hidden layers, and ``FLOPs on paper`` and ``weights read`` over the dense."""
    dense = flops_per_example(perceptron(sizes)[1])
    rows = {}
    for percent in percents:
        _, masks = perceptron(sizes, percent / 100)
        kept, read = flops_per_example(masks), flops_per_example(masks, stored=True)
        rows[percent] = {"width": wide(sizes, percent)[1], "FLOPs on paper": kept / dense, "weights read": read / dense}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("zeros [%]")


def calibrate(widths: Sequence[int] = CALIBRATED, *, repeats: int = 12) -> Account:
    """The measured step of the dense network, and in its ``calibration`` a cost of dense networks of these widths.

    All networks in turn, so that a busy moment is no one width's; of the repeats the shortest counts.
    """
    networks = {width: perceptron([SIZES[0], width, width, width, SIZES[-1]])[0] for width in (*widths, SIZES[1])}
    steps: dict[int, list[tuple[int, int]]] = {width: [] for width in networks}
    for _ in range(repeats + 1):
        for width, network in networks.items():
            steps[width].append(_step(network))
    best = {width: min(taken[1:], key=sum) for width, taken in steps.items()}  # the first turn warms up
    weights = [num_weights([SIZES[0], width, width, width, SIZES[-1]]) for width in widths]
    cost = fit(weights, [sum(best[width]) for width in widths])
    return _measured(best[SIZES[1]], 0, cost)


def measure(
    zeros_percent: int, *, repeats: int = 12, progress: Callable[[int, int], None] = lambda done, total: None
) -> Account:
    """Run the sparse-wide network with this share of zeros [ns]; of the repeats the shortest step counts."""
    network, _ = perceptron(SIZES, zeros_percent / 100)
    taken = []
    for turn in range(repeats + 1):
        progress(turn, repeats + 1)
        taken.append(_step(network))
    return _measured(min(taken[1:], key=sum), zeros_percent, None)


def predict(base: Account, *, zeros_percent: int) -> Account:
    """The step with this share of zeros [ns], by the cost of dense networks in the base's calibration.

    What the zeros take is a row of its own: a kernel that skips them at no cost would save it.
    """
    cost = base.calibration
    if not isinstance(cost, StepCost):
        raise ValueError("this account has no cost of a step, expected one of lessons.precision.wider.calibrate()")
    kept, read = num_weights(SIZES), num_weights(wide(SIZES, zeros_percent))
    total = cost.time_ns(read)
    rows = {"weights that are kept": round(cost.weight_ns * kept), "zeros": round(cost.weight_ns * (read - kept)),
            "whatever the width": round(cost.fixed_ns)}  # fmt: skip
    return Account.of(
        TITLE, "ns", rows, total=sum(rows.values()), source="weights that dense kernels read", basis="derived",
        low=round(total * cost.low_times), high=round(total * cost.high_times), in_range=read <= cost.most_weights,
        setting={"zeros_percent": zeros_percent},
    )  # fmt: skip


def whatif(base: Account) -> WhatIf:
    """A slider over :func:`predict`; the button runs the setting."""
    from effkit.whatif import Slider, WhatIf

    knob = Slider("zeros_percent", "Zeros [%]", 0, 90, 10, "Share of zeros; hidden layers grow to keep their FLOPs")

    def run(progress: Callable[[int, int], None], *, zeros_percent: int) -> Account:
        return measure(zeros_percent, progress=progress)

    return WhatIf(base, predict, [knob], run)


def compressed_times(zeros_percent: int, *, repeats: int = 15) -> float:
    """Time of a product in CSR, which skips zeros, over the dense product of the same weights."""
    network, _ = perceptron(SIZES, zeros_percent / 100)
    layer = network[2]
    assert isinstance(layer, nn.Linear)
    weight = layer.weight.detach()
    csr, x = compressed_rows(weight), torch.randn(weight.shape[1], EXAMPLES)
    times = interleaved_ns({"dense": lambda: weight @ x, "CSR": lambda: csr @ x}, repeats, min)
    return times["CSR"] / times["dense"]


def _step(network: nn.Module) -> tuple[int, int]:
    """Forward and backward of one batch of random examples [ns each]."""
    x = torch.randn(EXAMPLES, SIZES[0])
    network.zero_grad(set_to_none=True)
    begin = time.perf_counter_ns()
    loss = network(x).sum()
    middle = time.perf_counter_ns()
    loss.backward()
    return middle - begin, time.perf_counter_ns() - middle


def _measured(times_ns: tuple[int, int], zeros_percent: int, cost: StepCost | None) -> Account:
    rows = dict(zip(("forward", "backward"), times_ns, strict=True))
    return Account.of(TITLE, "ns", rows, total=sum(times_ns), source="the clock", calibration=cost,
                      setting={"zeros_percent": zeros_percent})  # fmt: skip
