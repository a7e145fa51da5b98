"""restored(): whatever steps are run, the model and its optimizers come out as they went in."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from effkit.training import unchanged


@contextmanager
def restored(model: torch.nn.Module) -> Iterator[dict[torch.optim.Optimizer, Any]]:
    """Undo in the end what steps inside have learned: parameters, buffers, gradients, optimizers, random states.

    Copies wait in host memory. What a step changes elsewhere (a scheduler, counters of its own) stays.

    Yields
    ------
    dict
        The optimizers that have taken a step so far, and the states that they had before.
    """
    parameters = [(parameter, parameter.detach().to("cpu", copy=True)) for parameter in model.parameters()]
    seen: dict[torch.optim.Optimizer, Any] = {}

    def noted(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if optimizer not in seen:
            seen[optimizer] = copy.deepcopy(optimizer.state_dict())

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
                for parameter, before in parameters:
                    parameter.copy_(before)
