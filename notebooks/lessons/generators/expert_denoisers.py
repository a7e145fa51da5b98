"""One denoiser for all times, or one branched into experts of intervals (eDiff-I), at equal training FLOPs."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pandas as pd
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from lessons.generators.flows import FlowModel, FlowTraining, noised


class IntervalTraining(FlowTraining):
    """Goes on with a trained denoiser, on times of one interval only.

    Parameters
    ----------
    trained
        What to branch from; copied with its optimizer's moments.
    low, high
        The interval: 0 is noise, 1 is data.
    rate
        Learning rate from here on.

    Raises
    ------
    ValueError
        For an empty interval or one outside [0, 1].
    """

    def __init__(self, trained: FlowTraining, low: float, high: float, *, rate: float = 2e-3) -> None:
        if not 0 <= low < high <= 1:
            raise ValueError(f"the interval is {low} to {high}, expected 0 <= low < high <= 1")
        self.__dict__.update(trained.__dict__)
        self.generator = torch.Generator()
        self.generator.set_state(trained.generator.get_state())
        self.model = copy.deepcopy(trained.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=rate, fused=True)
        self.optimizer.load_state_dict(copy.deepcopy(trained.optimizer.state_dict()))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.low, self.high = low, high

    def objective(self) -> torch.Tensor:
        """Flow matching at times within the interval."""
        clean, noise, time = self.batch()
        time = self.low + time * (self.high - self.low)
        x, velocity = noised(clean, noise, time)
        return F.mse_loss(self.model(x, time), velocity)


def branched(*, seeds: Sequence[int] = (0, 1, 2), shared_steps: int = 300, more_steps: int = 300) -> pd.DataFrame:
    """One denoiser trained on for all times, against two experts that share the same further steps.

    Both begin as the same denoiser after ``shared_steps``. Then one goes on for ``more_steps``; or each of two experts,
    one for the earlier (noisy) half of the times and one for the later, takes half of them: the same FLOPs in training.

    Returns
    -------
    DataFrame
        Indexed by ``seed`` and ``interval`` (``noisy half``, ``clean half``, ``all times``): held-out loss
        ``shared`` and ``experts``.
    """
    rows = {}
    for seed in seeds:
        trained = FlowTraining(seed)
        for _ in range(shared_steps):
            trained.step()
        shared = IntervalTraining(trained, 0, 1)
        experts = IntervalTraining(trained, 0, 0.5), IntervalTraining(trained, 0.5, 1)
        for training, steps in ((shared, more_steps), *((one, more_steps // 2) for one in experts)):
            for _ in range(steps):
                training.step()
        noisy = shared.times < 0.5
        alone = shared.losses()
        together = torch.where(noisy, experts[0].losses(), experts[1].losses())
        for name, chosen in (("noisy half", noisy), ("clean half", ~noisy), ("all times", noisy | ~noisy)):
            rows[seed, name] = {"shared": float(alone[chosen].mean()), "experts": float(together[chosen].mean())}
    frame = pd.DataFrame.from_dict(rows, orient="index")
    frame.index = pd.MultiIndex.from_tuples(list(rows), names=["seed", "interval"])
    return frame


def costs(num_experts: int = 2) -> pd.DataFrame:
    """What experts cost: parameters in memory grow with their number, FLOPs of a sampling step do not.

    Returns
    -------
    DataFrame
        Indexed by ``way`` (``shared``, ``experts``): ``parameters_bytes`` and ``flops`` of one sampling
        step for one picture, counted.
    """
    model = FlowModel()
    size_bytes = sum(one.nbytes for one in model.parameters())
    dimensions = model.writes.out_features
    rows = {}
    for name, models in (("shared", [model]), ("experts", [copy.deepcopy(model) for _ in range(num_experts)])):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            time = 0.7  # whatever the time, one of them runs
            models[int(time * len(models))](torch.zeros(1, dimensions), torch.tensor([time]))
        rows[name] = {"parameters_bytes": size_bytes * len(models), "flops": counter.get_total_flops()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("way")
