"""What stays in memory from step to step though nothing needs it: tensors that still hold their graph."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import CellType, FrameType, FunctionType
from typing import Any

import torch

from effkit.advice.probing import Step
from effkit.device import peak_counter, synchronize
from effkit.recording import memory_after
from effkit.training import drop_gradients, size_bytes, storage_keys

_STEPS = 3
_LEAST_BYTES = 256  # of growth per step: counters and the like


@dataclass(frozen=True)
class Kept:
    """What a step adds to memory for good."""

    growth_bytes: int  # per step
    num_tensors: int = 0  # with a graph, that a step leaves behind
    own_bytes: int = 0  # what they would still hold without their graph
    holders: tuple[str, ...] = ()  # names of what holds them, where these could be found


def kept(step: Step, batch: Any, parameters: Iterable[torch.nn.Parameter] = (), period: int = 1) -> Kept:
    """Run a few steps of one batch and see what stays; the gradients of ``parameters`` are let go of in between. An
    optimizer steps once in ``period`` of them."""
    growth = growth_bytes(lambda: step(batch), parameters, period)
    if growth < _LEAST_BYTES:
        return Kept(max(0, growth))
    with new_graphs() as tensors_left:
        for _ in range(_STEPS):
            step(batch)
        left = tensors_left()
        names = _holders(left) if left else {}
        held = [tensor for tensor in left if id(tensor) in names] or left  # the others are held by the graphs of these
        distinct = {tuple(storage_keys(tensor)): tensor for tensor in held}
        own = size_bytes(distinct.values()) // _STEPS
        holders = dict.fromkeys(names[id(tensor)] for tensor in held if names)
        return Kept(growth, -(-len(held) // _STEPS), own, tuple(holders))


def growth_bytes(step: Callable[[], object], parameters: Iterable[torch.nn.Parameter] = (), period: int = 1) -> int:
    """What one step adds to the memory that is in use, the mean of a few ``period``s [bytes].

    On a CPU the profiler does not see that blocks from before it began are freed: a first step lets go of them, and
    counting begins after it.
    """

    def run(num_periods: int) -> None:
        for _ in range(num_periods * period):
            step()
        gc.collect()

    drop_gradients(parameters)
    gc.collect()  # also of a profiler's old results, whose end during a recording Kineto does not survive
    if counter := peak_counter():
        run(1)
        before = counter.memory_allocated()
        run(_STEPS)
        synchronize()
        grown = counter.memory_allocated() - before
    else:
        grown = memory_after(partial(run, 1), partial(run, _STEPS))["size_bytes"].sum()
    return int(grown) // (_STEPS * period)


@contextmanager
def new_graphs() -> Iterator[Callable[[], list[torch.Tensor]]]:
    """Yields a function that lists the tensors with a graph that were made in this context and are still alive."""
    before = {id(tensor): tensor for tensor in _with_graph()}  # held, so that no later one can have its place

    def tensors_left() -> list[torch.Tensor]:
        gc.collect()
        return [tensor for tensor in _with_graph() if id(tensor) not in before]

    yield tensors_left


def detached_after(step: Step) -> Step:
    """The step, after which every tensor that it leaves behind is cut from its graph."""

    def run(batch: Any) -> None:
        with new_graphs() as found:
            step(batch)
            for tensor in found():
                with suppress(RuntimeError):  # a view cannot be detached in place
                    tensor.detach_()

    return run


def _with_graph() -> list[torch.Tensor]:
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.grad_fn is not None]


def _holders(wanted: list[Any], nested: bool = True) -> dict[int, str]:
    """By id, the name of what holds each of these in Python, or the container that it is in; a graph has no name.

    All at once: to ask who refers to something is to go through all that lives.
    """
    ids, names, containers = {id(one) for one in wanted}, dict[int, str](), list[Any]()
    for holder in gc.get_referrers(*wanted):
        if holder is not wanted and not isinstance(holder, FrameType):
            names = _names_in(holder, ids) | names
            if nested and isinstance(holder, list | tuple | deque):
                containers.append(holder)
    outer = _holders(containers, nested=False) if containers else {}
    for container in containers:
        name = outer.get(id(container), f"a {type(container).__name__}")
        names = {id(one): name for one in container if id(one) in ids} | names
    return names


def _names_in(holder: Any, ids: set[int]) -> dict[int, str]:
    """The key, the attribute or the variable by which something holds what has these ids."""
    if isinstance(holder, CellType):
        name = _variable(holder)
        return {} if name is None else {id(holder.cell_contents): name}
    # an object refers to its attributes itself, not by way of a dictionary; contexts of autograd are no holders
    graph = isinstance(holder, torch.autograd.graph.Node | torch.Tensor | type)
    names = holder if isinstance(holder, dict) else None if graph else getattr(holder, "__dict__", None)
    held = list(names.items()) if isinstance(names, dict) else []
    return {id(value): str(name) for name, value in held if id(value) in ids}


def _variable(cell: CellType) -> str | None:
    """The name of the variable that a function keeps in this cell."""
    closures = [one for one in gc.get_referrers(cell) if isinstance(one, tuple)]
    functions = [one for one in gc.get_referrers(*closures) if isinstance(one, FunctionType)]
    variables = (
        pair for one in functions for pair in zip(one.__code__.co_freevars, one.__closure__ or (), strict=True)
    )
    return next((name for name, held in variables if held is cell), None)
