"""gradient_error(): how far a lossy lever moves the gradient, beside how far another batch does; and the same as
companions of an account: never bytes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from effkit.account import Account
from effkit.activations import stepping
from effkit.activations.levers import NONE, Levers
from effkit.arguments import LOSS, checked_function, checked_model
from effkit.progress_bar import advance, working
from effkit.restoring import unchanged
from effkit.training import Loss, forward, own_loss

ALL = "all"
ERROR, NOISE = "Gradient error", "Gradient noise between half batches"
_SPREAD = 2  # an error seen once, at one batch and one state of the weights, is known to about this factor
Gradients = dict[str, Tensor]


@working("Comparing gradients")
def gradient_error(
    model: nn.Module, batch: Any, levers: Callable[[], AbstractContextManager[Any]], *, loss: Loss | None = None,
    batches: Sequence[Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """The error of the gradient under levers, per parameter and in all, beside the noise between minibatches.

    Forward and backward run once plainly, once under the levers and once per other batch, all with the same random
    numbers. The model comes out as it went in: gradients, buffers and random state are untouched.

    Parameters
    ----------
    model
        Any module, in the mode in which it is trained.
    batch
        A dict is given as keyword arguments, a tuple or list as arguments, anything else as the one argument.
    levers
        Yields a context to run in, such as ``lambda: compressed("int8")``; called once.
    loss
        Model output -> scalar; ``output.loss`` unless given.
    batches
        Other batches, for the noise: without any, it is nan.

    Returns
    -------
    pandas.DataFrame
        One row per parameter that requires a gradient and gets one, and ``"all"`` last. ``parameter``;
        ``num_elements``; ``relative_error`` = ||g' - g|| / ||g||; ``cosine`` of g' and g, nan when one is 0;
        ``noise_relative_error``, ``noise_cosine``: the same two with the gradient of another batch as g', mean over
        ``batches``.
    """
    checked_model(model)
    checked_function("loss", loss, LOSS)
    to_loss = loss or own_loss
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"gradient_error() compares gradients, and no parameter of {type(model).__name__} requires one: call "
            "requires_grad_() on those that are trained"
        )
    exact = gradients(model, batch, to_loss, nullcontext())
    figures = compared(exact, gradients(model, batch, to_loss, levers()))
    noise = [compared(exact, gradients(model, other, to_loss, nullcontext())) for other in batches or []]
    mean = sum(noise) / len(noise) if noise else figures * float("nan")
    table = figures.join(mean.add_prefix("noise_"))
    sizes = [gradient.numel() for gradient in exact.values()]
    table.insert(0, "num_elements", [*sizes, sum(sizes)])
    return table.rename_axis("parameter").reset_index()


def gradients(model: nn.Module, batch: Any, to_loss: Loss, levers: AbstractContextManager[Any]) -> Gradients:
    """Gradients by name, with the model's own left alone."""
    advance()
    with unchanged(model), torch.enable_grad():
        with levers:
            loss = to_loss(forward(model, batch))
        loss.backward()  # not autograd.grad(), which a model that checkpoints by reentering refuses
        return {name: parameter.grad.to_dense() if parameter.grad.is_sparse else parameter.grad
                for name, parameter in model.named_parameters() if parameter.grad is not None}  # fmt: skip


def compared(exact: Gradients, other: Gradients) -> pd.DataFrame:
    """``relative_error`` and ``cosine`` by parameter, and of all as one vector."""
    rows = {}
    for name, gradient in exact.items():
        g = gradient.double()
        # a parameter that another batch does not reach, as an expert of a mixture, has a gradient of 0
        h = other[name].double() if name in other else torch.zeros_like(g)
        sums = (h - g).square().sum(), g.square().sum(), h.square().sum(), (g * h).sum()
        rows[name] = [float(amount) for amount in sums]
    squares = pd.DataFrame.from_dict(rows, orient="index", columns=["error", "exact", "other", "product"])
    squares.loc[ALL] = squares.sum()
    relative = (squares["error"] / squares["exact"]) ** 0.5
    cosine = squares["product"] / (squares["exact"] * squares["other"]) ** 0.5
    return pd.DataFrame({"relative_error": relative.where(squares["error"] > 0, 0.0), "cosine": cosine})


def lossy(levers: Levers) -> list[str]:
    """Names of the levers in force that change the gradient."""
    return [f"{name} {form}" for name in ("compress", "autocast") if (form := getattr(levers, name)) != NONE]


def error(model: nn.Module, batch: Any, levers: Levers, loss: Loss, exact: Gradients | None = None) -> Account:
    """The relative error of the gradient under these levers [ppm], from the ``exact`` one, if that is known."""
    exact = exact or gradients(model, batch, loss, nullcontext())
    amount = _ppm(exact, gradients(model, batch, loss, levers.applied(model)))
    return Account.of(ERROR, "ppm", {" and ".join(lossy(levers)): amount}, total=amount,
                      source="|g' - g| / |g| over all parameters, on this batch")  # fmt: skip


def noise(model: nn.Module, batch: Any, loss: Loss) -> tuple[Account, ...]:
    """The same of one half batch's gradient against the other's; nothing for a batch of one row."""
    if stepping.rows(batch) < 2:
        return ()
    first, second = stepping.parts(batch, 2)
    noise = _ppm(*(gradients(model, half, loss, nullcontext()) for half in (first, second)))
    return (Account.of(NOISE, "ppm", {"noise": noise}, total=noise, source="the same, between half batches"),)


def parts_error(model: nn.Module, batch: Any, loss: Loss) -> float:
    """The relative error of the gradient of two micro-batches, without dropout; nan for a batch of one row.

    Not rounding where examples see each other, as in batch norms and contrastive losses, or count unequally.
    """
    if stepping.rows(batch) < 2:
        return math.nan
    found: list[torch.Tensor] = []
    for count in (1, 2):
        with unchanged(model), torch.enable_grad():
            for module in model.modules():  # these are the same in both modes, but for what is to be seen here
                module.training = module.training and isinstance(module, _NormBase | nn.RNNBase)
            for part in stepping.parts(batch, count):
                (loss(forward(model, part)) * (stepping.rows(part) / stepping.rows(batch))).backward()
            given = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
            found.append(torch.cat([gradient.to_dense().double().flatten() for gradient in given]))
    return float((found[1] - found[0]).norm() / found[0].norm())


def calibrated(model: nn.Module, batch: Any, tried: Sequence[Levers], loss: Loss) -> dict[str, Any]:
    """What a calibration keeps: the error of each lossy lever of those that were ``tried`` alone, and of parts."""
    exact = gradients(model, batch, loss, nullcontext())
    errors = {name: error(model, batch, lever, loss, exact) for lever in tried for name in lossy(lever)}
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
