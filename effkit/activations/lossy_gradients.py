"""What lossy levers do to the gradient, as companions of an account: never bytes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch.nn.modules.batchnorm import _NormBase

from effkit.account import Account
from effkit.activations import stepping
from effkit.activations.gradients import gradient_error
from effkit.activations.levers import NONE, Levers
from effkit.restoring import unchanged
from effkit.training import Loss, forward

ERROR, NOISE = "Gradient error", "Gradient noise between half batches"
_SPREAD = 2  # an error seen once, at one batch and one state of the weights, is known to about this factor


def lossy(levers: Levers) -> list[str]:
    """Names of the levers in force that change the gradient."""
    return [f"{name} {form}" for name in ("compress", "autocast") if (form := getattr(levers, name)) != NONE]


def measured(model: torch.nn.Module, batch: Any, levers: Levers, loss: Loss) -> Account:
    """The relative error of the gradient under these levers [ppm]."""
    error = _ppm(gradient_error(model, batch, lambda: levers.applied(model), loss=loss)["relative_error"])
    return Account.of(ERROR, "ppm", {" and ".join(lossy(levers)): error}, total=error,
                      source="|g' - g| / |g| over all parameters, on this batch")  # fmt: skip


def noise(model: torch.nn.Module, batch: Any, loss: Loss) -> tuple[Account, ...]:
    """The same of one half batch's gradient against the other's; nothing for a batch of one row."""
    if stepping.rows(batch) < 2:
        return ()
    first, second = stepping.parts(batch, 2)
    noise = _ppm(gradient_error(model, first, nullcontext, loss=loss, batches=[second])["noise_relative_error"])
    return (Account.of(NOISE, "ppm", {"noise": noise}, total=noise, source="the same, between half batches"),)


def parts_error(model: torch.nn.Module, batch: Any, loss: Loss) -> float:
    """The relative error of the gradient of two micro-batches, without dropout; nan for a batch of one row.

    Not rounding where examples see each other, as in batch norms and contrastive losses, or count unequally.
    """
    if stepping.rows(batch) < 2:
        return math.nan
    gradients: list[torch.Tensor] = []
    for count in (1, 2):
        with unchanged(model), torch.enable_grad():
            for module in model.modules():  # these are the same in both modes, but for what is to be seen here
                module.training = module.training and isinstance(module, _NormBase | torch.nn.RNNBase)
            for part in stepping.parts(batch, count):
                (loss(forward(model, part)) * (stepping.rows(part) / stepping.rows(batch))).backward()
            given = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            gradients.append(torch.cat([gradient.to_dense().double().flatten() for gradient in given]))
    return float((gradients[1] - gradients[0]).norm() / gradients[0].norm())


def parts_change(calibration: Any) -> bool:
    """Whether micro-batches change the gradient by more than rounding: not in the first half of its digits."""
    return bool(calibration.parts_error > calibration.rounding_frac**0.5)


def predicted(levers: Levers, errors: Mapping[str, Account], noise: tuple[Account, ...]) -> tuple[Account, ...]:
    """The errors of the levers in force, each seen alone, as if independent; and the noise that was seen."""
    names = lossy(levers)
    if not names or not errors.keys() >= set(names):
        return ()
    squares = {name: errors[name].total ** 2 for name in names}
    total = round(math.sqrt(sum(squares.values())))
    rows = {name: round(total * square / (sum(squares.values()) or 1)) for name, square in squares.items()}
    return (
        Account.of(ERROR, "ppm", rows, total=total, basis="derived", source="each lever alone, added in quadrature",
                   low=total // _SPREAD, high=total * _SPREAD),
        # seen, not predicted: under a title of its own, so that a receipt does not set it against another batch's
        *(replace(account, title=f"{NOISE}, as measured") for account in noise),
    )  # fmt: skip


def _ppm(errors: pd.Series[float]) -> int:
    """Of all parameters together, the last row."""
    return round(float(errors.iloc[-1]) * 1_000_000)
