"""One training step under levers, part by part; and batches made larger or smaller."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations.levers import Levers
from effkit.training import Loss, forward

FORWARD, BACKWARD, OPTIMIZER = "forward", "backward", "optimizer"
Enter = Callable[[str], Any]


def run(
    model: torch.nn.Module, batch: Any, loss: Loss, update: torch.optim.Optimizer | None, levers: Levers,
    enter: Enter = lambda phase: None, most_parts: int | None = None,
) -> None:  # fmt: skip
    """Forward and backward of every micro-batch, then the optimizer's step; ``enter`` hears which phase begins.

    Without an optimizer to ``update``, the forward passes alone, without gradients. With ``most_parts`` the
    micro-batches after these are left out.
    """
    num_rows = rows(batch)
    for part in islice(parts(batch, levers.micro_batches), most_parts):
        enter(FORWARD)
        with levers.applied(model), torch.set_grad_enabled(update is not None):
            value = forward(model, part) if update is None else loss(forward(model, part))
        if update is None:
            continue
        _check(value)
        if levers.micro_batches > 1:
            value = value * (rows(part) / num_rows)
        enter(BACKWARD)
        value.backward()
        del value
    if update is None:
        return
    enter(OPTIMIZER)
    update.step()
    # last, so that the gradients of one step are not freed inside the next
    update.zero_grad(set_to_none=True)


def _check(value: Any) -> None:
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        given = tuple(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise ValueError(f"the loss is one number, a tensor of one element; given: {given}")
    if not value.requires_grad:
        raise ValueError(
            "the loss needs no gradient: a parameter must require one, and the model must not run under no_grad or "
            "inference_mode"
        )


def rows(batch: Any) -> int:
    """Size of dimension 0, the batch size, which all tensors of a batch share."""
    sizes = {tensor.shape[0] for tensor in _tensors(batch) if tensor.dim()}
    if len(sizes) != 1 or 0 in sizes:
        raise ValueError("the tensors of a batch share their first dimension, the batch size, and have at least one "
                         f"row; given: {sorted(sizes) or 'no tensor'}")  # fmt: skip
    return int(sizes.pop())


def length(batch: Any) -> int | None:
    """Size of the sequence dimension: 1 of the first tensor, if that is indices [B, S] or features [B, S, D]."""
    first = next(iter(_tensors(batch)))
    return int(first.shape[1]) if first.dim() == (3 if first.is_floating_point() else 2) else None


def parts(batch: Any, count: int) -> Iterator[Any]:
    """The batch in ``count`` parts of nearly equal size, the larger first: views, not copies."""
    size = rows(batch)
    if count > size:
        raise ValueError(f"a batch of {size} rows cannot be cut into {count} micro-batches; use at most {size}")
    if count == 1:
        yield batch
        return
    first = 0
    for i in range(count):
        num_rows = size // count + (i < size % count)
        yield tree_map_only(torch.Tensor, partial(_narrowed, first, num_rows), batch)
        first += num_rows


def _narrowed(first: int, num_rows: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.narrow(0, first, num_rows) if tensor.dim() else tensor


def resized(batch: Any, num_rows: int, num_cells: int | None = None) -> Any:
    """The batch with another batch size and another sequence length: contents repeated, or cut off.

    Dimension 0 becomes ``num_rows``; every later dimension that is as large as the batch's sequence length becomes
    ``num_cells``. Where that rule does not fit, make the batches yourself.
    """
    old_cells = length(batch)
    new_cells = old_cells if old_cells is None or num_cells is None else num_cells
    if (num_rows, new_cells) == (rows(batch), old_cells):
        return batch

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        for dim, size in enumerate(tensor.shape):
            new_size = num_rows if dim == 0 else new_cells if size == old_cells else size
            if new_size is not None and new_size != size:
                tensor = tensor.index_select(dim, torch.arange(new_size, device=tensor.device) % size)
        return tensor

    return tree_map_only(torch.Tensor, fit, batch)


def _tensors(batch: Any) -> list[torch.Tensor]:
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if not tensors:
        raise ValueError("a batch holds tensors: a mapping of keyword arguments, a tuple of arguments, or one tensor")
    return tensors
