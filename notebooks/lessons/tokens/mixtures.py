"""Two ways to try mixtures of data without training on all of them: average trained parts, or fit a law to few runs."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit import Account, WhatIf
from effkit.view.style import GREY, OKABE_ITO, axes
from effkit.whatif import Slider
from lessons.tokens.next_letter import NextLetter, bits, train

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_RATE = 2e-3  # of continued training: where the seed model's own rate ended
_RATIO_EXPONENTS, _STEP_EXPONENTS = np.linspace(0.1, 4.0, 40), np.linspace(0.0, 1.5, 31)


def seed_model(text: torch.Tensor, *, num_steps: int = 1500, seed: int = 0) -> NextLetter:
    """A model of one text, its learning rate lowered at the end, from which trainings continue."""
    torch.manual_seed(seed)
    model = train(NextLetter(), [text], num_steps=num_steps, seed=seed)
    return train(model, [text], num_steps=num_steps // 4, learning_rate=_RATE, seed=seed + 1)


def averaged(models: Sequence[nn.Module]) -> nn.Module:
    """A model whose parameters are the mean of theirs (arXiv 2410.15661); they stay as they are.

    Raises
    ------
    ValueError
        When there is none, or they are not of one shape.
    """
    if not models:
        raise ValueError("there is no model to average, expected at least one")
    shapes = {tuple(parameter.shape for parameter in model.parameters()) for model in models}
    if len(shapes) > 1:
        raise ValueError(f"the models have {len(shapes)} different shapes of parameters, expected one")
    mean = copy.deepcopy(models[0])
    with torch.no_grad():
        for own, *all_of_them in zip(mean.parameters(), *(model.parameters() for model in models), strict=True):
            own.copy_(torch.stack([one.detach() for one in all_of_them]).mean(dim=0))
    return mean


def merging(
    base: NextLetter,
    parts: Mapping[str, torch.Tensor],
    held_out: Mapping[str, torch.Tensor],
    *,
    num_steps: int = 100,
    seed: int = 0,
) -> pd.DataFrame:
    """Every mixture of two parts or more twice: trained on, and as the average of models trained on its parts.

    A mixture is trained for as many steps as its parts together.

    Returns
    -------
    DataFrame
        Indexed by ``mixture`` (names joined by ``+``) and ``held_out``: ``trained`` and ``averaged`` [bits per letter].
    """
    of_part = {
        name: train(copy.deepcopy(base), [text], num_steps=num_steps, learning_rate=_RATE, seed=100 * seed + number)
        for number, (name, text) in enumerate(parts.items())
    }
    rows = {}
    for size in range(2, len(parts) + 1):
        for names in itertools.combinations(parts, size):
            mean = averaged([of_part[name] for name in names])
            assert isinstance(mean, NextLetter)
            mixed = train(copy.deepcopy(base), [parts[name] for name in names], num_steps=num_steps * size,
                          learning_rate=_RATE, seed=100 * seed + 50)  # fmt: skip
            for target, text in held_out.items():
                rows["+".join(names), target] = bits(mixed, text), bits(mean, text)
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["trained", "averaged"])
    frame.index = pd.MultiIndex.from_tuples(list(rows), names=["mixture", "held_out"])
    return frame


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """How well averages rank mixtures, per held-out text.

    Returns
    -------
    DataFrame
        Indexed by ``held_out``: ``all_mixtures``, the rank correlation over all; ``with_it``, over those that hold the
        part of that name, which takes away what anyone would have guessed; ``gap``, averaged minus trained [bits per
        letter], its mean.
    """
    rows = {}
    for target, group in table.groupby(level="held_out", sort=False):
        names = group.index.get_level_values("mixture")
        inside = group[[str(target) in name.split("+") for name in names]]
        rows[target] = {
            "all_mixtures": rank_correlation(group["trained"], group["averaged"]),
            "with_it": rank_correlation(inside["trained"], inside["averaged"]),
            "gap": (group["averaged"] - group["trained"]).mean(),
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("held_out")


def costs(num_parts: int, *, num_steps: int = 100) -> pd.DataFrame:
    """What it costs to rank all mixtures of so many parts, the parts themselves among them.

    Averages need one training per part. Each of the ``2^n - 1`` mixtures is trained for as many steps as its parts
    together, which is ``n 2^(n-1)`` times the steps of one part.

    Returns
    -------
    DataFrame
        Indexed by ``way`` (``averaged``, ``trained``): ``trainings`` and ``steps``.
    """
    return pd.DataFrame(
        {
            "trainings": [num_parts, 2**num_parts - 1],
            "steps": [num_parts * num_steps, num_parts * 2 ** (num_parts - 1) * num_steps],
        },
        index=pd.Index(["averaged", "trained"], name="way"),
    )


def scatter(table: pd.DataFrame, *, title: str) -> Axes:
    """Loss of the average over the loss of the trained mixture, one colour per held-out text; equal on the line."""
    ax = axes(None, (7.4, 3.2))
    ends = [table["trained"].min(), table["trained"].max()]
    ax.plot(ends, ends, color=GREY, linestyle="--", linewidth=1, label="equal")
    for (text, rows), shade, marker in zip(table.groupby(level="held_out"), OKABE_ITO, "os^D", strict=False):
        ax.plot(rows["trained"], rows["averaged"], color=shade, marker=marker, linestyle="none", label=str(text))
    ax.set(xlabel="trained on the mixture [bits per letter]", ylabel="averaged [bits per letter]")
    ax.set_title(title, loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8)
    return ax


def rank_correlation(a: Sequence[float] | pd.Series[float], b: Sequence[float] | pd.Series[float]) -> float:
    """Spearman's: the correlation of ranks, ties sharing theirs."""
    return float(pd.Series(list(a)).rank().corr(pd.Series(list(b)).rank()))


def continued(
    base: NextLetter,
    general: tuple[torch.Tensor, torch.Tensor],
    domain: tuple[torch.Tensor, torch.Tensor],
    ratios: Sequence[float],
    *,
    num_steps: int = 450,
    every: int = 150,
    seed: int = 0,
) -> pd.DataFrame:
    """Go on training a model of general text on mixtures with a domain.

    The optimizer starts anew after each look, every ``every`` steps: its moments are forgotten.

    Parameters
    ----------
    general, domain
        Text to train on, and held out.
    ratios
        Shares of the domain in what is read, from 0 to 1.

    Returns
    -------
    DataFrame
        Indexed by ``ratio_frac`` and ``step``: ``general`` and ``domain``, change of the held-out loss since the start
        [bits per letter].
    """
    before = [bits(base, text[1], 8_000) for text in (general, domain)]
    rows = {}
    for ratio in ratios:
        model = copy.deepcopy(base)
        for block in range(1, num_steps // every + 1):
            train(model, [general[0], domain[0]], [1 - ratio, ratio], num_steps=every, learning_rate=_RATE,
                  seed=1000 * seed + block)  # fmt: skip
            after = [bits(model, text[1], 8_000) for text in (general, domain)]
            rows[ratio, block * every] = after[0] - before[0], after[1] - before[1]
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=["general", "domain"])
    frame.index = pd.MultiIndex.from_tuples(list(rows), names=["ratio_frac", "step"])
    return frame


@dataclass(frozen=True)
class MixtureLaw:
    """What a mixture does to a loss: change = offset + scale * ratio**s * steps**t [bits per letter].

    CMR (arXiv 2407.17467) finds power laws in the ratio and in the tokens; that they multiply is assumed here.
    """

    offset: float
    scale: float
    s: float
    t: float
    error: float  # root mean square of the fit [bits per letter]
    ratios: tuple[float, float] = (0.0, 1.0)  # least and most that were fitted

    def change(self, ratio: float, step: float) -> float:
        """Of the loss [bits per letter] after so many steps with that share of the domain."""
        return self.offset + self.scale * ratio**self.s * step**self.t

    def critical_ratio(self, step: float, tolerance: float) -> float:
        """The largest share of the domain, from 0 to 1, at which the loss rises by the tolerance at most.

        Raises
        ------
        ValueError
            When no share keeps to it.
        """
        room = tolerance - self.offset
        if room < 0:
            raise ValueError(
                f"even without the domain the loss changes by {self.offset:.3f}, more than {tolerance:.3f}"
            )
        if self.scale <= 0:
            return 1.0
        return float(min(1.0, (room / (self.scale * step**self.t)) ** (1 / self.s)))


RISE = "Rise of the general loss"


class Forecast(NamedTuple):
    """A law, the steps that it is asked for, and how far runs of other seeds lay from it.

    ``misses`` are the ends of the interval of one more seed: run minus law [bits per letter].
    """

    law: MixtureLaw
    num_steps: int
    misses: tuple[float, float]


def risen(ratio: float, rise: float, forecast: Forecast | None = None) -> Account:
    """What was measured at a share of the domain, as an Account [thousandths of a bit per letter].

    A fall of the loss is a total below zero, without a row.
    """
    total = round(1000 * rise)
    return Account.of(
        RISE, "millibits per letter", {"rise": max(0, total)}, total=total, source="the held-out text",
        setting={"domain_frac": round(ratio, 3)}, calibration=forecast,
    )  # fmt: skip


def predict(base: Account, *, domain_frac: float) -> Account:
    """The rise at another share of the domain, by the law that the base carries; a pure function.

    Its band is where one more seed would lie in 95%, by how far the stored seeds lay from their laws.
    """
    if domain_frac == base.setting["domain_frac"]:
        return base
    forecast: Forecast = base.calibration
    change = forecast.law.change(domain_frac, forecast.num_steps)
    total = round(1000 * change)
    low, high = (round(1000 * (change + miss)) for miss in forecast.misses)
    least, most = forecast.law.ratios
    return Account.of(
        RISE, "millibits per letter", {"rise": max(0, total)}, total=total, source="the fitted law", basis="derived",
        low=min(low, total), high=max(high, total), in_range=least <= domain_frac <= most,
        setting={"domain_frac": round(domain_frac, 3)}, calibration=forecast,
    )  # fmt: skip


def whatif(base: Account, run: Callable[[float], float]) -> WhatIf:
    """A slider over the share of the domain; its button trains, with ``run`` from a share to a rise."""

    def measure(progress: Callable[[int, int], None], *, domain_frac: float) -> Account:
        progress(0, 1)
        found = risen(domain_frac, run(domain_frac))
        progress(1, 1)
        return found

    knob = Slider(
        "domain_frac", "Share of code [%]", 30, 95, 1, "Of the letters that the model goes on with", scale=0.01
    )
    return WhatIf(base, predict, (knob,), measure)


def fit(table: pd.DataFrame) -> MixtureLaw:
    """The law of the general loss by least squares: exponents from grids (s 0.1 to 4, t 0 to 1.5), the rest exactly.

    Raises
    ------
    ValueError
        When there are fewer runs than the law has numbers.
    """
    if len(table) < 4:
        raise ValueError(f"{len(table)} measurements, expected at least 4: the law has four numbers")
    ratio, step = (table.index.get_level_values(name).to_numpy(float) for name in ("ratio_frac", "step"))
    target = table["general"].to_numpy(float)
    best: MixtureLaw | None = None
    for s in _RATIO_EXPONENTS:
        for t in _STEP_EXPONENTS:
            design = np.stack([np.ones_like(ratio), ratio**s * step**t], axis=1)
            solution, *_ = np.linalg.lstsq(design, target, rcond=None)
            error = float(np.sqrt(np.mean((design @ solution - target) ** 2)))
            if best is None or error < best.error:
                best = MixtureLaw(float(solution[0]), float(solution[1]), float(s), float(t), error)
    assert best is not None
    return replace(best, ratios=(float(ratio.min()), float(ratio.max())))
