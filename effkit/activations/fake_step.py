"""Replay a training step on fake tensors: every operator and every storage of the real step, and no memory and no work.

The only place that touches torch's fake tensors, which are private to it.
"""

from __future__ import annotations

import copy
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch._prims_common import suggest_memory_format
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations import gpu_assumptions, stepping
from effkit.activations.levers import Levers
from effkit.activations.storage_tracker import Call, Follower, taken_as_it_is
from effkit.activations.timeline import Signature, Timeline
from effkit.idle import give_way
from effkit.interrupts import uninterrupted
from effkit.progress_bar import advance
from effkit.restoring import random_numbers_kept
from effkit.training import Loss, MakeOptimizer, drop_gradients, forward, own_loss, residents, still

_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_DYNAMIC = fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException
_aten = torch.ops.aten
# Their first result lies in rows, or in the memory format that the argument of this number suggests; a fake of it lies
# as the input does.
_LAID_OUT = {
    _aten.native_batch_norm.default: 0, _aten.native_batch_norm_backward.default: 1,
    _aten.reflection_pad2d_backward.default: 1, _aten.mse_loss_backward.default: None,
    _aten.smooth_l1_loss_backward.default: None, _aten.huber_loss_backward.default: None,
    _aten.log_sigmoid_forward.default: None, _aten.log_sigmoid_backward.default: None,
}  # fmt: skip
_MOST_VALUES = 2**24  # of a mask or of indices whose values are kept
_MOST_NUMBERS = 2**20  # the same of other numbers, if they were made from nothing
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
        as_on_gpu: bool = False, trains: bool = True,
    ) -> None:  # fmt: skip
        self._mode, self._refused = _Valued(), ""
        tensors = (*model.parameters(), *model.buffers())
        placed: dict[int, Any] = {id(tensor): self._placed(tensor) for tensor in tensors if tensor.is_meta}
        attributes = [value for module in model.modules() for value in vars(module).values()]
        placed |= {id(one): one.clone_state() for one in attributes if isinstance(one, torch.Generator)}
        with fake_tensor.FakeCopyMode(self._mode):
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

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake CPU tensor for one on the meta device, where operators such as attention go other ways."""
        with self._mode:
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
        with self._faking():
            fake = tree_map_only(torch.Tensor, self._mode.valued, batch)
            update = self._update(fake, levers)
            if self._replaces:  # what this step finds there is what one like it has left
                self._run(fake, update, levers)
            follower = Follower(residents(self._model, update, fake))
            with follower.following(self._model):
                self._run(fake, update, levers, follower.enter)
            self.calls |= follower.calls
            return follower.timeline()

    def forward(self, batch: Any) -> None:
        """Replay the forward pass of a batch and its loss, no more; ValueError as in :meth:`replay`."""
        uninterrupted(partial(self._forward, batch))

    def _forward(self, batch: Any) -> None:
        with self._faking():
            self._loss(forward(self._model, tree_map_only(torch.Tensor, self._mode.valued, batch)))

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
        def entered(phase: str) -> None:
            self._mode.updates = phase == stepping.OPTIMIZER
            enter(phase)

        self._mode.updates = False
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
            stack.enter_context(self._mode)
            if self._as_on_gpu:
                stack.enter_context(gpu_assumptions.as_on_gpu())
            if self._at_once:
                stack.enter_context(updating_at_once())
            stack.enter_context(random_numbers_kept(devices=[]))
            before = [(module, name, value) for module in self._model.modules() for name, value in _held(module)]
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
                  if frame.f_locals.get("self") is self._mode and "func" in frame.f_locals]  # fmt: skip
        place = f"module {inside[-1] or type(self._model).__name__}" if inside else "the loss, backward or optimizer"
        if called:
            place += f", operator {called[-1]}"
        said = next(iter(str(error).splitlines()), "")
        because = (
            "what follows depends on the values of activations, as in a mixture of experts that drops no token"
            if isinstance(error, _DYNAMIC) else "a replay does not know it"
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
        elif hasattr(value, "__dict__") and not isinstance(value, type | torch.Tensor):
            yield from _uncopied(vars(value), seen=seen)
        elif not hasattr(value, "__next__"):  # a copy that draws from the same would use it up
            try:
                copy.copy(value)
            except TypeError:
                yield value


def _held(module: torch.nn.Module) -> list[tuple[str, Any]]:
    """What a module holds by name: dictionaries of parameters and buffers as copies."""
    return [(name, value.copy() if isinstance(value, dict) else value) for name, value in vars(module).items()]


def _frames(error: Exception) -> list[Any]:
    return [frame for frame, _ in traceback.walk_tb(error.__traceback__)]


class _Valued(fake_tensor.FakeTensorMode):
    """Fake tensors of which indices and masks have values: models branch on these.

    A random number alone, the coin of a layer that is dropped now and then, is 0.5; so is any number that a step reads
    from activations, to scale by, as a rule; and while an optimizer ``updates``, no shape depends on what it reads.
    """

    updates = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with self:
            if (taken := taken_as_it_is(func, args)) is not None:
                return taken
            if func is torch.ops.aten._embedding_bag_backward.default and args[9]:  # torch's fake of it has no rows
                rows = args[0].new_empty((args[1].numel(), args[0].shape[1]))
                padding = args[11] if len(args) > 11 else -1
                return torch.ops.aten.embedding_sparse_backward(rows, args[1], args[6], padding, False)
        leaves = tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, FakeTensor)]
        known = [(one, one.constant) for one in given if one.constant is not None]
        if func is torch.ops.aten._local_scalar_dense.default and given:
            (read,) = given
            if not known and (read.is_floating_point() or self.updates):
                return 0.5 if read.is_floating_point() else False if read.dtype == torch.bool else 1
        stored = any(isinstance(leaf, torch.UntypedStorage) for leaf in leaves)  # without values
        follows = len(known) == len(given) and not _random(func) and not stored
        if follows:  # torch would return values without the storages that they share
            for one, _ in known:
                one.constant = None
        try:
            out: Any = super().__torch_dispatch__(func, types, args, kwargs)
        except RuntimeError as error:
            for one, constant in known:
                one.constant = constant
            if isinstance(error, _DYNAMIC) and any(
                one.constant is None and (len(given) == 1 or not one.is_floating_point()) for one in given
            ):
                raise
            return self._really(func, args, kwargs, error)
        finally:
            for one, constant in known if follows else ():
                one.constant = constant
        sparse = [one for one in given if one.is_sparse]
        grows = isinstance(out, torch.Tensor) and out.is_sparse and (len(sparse) > 1 or not _num_cells(out))
        if grows and any(map(_num_cells, sparse)):  # torch's own fakes of sparse results have no cells, or too few
            raise fake_tensor.UnsupportedOperatorException(func)
        self._value(func, args, kwargs, given, out, follows)
        return self._laid_out(out, args, _LAID_OUT[func]) if func in _LAID_OUT else out

    def _laid_out(self, out: Any, args: Any, like: int | None) -> Any:
        first, *others = out if isinstance(out, tuple) else (out,)
        form = torch.contiguous_format if like is None else suggest_memory_format(args[like])
        if first is None or first.is_contiguous(memory_format=form):
            return out
        with self:
            first = torch.empty_like(first, memory_format=form)
        return (first, *others) if others else first

    def _value(self, func: Any, args: Any, kwargs: Any, given: list[FakeTensor], out: Any, follows: bool) -> None:
        """Give values to what an operator returned, if they are known."""
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, FakeTensor)]
        coin = not given and len(made) == 1 and made[0].numel() == 1 and _random(func)
        # of others what was made from nothing, such as a mask of ones
        small = bool(made) and all(_small(one) or one.numel() <= (1 if given else _MOST_NUMBERS) for one in made)
        same = "empty" not in func._schema.name and not _random(func) and (follows or _shaped(func))
        if not coin and not (same and (small or func._schema.is_mutable)):
            return
        with no_dispatch():
            values = [leaf for leaf in tree_leaves(_run(func, args, kwargs)) if isinstance(leaf, torch.Tensor)]
            values = [value.fill_(0.5) if coin and value.is_floating_point() else value for value in values]
        for fake, value in zip(made, values, strict=True):
            self._with_values(fake, value)

    def _really(self, func: Any, args: Any, kwargs: Any, error: RuntimeError) -> Any:
        """What an operator returns that has no fake form for these: it is run, on its values or zeros."""
        try:
            with no_dispatch():
                out = _run(func, args, kwargs)
        except Exception:
            raise error from None
        return tree_map_only(torch.Tensor, self.valued, out)

    def valued(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a real tensor, with its values if these are indices or a mask."""
        if isinstance(tensor, FakeTensor):
            return tensor
        if tensor.is_sparse:
            with no_dispatch():
                parts = tensor._indices(), tensor._values()
            with self:
                return torch.ops.aten._sparse_coo_tensor_unsafe(*map(self.valued, parts), tensor.shape)
        fake = self.fake_tensor_converter.from_real_tensor(self, tensor)
        if not _small(tensor):
            return fake
        with no_dispatch():
            return self._with_values(fake, tensor.clone())  # a step may write into it

    def _with_values(self, fake: FakeTensor, values: torch.Tensor) -> FakeTensor:
        fake.constant = values
        self.fake_tensor_converter.add_constant_storage_mapping(fake)
        return fake


def _small(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _MOST_VALUES


def _num_cells(tensor: torch.Tensor) -> int:
    with no_dispatch():
        return tensor._nnz() if tensor.is_sparse else 0


def _real(fake: FakeTensor) -> torch.Tensor:
    """Its values, or zeros."""
    if fake.constant is not None:
        return fake.constant
    span = 1 + sum((size - 1) * step for size, step in zip(fake.shape, fake.stride(), strict=True))
    return torch.zeros(span if fake.numel() else 0, dtype=fake.dtype).as_strided(fake.shape, fake.stride())


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """What an operator returns for the values of these, or for zeros."""
    args, kwargs = tree_map_only(FakeTensor, _real, (args, kwargs))
    return func(*args, **kwargs)


def _random(func: Any) -> bool:
    return torch.Tag.nondeterministic_seeded in func.tags


def _shaped(func: Any) -> bool:
    """Whether this takes from tensors their shapes only."""
    return func._schema.name.startswith("aten::new_") or func._schema.name.endswith("_like")
