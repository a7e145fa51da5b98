"""Replay a training step on fake tensors: every operator and every storage of the real step, and no memory and no work.

This and ``fake_tensors`` alone touch torch's fake tensors, which are private to it.
"""

from __future__ import annotations

import copy
import logging
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations import compressing, gpu_assumptions, stepping
from effkit.activations.fake_tensors import DYNAMIC, Results, Valued
from effkit.activations.levers import Levers
from effkit.activations.sharding import buckets, same_buffers, spread, world
from effkit.activations.storage_tracker import Call, Follower, Stretch, call_of
from effkit.activations.timeline import SENT, Signature, Timeline
from effkit.idle import give_way
from effkit.interrupts import uninterrupted
from effkit.progress_bar import advance
from effkit.quantisation import dequantise, quantise
from effkit.restoring import random_numbers_kept
from effkit.training import Loss, MakeOptimizer, drop_gradients, forward, own_loss, residents, still

_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_MOST_PARTS = 2  # micro-batches after the second repeat it


class Replayer:
    """A fake copy of a model, on which steps are replayed at any batch and with any levers.

    The model, real or on the meta device, is copied, not touched; ``loss`` and ``optimizer`` are those of
    :func:`effkit.activations.measure`. With ``as_on_gpu``, what differs on a GPU is done as it is done there (see
    :mod:`effkit.activations.gpu_assumptions`). Unless it ``trains``, a step is a forward pass without gradients. A
    model that cannot be copied has no replays.
    """

    def __init__(
        self, model: torch.nn.Module, loss: Loss | None = None, optimizer: MakeOptimizer | None = None, *,
        as_on_gpu: bool = False, trains: bool = True, plan: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.mode, self._refused, self._plan = Valued(), "", plan
        tensors = (*model.parameters(), *model.buffers())
        placed: dict[int, Any] = {id(tensor): self._placed(tensor) for tensor in tensors if tensor.is_meta}
        attributes = [value for module in model.modules() for value in vars(module).values()]
        placed |= {id(one): one.clone_state() for one in attributes if isinstance(one, torch.Generator)}
        with fake_tensor.FakeCopyMode(self.mode):
            try:
                shared = {id(value): value for value in _uncopied(model, seen=set())}
                self._model = copy.deepcopy(model, placed | shared)
            except Exception as error:
                self._refused = f"this step can be measured, not forecast: its model cannot be copied, because {error}"
                return
        for parameter in self._model.parameters():
            parameter.grad = None
        self._loss, self._make, self._trains = loss or own_loss, optimizer, trains
        # of fake parameters torch updates each alone; on a GPU, real ones at once
        self._at_once = as_on_gpu or any(parameter.is_cuda for parameter in self._model.parameters())
        self._as_on_gpu = as_on_gpu
        self._updates: dict[str, torch.optim.Optimizer] = {}
        self._replaces = False  # whether a step puts other buffers in the place of the model's
        self.calls: dict[Signature, Call] = {}  # of all replays
        self._stretches: dict[Any, tuple[Stretch | None, Results | None, Any]] = {}
        self._buckets: list[torch.Tensor] = []  # of gradients that ranks average

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake CPU tensor for one on the meta device, where operators such as attention go other ways."""
        with self.mode:
            placed = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        return torch.nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else placed

    def replay(self, batch: Any, levers: Levers) -> Timeline:
        """One steady step on a batch, real or fake, of which two micro-batches stand for all.

        ValueError when it fails, with the place and the reason, such as shapes that depend on values of activations,
        which a replay does not have; later replays are as if it had not been. An exception raised below a fake tensor's
        operator can end the process, so Ctrl-C waits until this has returned.
        """
        advance()
        return uninterrupted(partial(self._replay, batch, levers))

    def _replay(self, batch: Any, levers: Levers) -> Timeline:
        if levers.world_size > 1:
            return self._on_ranks(batch, levers)
        with self._faking():
            fake = tree_map_only(torch.Tensor, self.mode.valued, batch)
            update = self._update(fake, levers)
            if self._replaces:  # what this step finds there is what one like it has left
                self._run(fake, update, levers)
            beside = {SENT: self._buckets} if self._buckets else {}
            follower = Follower(residents(self._model, update, fake) | beside)  # nobody else may hold these
            once = partial(self._once, follower)
            with ExitStack() as stack:
                for function in (quantise, dequantise):
                    stack.enter_context(mock.patch.object(compressing, function.__name__, partial(once, function)))
                stack.enter_context(follower.following(self._model))
                self._run(fake, update, levers, follower.enter)
            self.calls |= follower.calls
            return follower.timeline()

    def _on_ranks(self, batch: Any, levers: Levers) -> Timeline:
        """The same on rank 0 of several, whose shards are the largest."""
        one = copy.copy(self)
        one._updates, one._stretches = {}, {}
        with world(levers.world_size):
            with self._faking(), fake_tensor.FakeCopyMode(self.mode):
                same = {id(tensor): self._placed(tensor) for tensor in self._model.parameters()}
                same |= {id(tensor): tensor for tensor in self._model.buffers()}
                model = copy.deepcopy(self._model, same)
            with self._faking():
                one._model, one._make = spread(
                    model, levers, levers.optimizer(self._make), plan=self._plan, in_cpp=False
                )
                one._buckets = buckets(one._model) if levers.replicates else []
            return one._replay(batch, levers.within_a_rank)

    def _once(self, follower: Follower, function: Any, *args: Any) -> Any:
        """What a function returns that leaves nothing else: run once for arguments that look alike."""
        _, looks = call_of(function, tree_leaves(args), {})
        looks += torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()
        if looks not in self._stretches:
            since, out = follower.here, function(*args)
            made = [one for one in tree_leaves(out) if isinstance(one, FakeTensor)]
            for one in made:  # made as zeros, and then written into
                one.constant = None
            form = tree_map_only(FakeTensor, lambda _: ..., out)
            self._stretches[looks] = follower.stretch(since, made), Results.of(self.mode, made, []), form
            return out
        stretch, results, form = self._stretches[looks]
        if stretch is None or results is None:
            return function(*args)
        made = results.again(self.mode, [])
        follower.repeat(stretch, made)
        others = iter(made)
        return tree_map_only(type(...), lambda _: next(others), form)

    def forward(self, batch: Any) -> None:
        """Replay the forward pass of a batch and its loss, no more; ValueError as in :meth:`replay`."""

        def run() -> None:
            with self._faking():
                self._loss(forward(self._model, tree_map_only(torch.Tensor, self.mode.valued, batch)))

        uninterrupted(run)

    def _update(self, batch: Any, levers: Levers) -> torch.optim.Optimizer | None:
        """The optimizer, its state in place; none for a forward pass alone."""
        if not self._trains:
            return None
        if levers.optimizer_states not in self._updates:
            update = still(self._model.parameters(), levers.optimizer(self._make))
            before = list(self._model.buffers())
            self._run(batch, update, Levers())
            self._replaces = any(one is not other for one, other in zip(before, self._model.buffers(), strict=True))
            self._updates[levers.optimizer_states] = update
        return self._updates[levers.optimizer_states]

    def _run(
        self, batch: Any, update: torch.optim.Optimizer | None, levers: Levers,
        enter: stepping.Enter = lambda phase: None,
    ) -> None:  # fmt: skip
        before = ""

        def entered(phase: str) -> None:
            nonlocal before
            self.mode.updates = phase == stepping.OPTIMIZER
            # DistributedDataParallel averages gradients after backward, and before forward makes buffers the same
            for bucket in self._buckets if before == stepping.BACKWARD else ():
                dist.all_reduce(bucket)
            enter(phase)
            before = phase
            if self._buckets and phase == stepping.FORWARD:
                same_buffers(self._model)

        self.mode.updates = False
        stepping.run(self._model, batch, self._loss, update, levers, entered, _MOST_PARTS)

    @contextmanager
    def _faking(self) -> Iterator[None]:
        if self._refused:
            raise ValueError(self._refused)
        with ExitStack() as stack:
            stack.callback(drop_gradients, list(self._model.parameters()))  # of a replay that gave way
            for module in self._model.modules():  # not below autograd, whose C++ may end the process on an exception
                stack.enter_context(module.register_forward_pre_hook(lambda *_: give_way()))
            stack.callback(_LOG.setLevel, _LOG.level)
            _LOG.setLevel(logging.CRITICAL)  # it reports every error that is raised anyway
            if "transformers" in sys.modules:
                # it would take fake tensors for a compiler's, and attention another way than in a real step
                stack.enter_context(mock.patch("transformers.utils.import_utils.is_fake_tensor", return_value=False))
            stack.enter_context(self.mode)
            if self._as_on_gpu:
                stack.enter_context(gpu_assumptions.as_on_gpu())
            if self._at_once:
                stack.enter_context(updating_at_once())
            stack.enter_context(random_numbers_kept(devices=[]))
            # parameters and buffers are in dictionaries
            before = [(module, name, value.copy() if isinstance(value, dict) else value)
                      for module in self._model.modules() for name, value in vars(module).items()]  # fmt: skip
            try:
                yield
            except Exception as error:
                self._updates.clear()  # they may be half a step on
                for module, name, value in before:
                    vars(module)[name] = value
                if isinstance(error, ValueError) and _frames(error)[-1].f_globals["__name__"].startswith("effkit."):
                    raise  # what was given is refused, in our words
                raise ValueError(self._why(error)) from error

    def _why(self, error: Exception) -> str:
        """Where a replay failed, and why."""
        frames, names = _frames(error), {id(module): name for name, module in self._model.named_modules()}
        inside = [names[id(one)] for frame in frames if id(one := frame.f_locals.get("self")) in names]
        called = [frame.f_locals["func"] for frame in frames
                  if frame.f_locals.get("self") is self.mode and "func" in frame.f_locals]  # fmt: skip
        place = f"module {inside[-1] or type(self._model).__name__}" if inside else "the loss, backward or optimizer"
        if called:
            place += f", operator {called[-1]}"
        said = next(iter(str(error).splitlines()), "")
        because = (
            "what follows depends on the values of activations, as in a mixture of experts that drops no token"
            if isinstance(error, DYNAMIC) else "a replay does not know it"
            if isinstance(error, fake_tensor.UnsupportedOperatorException) else f"{type(error).__name__}: {said[:150]}"
        )  # fmt: skip
        return f"this step can be measured, not forecast: at {place}, because {because}"


@contextmanager
def updating_at_once() -> Iterator[None]:
    """Optimizers take fake tensors for a GPU's real ones when they choose how to update."""
    of = sys.modules[torch.optim.Optimizer.__module__]
    with (
        mock.patch.object(of, "_foreach_supported_types", [*of._foreach_supported_types, FakeTensor]),
        mock.patch.object(of, "_get_foreach_kernels_supported_devices", return_value=["cpu", "cuda"]),
    ):
        yield


def _uncopied(*values: Any, seen: set[int]) -> Iterator[Any]:
    """What is held by these and cannot be copied, such as a lock."""
    for value in values:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, dict | list | tuple):
            yield from _uncopied(*(value.values() if isinstance(value, dict) else value), seen=seen)
        elif hasattr(value, "__dict__") and not isinstance(value, type | torch.Tensor | ModuleType):
            yield from _uncopied(vars(value), seen=seen)
        elif not hasattr(value, "__next__"):  # a copy that draws from the same would use it up
            try:
                copy.copy(value)
            except TypeError:
                yield value


def _frames(error: Exception) -> list[Any]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
