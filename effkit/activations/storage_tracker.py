"""Follow every storage through a step: the operator and the module that made it, what it is for, and its death."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves

from effkit.activations import op_costs, saved_tensor_hooks
from effkit.activations.stepping import BACKWARD, FORWARD, OPTIMIZER
from effkit.activations.timeline import CATEGORIES, Segment, Signature, Timeline
from effkit.training import storage_keys, storages

OUTSIDE = ""  # of any module
_TELLING = (int, str, torch.dtype, torch.memory_format)  # arguments whose values decide what an operator allocates


class Like(NamedTuple):
    """How a tensor looks; and the operator that made its storage, and as the how-manieth of its results."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    maker: tuple[Signature, int] | None


class Call(NamedTuple):
    """How to run an operator again: ``leaves`` and ``spec`` are its arguments, ``learns`` whether autograd was on;
    ``sizes`` those of what it made."""

    func: Any
    leaves: list[Any]
    spec: Any
    learns: bool
    sizes: tuple[int, ...]


class Follower(TorchDispatchMode):
    """Sees every operator below autograd, on real tensors or on fake ones, and learns of each storage's death.

    ``residents`` are there from the beginning, by category, and not counted again; they are not held. ``mark`` makes a
    context to run an operator in, from its number; it is given for real tensors only, whose addresses are noted too.
    """

    def __init__(
        self, residents: Mapping[str, Sequence[torch.Tensor]],
        mark: Callable[[int], AbstractContextManager[Any]] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self._mark = mark or nullcontext
        self._has_addresses = mark is not None  # fake storages have none
        self._ops: list[str] = []
        self._allocation_of: dict[int, int] = {}  # storage -> its allocation, -1 for a resident
        self._refs: list[Any] = []
        self._sizes: list[int] = []
        self._born: list[tuple[int, str, bool]] = []  # operator, module, while a forward was computed again
        self._deaths: dict[int, int] = {}
        self._saved: dict[int, tuple[str, int]] = {}  # allocation -> module and operator that saved it
        self._on_host: set[int] = set()
        self._addresses: list[int] = []
        self._gradients: set[int] = set()
        self._new_buffers: set[int] = set()  # in the place of others
        self._segments: list[Segment] = []
        self._work: list[tuple[int, ...]] = []
        self._signatures: list[Signature] = []
        self.calls: dict[Signature, Call] = {}  # of a replay
        self._aside: list[bool] = []
        self._parameters: list[torch.nn.Parameter] = []
        self._modules: list[str] = []
        self._resident_bytes: dict[str, int] = {}
        self._let_go: list[tuple[str, int, int]] = []
        self._residents: list[tuple[str, int]] = []
        self._device_type = next(tensor for tensors in residents.values() for tensor in tensors).device.type
        for category, tensors in residents.items():
            self._resident_bytes[category] = 0
            for storage in chain.from_iterable(map(storages, tensors)):
                self._resides(storage, category)

    def _resides(self, storage: torch.UntypedStorage, category: str) -> None:
        key, num_bytes = storage._cdata, storage.nbytes()

        def dead(_: Any) -> None:
            self._allocation_of.pop(key, None)
            self._let_go.append((category, len(self._ops), num_bytes))

        self._allocation_of[key] = -1
        self._refs.append(weakref.ref(storage, dead))
        self._resident_bytes[category] += num_bytes
        self._residents.append((category, num_bytes))

    @contextmanager
    def following(self, model: torch.nn.Module) -> Iterator[None]:
        """Follow what runs inside, module by module."""
        self._parameters = list(model.parameters())
        with ExitStack() as stack:
            for name, module in model.named_modules():
                # handles are contexts: leaving one removes the hook
                stack.enter_context(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
                stack.enter_context(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
            stack.enter_context(saved_tensor_hooks.watch(self._keep))
            stack.enter_context(self)
            yield
        self._new_buffers = self._allocations(model.buffers())

    def enter(self, phase: str) -> None:
        """A phase of the step begins."""
        self._modules.clear()
        if phase == OPTIMIZER:
            self._gradients = self._allocations(p.grad for p in self._parameters if p.grad is not None)
        # cutting off the first micro-batch belongs to it
        self._segments.append(Segment(phase, len(self._ops) if self._segments else 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # fake tensors ask for it
            return func(*args, **(kwargs or {}))
        if (taken := taken_as_it_is(func, args)) is not None:
            return taken
        number = len(self._ops)
        leaves, spec = tree_flatten((args, kwargs or {}))
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        # a sparse tensor that is written into has other parts afterwards
        parts = {key for one in given if one.layout != torch.strided for key in storage_keys(one)}
        with self._mark(number):
            out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        self._ops.append(func._schema.name.removeprefix("aten::"))
        others = [func._overloadname, *(leaf if isinstance(leaf, _TELLING) else type(leaf).__name__ for leaf in leaves)]
        half = bool(given) and given[0].dtype in op_costs.HALF
        looks = tuple((tuple(t.shape), _stride(t), str(t.dtype)) for t in given)
        self._signatures.append(Signature(self._ops[-1], looks, str(others), half))
        first = len(self._sizes)
        inputs = parts.union(*(storage_keys(one) for one in given if one.layout == torch.strided))
        for storage, tensor in ((storage, one) for one in made for storage in storages(one)):
            if storage._cdata not in self._allocation_of and storage._cdata not in inputs:
                self._birth(storage, tensor.device, number)
        if not self._has_addresses and self._signatures[-1] not in self.calls:
            # of a storage only its type: who holds it keeps it alive
            plain = [torch.UntypedStorage if isinstance(leaf, torch.UntypedStorage) else leaf for leaf in leaves]
            alike = [self._like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in plain]
            sizes = tuple(self._sizes[first:])
            self.calls[self._signatures[-1]] = Call(func, alike, spec, torch.is_grad_enabled(), sizes)
        self._aside.append(saved_tensor_hooks.at_work())
        self._work.append(op_costs.work(func, args, kwargs, out, given, made))
        return out

    def _like(self, tensor: torch.Tensor) -> Like:
        made, maker = min(self._allocations([tensor]), default=-1), None
        if made >= 0:
            op, first = self._born[made][0], made
            while first and self._born[first - 1][0] == op:
                first -= 1
            maker = self._signatures[op], made - first
        return Like(tuple(tensor.shape), _stride(tensor), tensor.dtype, tensor.device, maker)

    def _allocations(self, tensors: Iterable[torch.Tensor]) -> set[int]:
        """Those of these tensors; -1 for what was there before."""
        return {self._allocation_of.get(key, -1) for tensor in tensors for key in storage_keys(tensor)}

    @property
    def _latest(self) -> int:
        """The model's operator that has just run."""
        backwards = range(len(self._ops) - 1, -1, -1)
        return next((i for i in backwards if self._work[i][op_costs.MOVED] and not self._aside[i]), 0)

    def _leave(self) -> None:
        if self._modules:
            self._modules.pop()

    @property
    def _where(self) -> str:
        return self._modules[-1] if self._modules else OUTSIDE

    def _birth(self, storage: torch.UntypedStorage, device: torch.device, number: int) -> None:
        """Note a storage that an operator made: its inputs' are somebody else's."""
        allocation = len(self._sizes)
        again = bool(self._modules) and self._segments[-1].phase == BACKWARD
        # what waits in host memory does not count on a GPU
        self._sizes.append(storage.nbytes() if device.type == self._device_type else 0)
        self._addresses.append(storage.data_ptr() if self._has_addresses else 0)
        self._born.append((number, self._where, again))
        key = storage._cdata

        def dead(_: Any) -> None:
            self._allocation_of.pop(key, None)
            self._deaths[allocation] = len(self._ops)

        self._allocation_of[key] = allocation
        self._refs.append(weakref.ref(storage, dead))

    def _keep(self, original: torch.Tensor, kept: Any) -> None:
        """Autograd keeps these for the backward of the operator that has just run, or of the one that comes next."""
        if self._segments[-1].phase != FORWARD:
            return
        # an output is handed to the hooks detached, an input as it is
        comes_next = original.grad_fn is not None
        away = self._allocations(saved_tensor_hooks.tensors_away(kept))
        for allocation in sorted(self._allocations(saved_tensor_hooks.tensors_in(kept)) - {-1}):
            self._saved.setdefault(allocation, (self._where, len(self._ops) if comes_next else self._latest))
        self._on_host |= away - {-1}

    @property
    def addresses(self) -> Any:
        """Where each allocation was, if the tensors were real."""
        return np.array(self._addresses, dtype="int64")

    def timeline(self) -> Timeline:
        """What was followed. Storages that are still alive die after the last operator."""
        num_ops = len(self._ops)
        savers = [self._saved.get(i, (module, op)) for i, (op, module, _) in enumerate(self._born)]
        # an operator of the model's that does more than show a tensor in another shape
        working = np.flatnonzero((np.array(self._work)[:, op_costs.MOVED] > 0) & ~np.array(self._aside))
        made_for, last = np.array([op for _, op in savers], dtype="int64"), len(working) - 1
        frame = pd.DataFrame({
            "size_bytes": np.array(self._sizes, dtype="int64"),
            "birth": np.array([op for op, *_ in self._born], dtype="int64"),
            "death": np.array([self._deaths.get(i, num_ops) for i in range(len(self._born))], dtype="int64"),
            "module": [module for module, _ in savers],
            "operator": [self._ops[op] for op in working[np.searchsorted(working, made_for).clip(max=last)]],
        })  # fmt: skip
        category = pd.Categorical(self._categories(frame), categories=CATEGORIES)
        return Timeline(
            tuple(self._ops), frame.assign(category=category), self._resident_bytes, tuple(self._segments),
            np.array(self._work, dtype="int64").reshape(num_ops, -1), tuple(self._signatures),
            np.array(self._aside, dtype=bool), np.zeros(num_ops, dtype="int64"), tuple(self._let_go),
            tuple(self._residents),
        )  # fmt: skip

    def _categories(self, frame: pd.DataFrame) -> list[str]:
        """What backward finds there though forward made it was kept for it, whether or not the hooks were told."""
        backwards = np.array([segment.first for segment in self._segments if segment.phase == BACKWARD])
        birth, death = frame["birth"].to_numpy(), frame["death"].to_numpy()
        crossed = np.searchsorted(backwards, birth, "right")  # the next backward
        starts = np.append(backwards, len(self._ops) + 1)[crossed]
        phase = np.searchsorted([segment.first for segment in self._segments], birth, "right") - 1
        in_forward = np.array([segment.phase == FORWARD for segment in self._segments])
        kept = in_forward[phase] & (death > starts)
        # what an optimizer makes and keeps is its state
        state = np.array([segment.phase == OPTIMIZER for segment in self._segments])[phase] & (death == len(self._ops))
        return [
            "optimizer state" if state[i]
            else "buffer" if i in self._new_buffers
            else "gradient" if i in self._gradients
            else "offloaded activation" if i in self._on_host
            else "saved activation" if i in self._saved or kept[i]
            else "recomputed activation" if again else "workspace"
            for i, (_, _, again) in enumerate(self._born)
        ]  # fmt: skip


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) if tensor.layout == torch.strided else ()


def taken_as_it_is(func: Any, args: Any) -> torch.Tensor | None:
    """A sparse gradient that autograd copies: it does so only where somebody has had its parts in hand, as we have."""
    if func is not torch.ops.aten.clone.default or not args[0].is_sparse:
        return None
    caller = sys._getframe(1)
    while caller.f_code.co_name in ("__torch_dispatch__", "_fn", "inner"):  # ours, and torch's around them
        caller = caller.f_back  # type: ignore[assignment]
    if caller.f_code.co_name != "_engine_run_backward":
        return None
    return torch.ops.aten._sparse_coo_tensor_unsafe(
        args[0]._indices(), args[0]._values(), args[0].shape, is_coalesced=args[0].is_coalesced()
    )
