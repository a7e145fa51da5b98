"""What can be changed about somebody's step from outside of it, to try how much it would save."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, _GeneratorContextManager, contextmanager
from functools import cache
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint as checkpointing

from effkit.advice.step_hooks import ASKS
from effkit.restoring import own_code
from effkit.training import drop_gradients

# Enters a context anew at each call of what it decorates: intervention(model)(step)
Intervention = Callable[[torch.nn.Module], "_GeneratorContextManager[None]"]


@contextmanager
def numbers_not_waited_for(model: torch.nn.Module) -> Iterator[None]:
    """``item()``, ``float()`` and ``tolist()`` in the user's code are answered with zeros, at once.

    So are the elements of a vector one by one, which is how numbers are asked for in loops. To measure what asking
    costs, not to train: libraries get true numbers, an optimizer's step too.
    """
    own = cache(own_code)

    def answering(name: str, answer: Callable[[torch.Tensor], Any]) -> Callable[..., Any]:
        native = getattr(torch.Tensor, name)

        def asked(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            fits = name in ASKS or (self.dim() == 1 and len(self) > 0 and not self.requires_grad)
            mine = fits and own(sys._getframe(1).f_code.co_filename)
            return answer(self) if mine else native(self, *args, **kwargs)

        return asked

    answers: dict[str, Callable[[torch.Tensor], Any]] = {
        "item": lambda tensor: 0.0 if tensor.is_floating_point() else 0,
        "__float__": lambda _: 0.0,
        "tolist": lambda tensor: torch.zeros(tensor.shape, dtype=tensor.dtype).tolist(),
        "unbind": lambda vector: (vector[0],) * len(vector),
        "__iter__": lambda vector: iter((vector[0],) * len(vector)),
    }
    with ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, answering(name, answer)))
        yield


@contextmanager
def gradients_to_none(model: torch.nn.Module) -> Iterator[None]:
    """``zero_grad()`` lets go of gradients, whatever it was told."""

    def clearing(clear: Callable[..., None]) -> Callable[..., None]:
        return lambda self, set_to_none=True: clear(self, True)

    drop_gradients(model.parameters())
    with ExitStack() as stack:
        for owner in (torch.optim.Optimizer, torch.nn.Module):
            stack.enter_context(mock.patch.object(owner, "zero_grad", clearing(owner.zero_grad)))
        yield


@contextmanager
def nothing_recomputed(model: torch.nn.Module) -> Iterator[None]:
    """``torch.utils.checkpoint`` keeps what backward needs, as if it were not there."""

    class Kept:
        @staticmethod
        def apply(function: Callable[..., Any], _: bool, *args: Any) -> Any:
            return function(*args)

    def kept(*_: Any, **__: Any) -> Iterator[None]:
        yield

    with mock.patch.multiple(checkpointing, CheckpointFunction=Kept, _checkpoint_without_reentrant_generator=kept):
        yield


@contextmanager
def in_bfloat16(model: torch.nn.Module) -> Iterator[None]:
    """The model's forward pass runs under autocast to bfloat16."""
    cast = torch.autocast(next(model.parameters()).device.type, torch.bfloat16)
    with mock.patch.object(model, "forward", cast(model.forward)):
        yield


@contextmanager
def without_intervening(model: torch.nn.Module) -> Iterator[None]:
    """The step as it is."""
    yield
