"""What lossy levers do to the gradient, as companions of an account: never bytes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch.nn.modules.batchnorm import _NormBase

from effkit.account import Account
from effkit.activations import stepping
from effkit.activations.gradients import Gradients, compared, gradients
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
    return _error(gradients(model, batch, loss, nullcontext()), model, batch, levers, loss)


def _error(exact: Gradients, model: torch.nn.Module, batch: Any, levers: Levers, loss: Loss) -> Account:
    error = _ppm(exact, gradients(model, batch, loss, levers.applied(model)))
    return Account.of(ERROR, "ppm", {" and ".join(lossy(levers)): error}, total=error,
                      source="|g' - g| / |g| over all parameters, on this batch")  # fmt: skip


def noise(model: torch.nn.Module, batch: Any, loss: Loss) -> tuple[Account, ...]:
    """The same of one half batch's gradient against the other's; nothing for a batch of one row."""
    if stepping.rows(batch) < 2:
        return ()
    first, second = stepping.parts(batch, 2)
    noise = _ppm(*(gradients(model, half, loss, nullcontext()) for half in (first, second)))
    return (Account.of(NOISE, "ppm", {"noise": noise}, total=noise, source="the same, between half batches"),)


def parts_error(model: torch.nn.Module, batch: Any, loss: Loss) -> float:
    """The relative error of the gradient of two micro-batches, without dropout; nan for a batch of one row.

    Not rounding where examples see each other, as in batch norms and contrastive losses, or count unequally.
    """
    if stepping.rows(batch) < 2:
        return math.nan
    found: list[torch.Tensor] = []
    for count in (1, 2):
        with unchanged(model), torch.enable_grad():
            for module in model.modules():  # these are the same in both modes, but for what is to be seen here
                module.training = module.training and isinstance(module, _NormBase | torch.nn.RNNBase)
            for part in stepping.parts(batch, count):
                (loss(forward(model, part)) * (stepping.rows(part) / stepping.rows(batch))).backward()
            given = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found.append(torch.cat([gradient.to_dense().double().flatten() for gradient in given]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def calibrated(model: torch.nn.Module, batch: Any, tried: Sequence[Levers], loss: Loss) -> dict[str, Any]:
    """What a calibration keeps: the error of each lossy lever of those that were ``tried`` alone, and of parts."""
    exact = gradients(model, batch, loss, nullcontext())
    errors = {name: _error(exact, model, batch, lever, loss) for lever in tried for name in lossy(lever)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    rounding = max(torch.finfo(parameter.dtype).eps for parameter in trained)
    return {"errors": errors, "parts_error": parts_error(model, batch, loss), "rounding_frac": rounding}


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


def _ppm(exact: Gradients, other: Gradients) -> int:
    """Of all parameters together, the last row."""
    return round(float(compared(exact, other)["relative_error"].iloc[-1]) * 1_000_000)
