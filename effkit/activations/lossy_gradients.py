"""What lossy levers do to the gradient, as companions of an account: never bytes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch

from effkit.account import Account
from effkit.activations import stepping
from effkit.activations.gradients import ALL, gradient_error
from effkit.activations.levers import NONE, Levers
from effkit.training import Loss

ERROR, NOISE = "Gradient error", "Gradient noise between half batches"
_MILLION = 1_000_000
_SPREAD = 2  # an error seen once, at one batch and one state of the weights, is known to about this factor


def lossy(levers: Levers) -> dict[str, Levers]:
    """Of the levers in force those that change the gradient, each alone, by name."""
    return {f"{name} {value}": Levers(**{name: value}) for name in ("compress", "autocast")
            if (value := getattr(levers, name)) != NONE}  # fmt: skip


def measured(model: torch.nn.Module, batch: Any, levers: Levers, loss: Loss) -> Account:
    """The relative error of the gradient under these levers [ppm]."""
    errors = gradient_error(model, batch, lambda: levers.applied(model), loss=loss).set_index("parameter")
    error = _ppm(errors.loc[ALL, "relative_error"])
    return Account.of(ERROR, "ppm", {" and ".join(lossy(levers)): error}, total=error,
                      source="|g' - g| / |g| over all parameters, on this batch")  # fmt: skip


def noise(model: torch.nn.Module, batch: Any, loss: Loss) -> tuple[Account, ...]:
    """The same of one half batch's gradient against the other's; nothing for a batch of one row."""
    if stepping.rows(batch) < 2:
        return ()
    first, second = stepping.parts(batch, 2)
    noises = gradient_error(model, first, nullcontext, loss=loss, batches=[second]).set_index("parameter")
    amount = _ppm(noises.loc[ALL, "noise_relative_error"])
    return (Account.of(NOISE, "ppm", {"noise": amount}, total=amount, source="the same, between half batches"),)


def predicted(levers: Levers, errors: Mapping[str, Account], noise: tuple[Account, ...]) -> tuple[Account, ...]:
    """The errors of the levers in force, each seen alone, as if independent; and the noise that was seen."""
    known = {name: errors[name].total ** 2 for name in lossy(levers) if name in errors}
    if not known or len(known) < len(lossy(levers)):
        return ()
    total = round(math.sqrt(sum(known.values())))
    rows = {name: round(total * square / (sum(known.values()) or 1)) for name, square in known.items()}
    return (
        Account.of(ERROR, "ppm", rows, total=total, basis="derived", source="each lever alone, added in quadrature",
                   low=total // _SPREAD, high=total * _SPREAD),
        # seen, not predicted: under a title of its own, so that a receipt does not set it against another batch's
        *(replace(account, title=f"{NOISE}, as measured") for account in noise),
    )  # fmt: skip


def _ppm(value: Any) -> int:
    return round(float(value) * _MILLION)
