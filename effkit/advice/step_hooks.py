"""Listen to a step of somebody's own, or change it from outside: to try how much that would save."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, _GeneratorContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint as checkpointing
from torch._C._profiler import _RecordFunctionFast
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from effkit.restoring import own_code
from effkit.trace.names import RECOMPUTED
from effkit.training import drop_gradients

ASKS = ("item", "tolist", "__float__")  # what waits until the device has computed a number
# Enters a context anew at each call of what it decorates: intervention(model)(step)
Intervention = Callable[[torch.nn.Module], "_GeneratorContextManager[None]"]


@dataclass
class Heard:
    """What one step did."""

    asked: Counter[str] = field(default_factory=Counter)  # place in the user's code -> how often it asked for a number
    num_recomputed: int = 0  # modules whose forward ran in backward
    # no parameter had a gradient when backward began, also where the step before had left some; False where gradients
    # stay, and backward adds to them; None where there was no backward
    let_go: bool | None = None
    zeroed: bool = False  # zero_grad was told to write zeros
    autocast: bool = False  # a module ran under autocast
    forwards: int = 0  # calls of the model itself
    phases: list[str] = field(default_factory=list)  # backward and optimizer, in the order in which they began

    @property
    def num_asked(self) -> int:
        return sum(self.asked.values())


@contextmanager
def listening(model: torch.nn.Module, enter: Callable[[str], object] | None = None) -> Iterator[Heard]:
    """Note what steps inside do; ``enter`` hears which phase begins (``backward``, ``optimizer``)."""
    heard = Heard()
    kind = next(model.parameters()).device.type
    in_backward = depth = 0
    marks: list[Any] = []

    def begins(phase: str) -> None:
        heard.phases.append(phase)
        if enter is not None:
            enter(phase)

    def before(module: torch.nn.Module, _: Any) -> None:
        nonlocal depth
        if module is model:
            heard.forwards += 1
        if in_backward:
            heard.num_recomputed += 1
            if not depth:
                marks.append(_RecordFunctionFast(RECOMPUTED))
                marks[-1].__enter__()
            depth += 1
        elif torch.is_autocast_enabled(kind):
            heard.autocast = True

    def after(*_: Any) -> None:
        nonlocal depth
        if in_backward and depth:
            depth -= 1
            if not depth:
                marks.pop().__exit__(None, None, None)

    backward = torch.autograd.backward

    def going_back(*args: Any, **kwargs: Any) -> None:
        nonlocal in_backward
        if heard.let_go is None:
            heard.let_go = all(parameter.grad is None for parameter in model.parameters())
        begins("backward")
        in_backward += 1
        try:
            backward(*args, **kwargs)
        finally:
            in_backward -= 1

    def clearing(clear: Callable[..., None]) -> Callable[..., None]:
        def call(self: Any, set_to_none: bool = True) -> None:
            heard.zeroed |= not set_to_none
            clear(self, set_to_none)

        return call

    with ExitStack() as stack:
        for hook in (
            register_module_forward_pre_hook(before),
            register_module_forward_hook(after, always_call=True),
            register_optimizer_step_pre_hook(lambda *_: begins("optimizer")),
        ):
            stack.callback(hook.remove)
        stack.enter_context(mock.patch.object(torch.autograd, "backward", going_back))
        for owner in (torch.optim.Optimizer, torch.nn.Module):
            stack.enter_context(mock.patch.object(owner, "zero_grad", clearing(owner.zero_grad)))
        for name in ASKS:
            stack.enter_context(mock.patch.object(torch.Tensor, name, _noting(name, heard.asked)))
        yield heard


def _noting(name: str, asked: Counter[str]) -> Callable[[Any], Any]:
    native = getattr(torch.Tensor, name)

    def noting(self: torch.Tensor) -> Any:
        frame = sys._getframe(1)
        if own_code(filename := frame.f_code.co_filename):
            cell = "ipykernel" in filename or filename.startswith("<")
            file = "" if cell else f"{Path(filename).name}, "
            asked[f"{file}{frame.f_code.co_name}(), line {frame.f_lineno}"] += 1
        return native(self)

    return noting


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
