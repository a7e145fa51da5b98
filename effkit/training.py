"""One steady training step, or an evaluation, of any model: what the analyses run, and how they leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

Loss = Callable[[Any], torch.Tensor]
MakeOptimizer = Callable[[Any], torch.optim.Optimizer]


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
    for group in update.param_groups:
        group["lr"] = 0.0
    return update


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure given to an optimizer's step returns, run with gradients; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


class PerParameter(torch.optim.Optimizer):
    """An optimizer that updates each parameter by itself: a subclass has ``_update``."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns."""
        loss = loss_of(closure)
        for settings in self.param_groups:
            for parameter in settings["params"]:
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
    state = [value for one in updates for of_one in one.state.values()
             for value in torch.utils._pytree.tree_leaves(of_one)]  # fmt: skip
    groups = {
        "parameter": model.parameters(),
        "buffer": model.buffers(),
        "optimizer state": state,
        "input": torch.utils._pytree.tree_leaves(batch),
    }
    seen: set[int] = set()
    found: dict[str, list[torch.Tensor]] = {}
    for category, tensors in groups.items():
        found[category] = []
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and (key := tensor.untyped_storage()._cdata) not in seen:
                seen.add(key)
                found[category].append(tensor)
    return found


def drop_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Let go of all gradients, whoever may have taken over ``zero_grad``."""
    for parameter in parameters:
        parameter.grad = None


def size_bytes(tensors: Any) -> int:
    """Bytes of the storages of these tensors, which share none."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


@contextmanager
def unchanged(model: torch.nn.Module) -> Iterator[None]:
    """Give the model back as it was: buffers, gradients, training mode and random state."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng():
        try:
            drop_gradients(model.parameters())
            yield
        finally:
            for module, mode in training:
                module.training = mode
            for parameter, gradient in gradients:
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)


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


def saved_bytes(forward: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves for backward in this call, each once.

    Parameters
    ----------
    forward
        Its output is dropped; no backward is run.
    known
        What is in memory anyway, parameters and inputs: their storages are left out.
    """
    outside = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage  # held, so that no later one can have its address
        return tensor.detach()  # an alias, since a node that kept its own output would hold itself

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
