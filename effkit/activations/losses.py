"""What lossy levers do to the gradient, as companions of an account: never bytes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
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


def measured(model: torch.nn.Module, batch: Any, levers: Levers, loss: Loss) -> tuple[Account, ...]:
    """The relative error of the gradient under these levers [ppm], and of one half batch's against the other's."""
    if not lossy(levers):
        return ()
    errors = gradient_error(model, batch, lambda: levers.applied(model), loss=loss).set_index("parameter")
    error = _ppm(errors.loc[ALL, "relative_error"])
    found = [Account.of(ERROR, "ppm", {" and ".join(lossy(levers)): error}, total=error,
                        source="|g' - g| / |g| over all parameters, on this batch")]  # fmt: skip
    if stepping.rows(batch) > 1:
        first, second = stepping.parts(batch, 2)
        noises = gradient_error(model, first, lambda: Levers().applied(model), loss=loss, batches=[second])
        noise = _ppm(noises.set_index("parameter").loc[ALL, "noise_relative_error"])
        found.append(Account.of(NOISE, "ppm", {"noise": noise}, total=noise, source="the same, between half batches"))
    return tuple(found)


def predicted(levers: Levers, seen: Mapping[str, tuple[Account, ...]]) -> tuple[Account, ...]:
    """The errors of the levers in force, each seen alone, as independent of one another."""
    known = {name: seen[name] for name in lossy(levers) if name in seen}
    if not known or len(known) < len(lossy(levers)):
        return ()
    squares = {name: accounts[0].total ** 2 for name, accounts in known.items()}
    total = round(math.sqrt(sum(squares.values())))
    rows = {name: round(total * square / (sum(squares.values()) or 1)) for name, square in squares.items()}
    # seen, not predicted: under a title of its own, so that a receipt does not set it against another batch's
    noise = [replace(account, title=f"{NOISE}, as measured") for account in next(iter(known.values()))[1:]]
    return (
        Account.of(ERROR, "ppm", rows, total=total, basis="derived", source="each lever alone, added in quadrature",
                   low=total // _SPREAD, high=total * _SPREAD),
        *noise,
    )  # fmt: skip


def _ppm(value: Any) -> int:
    return round(float(value) * _MILLION)
