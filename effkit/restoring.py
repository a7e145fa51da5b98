"""What is run on is given back as it was: all that a model and a step lead to is remembered, and put back."""

from __future__ import annotations

import io
import random
import sys
import threading
import types
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import pandas as pd
import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parameter import UninitializedParameter
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import Dataset

from effkit.interrupts import PutBack
from effkit.training import drop_gradients, parts_of, wraps
from effkit.units import readable

# Never looked into: data are read, and a table of pandas is a value.
_CLOSED = (
    types.ModuleType, pd.DataFrame, pd.Series, pd.Index, Dataset,
    str, bytes, int, float, complex, range, slice, type(None), np.generic, torch.dtype, torch.device, torch.Size,
    UninitializedParameter,
)  # fmt: skip
# What another thread, or somebody else, may be at work with meanwhile: a tracking service's client, a progress bar
_SHARED = (threading.Thread, type(threading.Lock()), type(threading.RLock()), threading.Event, io.IOBase)
_WHERE_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "site-packages", "dist-packages")
_LIBRARIES = ("torch._", "pandas.", "numpy.", "pyarrow.", "matplotlib.", "IPython.", "ipykernel.", "ipywidgets.")
_MOST_OBJECTS = 1_000_000
_MOST_OTHER_BYTES, _TIMES_THE_MODEL = 2**30, 8  # of tensors that are copied: optimizer states, averages, …


class Reached:
    """All that can be reached from some objects, and what it holds now.

    Followed are attributes, containers, closures, default arguments, users' classes, and the globals that the code of
    users' functions names. Tensors are copied to host memory, at most ``most_bytes`` of them. ``unseen`` has a sentence
    for each kind of thing that cannot be put back.
    """

    def __init__(self, most_bytes: float = float("inf")) -> None:
        self.unseen: list[str] = []
        self._objects: dict[int, Any] = {}  # by id; held, so that no other takes over an id
        self._steps: list[Callable[[], object]] = []
        self._tensors: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        self._left_bytes, self._not_copied_bytes = most_bytes, 0

    def add(self, *roots: Any) -> None:
        """Remember what is reached from these too."""
        waiting = list(roots)
        while waiting:
            one = waiting.pop()
            if isinstance(one, _CLOSED) or id(one) in self._objects:
                continue
            if len(self._objects) >= _MOST_OBJECTS:
                self._say(f"the step leads to more than {_MOST_OBJECTS:,} objects: some stay as it leaves them")
                return
            self._objects[id(one)] = one
            waiting += self._remember(one)
        if self._not_copied_bytes:
            self._say(f"{readable(self._not_copied_bytes, 'bytes')} of tensors beside the model's: what a step writes "
                      "into them stays")  # fmt: skip

    def put_back(self) -> None:
        """Let everything hold again what it held."""
        for step in reversed(self._steps):
            step()
        with torch.no_grad():
            for tensor, alias, values in self._tensors:
                if tensor.data_ptr() != alias.data_ptr() or tensor.shape != alias.shape or tensor.dtype != alias.dtype:
                    tensor.data = alias
                alias.copy_(values)

    def _say(self, sentence: str) -> None:
        if sentence not in self.unseen:
            self.unseen.append(sentence)

    def _remember(self, one: Any) -> Iterator[Any]:
        """Note what this holds, and say what it leads to."""
        if isinstance(one, torch.Tensor):
            yield from self._tensor(one)
        elif isinstance(one, torch.Generator | np.random.RandomState):
            self._steps.append(partial(one.set_state, one.get_state()))  # type: ignore[arg-type]
        elif isinstance(one, random.Random):
            self._steps.append(partial(one.setstate, one.getstate()))
        elif isinstance(one, np.random.Generator):
            self._steps.append(partial(setattr, one.bit_generator, "state", one.bit_generator.state))
        elif isinstance(one, np.ndarray):
            yield from self._array(one)
        elif isinstance(one, types.FunctionType):
            yield from self._function(one)
        elif isinstance(one, types.MethodType | types.BuiltinFunctionType):
            yield from (one.__self__, getattr(one, "__func__", None))
        elif isinstance(one, partial):
            yield from (one.func, *one.args, one.keywords)
        elif isinstance(one, types.CellType):
            yield from self._cell(one)
        elif isinstance(one, type):
            yield from self._class(one)
        elif isinstance(one, property | staticmethod | classmethod | cached_property):
            yield from (getattr(one, name, None) for name in ("fget", "fset", "__func__", "func"))
        elif isinstance(one, tuple | frozenset):
            yield from one
        else:
            yield from self._container(one)
            yield from self._attributes(one)

    def _tensor(self, tensor: torch.Tensor) -> Iterator[Any]:
        if isinstance(tensor, FakeTensor) or tensor.is_meta or tensor.is_inference() or tensor.layout != torch.strided:
            return
        if wraps(type(tensor)):  # a shard is what this rank has of it
            yield from parts_of(tensor)
        elif tensor.untyped_storage().nbytes():  # else its owner has freed it, and fills it again when it is needed
            num_bytes = tensor.numel() * tensor.element_size()
            if num_bytes > self._left_bytes:
                self._not_copied_bytes += num_bytes
                return
            self._left_bytes -= num_bytes
            self._tensors.append((tensor, tensor.data, tensor.detach().to("cpu", copy=True)))
        if tensor.is_leaf:
            needed, gradient = tensor.requires_grad, tensor.grad

            def as_before() -> None:
                if tensor.requires_grad != needed:
                    tensor.requires_grad_(needed)
                tensor.grad = gradient

            self._steps.append(as_before)
            yield gradient

    def _array(self, array: np.ndarray[Any, Any]) -> Iterator[Any]:
        if array.dtype == object:
            yield from array.ravel()
        elif array.flags.writeable and array.nbytes <= self._left_bytes:
            self._left_bytes -= array.nbytes
            self._steps.append(partial(np.copyto, array, array.copy()))

    def _function(self, function: types.FunctionType) -> Iterator[Any]:
        yield from (function.__closure__ or ())
        yield from (function.__defaults__ or ())
        yield from (function.__kwdefaults__ or {}).values()
        yield vars(function)
        if not own_code(function.__code__.co_filename):
            return
        names = function.__globals__
        for name in _names(function.__code__):
            if name in names:
                self._steps.append(partial(_named_again, names, name, names[name], names.__setitem__))
                yield self._drawn_from(names[name])

    def _class(self, kind: type) -> Iterator[Any]:
        if _users(kind.__module__):
            yield from kind.__mro__[1:]
            for name, value in vars(kind).items():
                if not name.startswith("__") or isinstance(value, types.FunctionType):
                    self._steps.append(partial(_named_again, vars(kind), name, value, partial(setattr, kind)))
                    yield value

    def _cell(self, cell: types.CellType) -> Iterator[Any]:
        try:
            held = cell.cell_contents
        except ValueError:  # empty so far
            return
        self._steps.append(partial(setattr, cell, "cell_contents", held))
        yield self._drawn_from(held)

    def _drawn_from(self, one: Any) -> Any:
        if hasattr(one, "__next__"):
            self._say(f"a {type(one).__name__} that the step draws from: what it has drawn stays drawn")
        return one

    def _container(self, one: Any) -> Iterator[Any]:
        if isinstance(one, dict):
            own = OrderedDict if isinstance(one, OrderedDict) else dict
            items = list(own.items(one))
            self._steps.append(partial(_filled_again, one, own, items))
            for key, value in items:
                yield from (key, value)
        elif isinstance(one, list | deque | set):
            members = list(one)
            self._steps.append(partial(_gathered_again, one, members))
            yield from members

    def _attributes(self, one: Any) -> Iterator[Any]:
        module = type(one).__module__
        if module.partition(".")[0] in sys.stdlib_module_names or module.startswith(_LIBRARIES):
            return
        yield type(one)
        attributes = getattr(one, "__dict__", None)
        if isinstance(attributes, dict):
            theirs = not _users(module) and not isinstance(one, torch.nn.Module) and not module.startswith("torch.")
            if theirs and any(isinstance(value, _SHARED) for value in attributes.values()):
                self._say(f"a {type(one).__name__} of {module.partition('.')[0]}, which holds a lock, a thread or a "
                          "file: what the step does to it stays")  # fmt: skip
                return
            if _users(module):
                for value in attributes.values():
                    self._drawn_from(value)
            yield attributes
        for name in {name for kind in type(one).__mro__ for name in _slots(kind)}:
            try:
                value = object.__getattribute__(one, name)
            except AttributeError:
                continue
            self._steps.append(partial(object.__setattr__, one, name, value))
            yield value


class remembered(PutBack):
    """Put back in the end what can be reached from these, and random states. ``unseen`` says what cannot be."""

    def __init__(self, *roots: Any, most_bytes: float = float("inf")) -> None:
        self._roots, self._reached = roots, Reached(most_bytes)
        self.unseen = self._reached.unseen

    def begin(self) -> Self:
        """Remember everything."""
        with ExitStack() as stack:
            stack.enter_context(random_numbers_kept())
            self._reached.add(*self._roots)
            stack.callback(self._reached.put_back)
            self._also(stack)
            self._stack = stack.pop_all()
        return self

    def _also(self, stack: ExitStack) -> None:
        """What else begins, and ends on this stack."""

    def put_back(self) -> None:
        """Let everything be as it was."""
        self._stack.close()


class unchanged(remembered):
    """Give a model back as it was, and all that can be reached from what else is given: a step, a loss, a loader.

    Parameters, buffers, gradients, modes, random states; and of what a step reaches, its optimizers with their states,
    schedules, averages of weights, counters. Inside, the model has no gradients. ``optimizers`` are those that have
    taken a step so far, where a step was given. Inside another such context of the same model, only gradients, buffers
    and modes are put back, and random states.
    """

    _models: ClassVar[set[int]] = set()  # ids of those that a context outside of this one gives back

    def __init__(self, model: torch.nn.Module, *also: Any) -> None:
        self._inner = id(model) in self._models
        own_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()) if not tensor.is_meta)
        inside = [*model.buffers(), *(module._buffers for module in model.modules())]
        roots = inside if self._inner else [*also, model]
        super().__init__(*roots, most_bytes=_MOST_OTHER_BYTES + _TIMES_THE_MODEL * own_bytes)
        self.model, self._listens = model, bool(also)
        self.optimizers: list[torch.optim.Optimizer] = []

    def _also(self, stack: ExitStack) -> None:
        model, thread = self.model, threading.get_ident()
        if self._inner:
            for module in model.modules():
                stack.callback(setattr, module, "training", module.training)
            for parameter in model.parameters():
                stack.callback(setattr, parameter, "grad", parameter.grad)
        else:
            self._models.add(id(model))
            stack.callback(self._models.discard, id(model))

        def noted(optimizer: torch.optim.Optimizer, *_: Any) -> None:
            if threading.get_ident() == thread and all(optimizer is not one for one in self.optimizers):
                self.optimizers.append(optimizer)
                if not self._inner:
                    self._reached.add(optimizer)  # one that nothing of what was given leads to

        if self._listens:
            stack.callback(register_optimizer_step_pre_hook(noted).remove)
        drop_gradients(model.parameters())


@contextmanager
def random_numbers_kept(devices: list[int] | None = None) -> Iterator[None]:
    """Random numbers drawn inside, by torch (on these GPUs, all unless given), numpy or Python, are drawn again
    afterwards."""
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002  (the generators that other people's code uses)
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002


def own_code(filename: str) -> bool:
    """Whether this is the user's code: not a library's, which knows what it does."""
    return not any(library in filename for library in _WHERE_LIBRARIES)


def _users(module: str) -> bool:
    """Whether the user wrote the module of this name."""
    filename = getattr(sys.modules.get(module), "__file__", None) or ""
    return module.partition(".")[0] not in sys.stdlib_module_names and own_code(filename)


def _names(code: types.CodeType) -> Iterator[str]:
    """Globals that a function's code, and that of functions inside it, may name."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    named = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in named if name not in ("__dict__", "__weakref__") and not name.startswith("__"))


def _named_again(names: Mapping[str, Any], name: str, value: Any, put: Callable[[str, Any], None]) -> None:
    if names.get(name) is not value:
        put(name, value)


def _filled_again(one: Any, own: type[dict[Any, Any]], items: list[tuple[Any, Any]]) -> None:
    now = list(own.items(one))
    if len(now) != len(items) or any(a is not c or b is not d for (a, b), (c, d) in zip(now, items, strict=True)):
        own.clear(one)
        for key, value in items:
            own.__setitem__(one, key, value)


def _gathered_again(one: Any, members: list[Any]) -> None:
    if len(one) != len(members) or any(a is not b for a, b in zip(one, members, strict=True)):
        one.clear()
        (one.update if isinstance(one, set) else one.extend)(members)
