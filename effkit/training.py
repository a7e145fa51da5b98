"""One steady training step, or an evaluation, of any model: what the analyses run."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves

from effkit.arguments import OPTIMIZER, described
from effkit.idle import give_way

Loss = Callable[[Any], torch.Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]
# what a sparse tensor is made of
_BY_ROWS, _BY_COLUMNS = ("crow_indices", "col_indices", "values"), ("ccol_indices", "row_indices", "values")
_PARTS = {torch.sparse_coo: ("_indices", "_values"), torch.sparse_csr: _BY_ROWS, torch.sparse_bsr: _BY_ROWS,
          torch.sparse_csc: _BY_COLUMNS, torch.sparse_bsc: _BY_COLUMNS}  # fmt: skip


def forward(model: torch.nn.Module, batch: Any) -> Any:
    """The model's output for a batch: a mapping is its keyword arguments, a tuple or list its arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def own_loss(output: Any) -> torch.Tensor:
    """The loss that the model computed itself, as models of transformers do when they are given labels."""
    loss = output if isinstance(output, torch.Tensor) and output.dim() == 0 else getattr(output, "loss", None)
    if not isinstance(loss, torch.Tensor):
        raise ValueError(
            f"the output, a {type(output).__name__}, has no loss: give the batch its labels, or loss=(output) -> scalar"
        )
    return loss


def still(parameters: Any, make: MakeOptimizer | None = None) -> torch.optim.Optimizer:
    """The optimizer (AdamW unless another is made) with learning rate 0: all of a step's work, and nothing learned."""
    update = (make or torch.optim.AdamW)(parameters)
    if not hasattr(update, "param_groups"):
        raise TypeError(f"optimizer is a function {OPTIMIZER}; it returned {described(update)}")
    for group in update.param_groups:
        group["lr"] = 0.0
    return update


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure given to an optimizer's step returns, run with gradients; None without one."""
    with torch.enable_grad():
        return None if closure is None else closure()


class PerParameter(torch.optim.Optimizer):
    """An optimizer that updates each parameter by itself: a subclass has ``_update``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns."""
        loss = loss_of(closure)
        for settings in self.param_groups:
            for parameter in settings["params"]:
                give_way()
                if parameter.grad is not None:
                    self._update(parameter, settings)
        return loss

    def _update(self, parameter: torch.Tensor, settings: dict[str, Any]) -> None:
        raise NotImplementedError


def residents(
    model: torch.nn.Module, update: torch.optim.Optimizer | Iterable[torch.optim.Optimizer] | None, batch: Any
) -> dict[str, list[torch.Tensor]]:
    """What is in memory all through a step, by category; a storage that several share stands once."""
    updates = [] if update is None else [update] if isinstance(update, torch.optim.Optimizer) else update
    # one that holds the states of some parameters has an optimizer of these
    states = [list(getattr(optimizer, "optim", optimizer).state.values()) for optimizer in updates]
    tensors: dict[str, list[torch.Tensor]] = {"parameter": [], "buffer": [], "optimizer state": [], "input": []}
    seen: set[int] = set()
    values = [list(model.parameters()), list(model.buffers()), states, batch]
    for category, leaves in zip(tensors, map(tree_leaves, values), strict=True):
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor) and not seen.issuperset(keys := storage_keys(leaf)):
                seen.update(keys)
                tensors[category].append(leaf)
    return tensors


def storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """Where its values lie; of a sparse tensor, its indices too; of a shard, this rank's part."""
    if wraps(type(tensor)):
        return [storage for part in parts_of(tensor) for storage in storages(part)]
    if tensor.layout == torch.strided:
        return [tensor.untyped_storage()]
    with no_dispatch():  # to ask is no operator of the step
        return [getattr(tensor, part)().untyped_storage() for part in _PARTS.get(tensor.layout, ())]


@cache  # asked of each tensor of each operator
def wraps(kind: type) -> bool:
    """Whether tensors of this class only wrap others, as a shard wraps this rank's part."""
    return hasattr(kind, "__tensor_flatten__")


def parts_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that one is made of which only :func:`wraps` others."""
    held = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])  # type: ignore[attr-defined]
    return [one for one in held if isinstance(one, torch.Tensor)]


def storage_keys(tensor: torch.Tensor) -> list[int]:
    """What tells these storages from others, while they live."""
    return [storage._cdata for storage in storages(tensor)]


def states_replaced(updates: Iterable[torch.optim.Optimizer]) -> Callable[[], bool]:
    """Asked after a step: whether it has put other tensors into the place of these optimizers' states."""
    leaves = tree_leaves([list(update.state.values()) for update in updates])
    before = [weakref.ref(one) for leaf in leaves if isinstance(leaf, torch.Tensor) for one in storages(leaf)]
    return lambda: any(storage() is None for storage in before)


def drop_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let go of all gradients, whoever may have taken over ``zero_grad``."""
    for parameter in parameters:
        parameter.grad = None


def size_bytes(tensors: Any) -> int:
    """Bytes of the storages of these tensors, which share none."""
    return sum(storage.nbytes() for tensor in tensors for storage in storages(tensor))


@contextmanager
def evaluating(*models: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients within; afterwards every module is in the mode that it was in."""
    before = [(module, module.training) for model in models for module in model.modules()]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in before:
            module.training = mode
