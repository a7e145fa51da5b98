"""Replay a training step on fake tensors: every operator and every storage of the real step, and no memory and no work.

The only place that touches torch's fake tensors, which are private to it.
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._mode_utils import no_dispatch
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations import gpu_assumptions, stepping
from effkit.activations.levers import Levers
from effkit.activations.storage_tracker import Call, Follower
from effkit.activations.timeline import Signature, Timeline
from effkit.idle import give_way
from effkit.interrupts import uninterrupted
from effkit.restoring import random_numbers_kept
from effkit.training import Loss, MakeOptimizer, drop_gradients, own_loss, residents, still

_LOG = logging.getLogger("torch._subclasses.fake_tensor")
_MOST_VALUES = 2**24  # of a mask or of indices whose values are kept
_MOST_PARTS = 2  # micro-batches after the second repeat it


class Replayer:
    """A fake copy of a model, on which steps are replayed at any batch and with any levers.

    The model, real or on the meta device, is copied, not touched; ``loss`` and ``optimizer`` are those of
    :func:`effkit.activations.measure`. With ``as_on_gpu``, what differs on a GPU is done as it is done there (see
    :mod:`effkit.activations.gpu_assumptions`). ValueError when the model cannot be copied.
    """

    def __init__(
        self, model: torch.nn.Module, loss: Loss | None = None, optimizer: MakeOptimizer | None = None, *,
        as_on_gpu: bool = False,
    ) -> None:  # fmt: skip
        self._mode = _Valued()
        tensors = (*model.parameters(), *model.buffers())
        placed: dict[int, Any] = {id(tensor): self._placed(tensor) for tensor in tensors if tensor.is_meta}
        attributes = [value for module in model.modules() for value in vars(module).values()]
        placed |= {id(one): one.clone_state() for one in attributes if isinstance(one, torch.Generator)}
        with fake_tensor.FakeCopyMode(self._mode):
            self._model = copy.deepcopy(model, placed)
        for parameter in self._model.parameters():
            parameter.grad = None
        self._loss, self._as_on_gpu = loss or own_loss, as_on_gpu
        self._make = gpu_assumptions.at_once(optimizer) if as_on_gpu else optimizer
        self._updates: dict[str, torch.optim.Optimizer] = {}
        self.calls: dict[Signature, Call] = {}  # of all replays

    def _placed(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake CPU tensor for one on the meta device, where operators such as attention go other ways."""
        with self._mode:
            placed = torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="cpu")
        return torch.nn.Parameter(placed, tensor.requires_grad) if isinstance(tensor, torch.nn.Parameter) else placed

    def replay(self, batch: Any, levers: Levers) -> Timeline:
        """One steady step on a batch, real or fake, of which two micro-batches stand for all.

        ValueError when the shapes of the step depend on the values of activations, which a replay does not have. An
        exception raised below a fake tensor's operator can end the process, so Ctrl-C waits until this has returned.
        """
        return uninterrupted(partial(self._replay, batch, levers))

    def _replay(self, batch: Any, levers: Levers) -> Timeline:
        with self._faking():
            fake = tree_map_only(torch.Tensor, self._mode.valued, batch)
            update = self._update(fake, levers)
            follower = Follower(residents(self._model, update, fake))
            with follower.following(self._model):
                stepping.run(self._model, fake, self._loss, update, levers, follower.enter, _MOST_PARTS)
            timeline = follower.timeline()
            self.calls |= follower.calls
            return _rounded(timeline) if self._as_on_gpu else timeline

    def _update(self, batch: Any, levers: Levers) -> torch.optim.Optimizer:
        """The optimizer, its state in place."""
        if levers.optimizer_states not in self._updates:
            update = still(self._model.parameters(), levers.optimizer(self._make))
            stepping.run(self._model, batch, self._loss, update, Levers())
            self._updates[levers.optimizer_states] = update
        return self._updates[levers.optimizer_states]

    @contextmanager
    def _faking(self) -> Iterator[None]:
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
                stack.enter_context(gpu_assumptions.AsOnGpu())
            stack.enter_context(random_numbers_kept(devices=[]))
            try:
                yield
            except (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException) as error:
                raise ValueError(
                    f"the shapes of this step depend on the values of its activations ({error}), as in a mixture of "
                    "experts that drops no token: such a step can be measured, not forecast"
                ) from error
            except fake_tensor.UnsupportedOperatorException as error:
                raise ValueError(f"a step with the operator {error} can be measured, not forecast") from error


def _rounded(timeline: Timeline) -> Timeline:
    """With every allocation in whole blocks, and the workspace that cuBLAS holds from the first product on."""
    size = timeline.allocations["size_bytes"]
    blocks = -(-size // gpu_assumptions.ROUNDING_BYTES) * gpu_assumptions.ROUNDING_BYTES
    blocks = blocks.where(timeline.allocations["category"] != "offloaded activation", 0)  # those are on the host
    held = np.full(len(timeline.ops), gpu_assumptions.CUBLAS_BYTES)
    return replace(timeline, allocations=timeline.allocations.assign(size_bytes=blocks), inside_bytes=held)


class _Valued(fake_tensor.FakeTensorMode):
    """Fake tensors of which indices and masks have values: models branch on these."""

    def may_turn_const(self, t: torch.Tensor) -> bool:
        return super().may_turn_const(t) or (type(t) is torch.Tensor and _small(t))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, FakeTensor) and out.constant is None and _small(out) and _makes_values(func, args, kwargs):
            with no_dispatch():
                out = func(*args, **(kwargs or {}))
            return self.valued(out)  # fakes are made under dispatch
        return out

    def valued(self, tensor: torch.Tensor) -> torch.Tensor:
        """The fake of a real tensor, with its values if these are indices or a mask."""
        if isinstance(tensor, FakeTensor):
            return tensor
        return self.fake_tensor_converter.from_real_tensor(self, tensor, make_constant=_small(tensor))


def _small(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() and not tensor.is_complex() and tensor.numel() <= _MOST_VALUES


def _makes_values(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether this makes a tensor from nothing, the same each time: arange, ones, …"""
    return (
        not func._schema.name.startswith("aten::empty")
        and torch.Tag.nondeterministic_seeded not in func.tags
        and not any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves((args, kwargs)))
    )
