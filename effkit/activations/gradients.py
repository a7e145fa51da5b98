"""gradient_error(): how far a lossy lever moves the gradient, beside how far another batch does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from effkit.arguments import LOSS, checked_function, checked_model
from effkit.progress_bar import advance, working
from effkit.restoring import unchanged
from effkit.training import Loss, forward, own_loss

ALL = "all"
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
