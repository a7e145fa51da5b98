"""One training step under levers, part by part; and batches made larger or smaller."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from itertools import islice, pairwise
from typing import Any, NamedTuple

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations.levers import Levers
from effkit.device import synchronize
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
        with levers.applied(model), torch.no_grad() if update is None else nullcontext():
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


def phases_ns(
    model: torch.nn.Module, batch: Any, loss: Loss, update: torch.optim.Optimizer | None, levers: Levers
) -> dict[str, int]:
    """How long each phase of such a step takes, by the clock."""
    begun: list[tuple[str, int, int]] = []  # a phase, when the one before it ended, and when it began

    def enter(phase: str) -> None:
        synchronize()
        ended = time.perf_counter_ns()
        begun.append((phase, ended, time.perf_counter_ns()))

    enter("")
    run(model, batch, loss, update, levers, enter)
    enter("")
    spent: Counter[str] = Counter()
    for (phase, _, since), (_, until, _) in pairwise(begun[1:]):
        spent[phase] += until - since
    return dict(spent)


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


class Length(NamedTuple):
    """The cells of a batch's sequences, and where they stand: the number of each tensor, and the dimension."""

    num_cells: int
    where: frozenset[tuple[int, int]]


def lengths(batch: Any) -> list[Length]:
    """What may be the sequences of a batch, the likeliest first: dimension 1 of a tensor, or the last of [B, C, T].

    With it go all dimensions of its size, or those at the same place. Sides of images are none.
    """
    given, found = _tensors(batch), []
    sizes = {(i, dim): size for i, tensor in enumerate(given) for dim, size in enumerate(tensor.shape) if dim}
    for (i, dim), size in sizes.items():
        alike = frozenset(place for place, other in sizes.items() if other == size)
        image = given[i].dim() > 3 or (given[0].dim() > 3 and any(number == 0 for number, _ in alike))
        if size > 1 and not image and (dim == 1 or size > given[i].shape[1]):
            found += [Length(size, alike), Length(size, frozenset(place for place in alike if place[1] == dim))]
    return list(dict.fromkeys(found))


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


def resized(batch: Any, num_rows: int, num_cells: int | None = None, length: Length | None = None) -> Any:
    """The batch with another batch size and another sequence length: contents repeated, or cut off.

    Dimension 0 becomes ``num_rows``, the dimensions of ``length`` become ``num_cells``. Where that rule does not fit,
    make the batches yourself.
    """
    if num_rows == rows(batch) and (length is None or num_cells in (None, length.num_cells)):
        return batch
    numbers = {id(tensor): number for number, tensor in enumerate(_tensors(batch))}

    def fit(tensor: torch.Tensor) -> torch.Tensor:
        number = numbers[id(tensor)]
        for dim, size in enumerate(tensor.shape):
            varies = length is not None and (number, dim) in length.where
            new_size = num_rows if dim == 0 else num_cells if varies else size
            if new_size is not None and new_size != size:
                if tensor.layout != torch.strided:
                    raise ValueError("a sparse tensor cannot be repeated or cut: give make_batch=, which makes others")
                tensor = tensor.index_select(dim, torch.arange(new_size, device=tensor.device) % size)
        return tensor

    return tree_map_only(torch.Tensor, fit, batch)


def _tensors(batch: Any) -> list[torch.Tensor]:
    found = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, torch.Tensor)]
    if not found:
        raise ValueError("a batch holds tensors: a mapping of keyword arguments, a tuple of arguments, or one tensor")
    return found
