"""restored(): whatever steps are run, the model and its optimizers come out as they went in."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils._pytree import tree_map

from effkit.training import unchanged


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[dict[torch.optim.Optimizer, Any]]:
    """Undo in the end what steps inside have learned: parameters, buffers, gradients, optimizers, random states.

    Copies wait in host memory. What a step changes elsewhere (a scheduler, counters of its own) stays. Yields the
    optimizers that have taken a step so far, and the states that they had before.
    """
    before: dict[torch.Tensor, torch.Tensor] = {}
    seen: dict[torch.optim.Optimizer, Any] = {}

    def keep(parameters: Iterable[torch.Tensor]) -> None:
        before.update({tensor: tensor.detach().to("cpu", copy=True) for tensor in parameters if tensor not in before})

    def noted(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer not in seen:
            seen[optimizer] = _on_host(optimizer.state_dict())
            for group in optimizer.param_groups:  # some may belong to no module: those of a loss, say
                keep(group["params"])

    keep(model.parameters())
    hook = register_optimizer_step_pre_hook(noted)
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002  (the generators that other people's code uses)
    with unchanged(model):
        try:
            yield seen
        finally:
            hook.remove()
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002
            for optimizer, state in seen.items():
                optimizer.load_state_dict(state)
            with torch.no_grad():
                for parameter, value in before.items():
                    parameter.copy_(value)


def _on_host(state: Any) -> Any:
    """A copy of an optimizer's state, its tensors in host memory: the device may have no room for a second one."""
    return tree_map(lambda leaf: leaf.detach().to("cpu", copy=True) if isinstance(leaf, torch.Tensor)
                    else copy.copy(leaf), state)  # fmt: skip
