"""Follow every storage through a step: the operator and the module that made it, what it is for, and its death."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch._guards import active_fake_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_flatten

from effkit.activations import saved_tensor_hooks, timeline
from effkit.activations.stepping import BACKWARD, FORWARD, OPTIMIZER
from effkit.activations.timeline import GATHERED, ON_RANKS, SENT, WHOLE_GRADIENT, Ints, Segment, Signature, Timeline
from effkit.training import storage_keys, storages, wraps

OUTSIDE = ""  # of any module
DEVICE = torch.ops.prim.device.default
_KEPT = "saved activation", "offloaded activation"
_OTHERS = (*_KEPT, *ON_RANKS, "buffer", "gradient")  # of which there is no doubt
# What the arguments of torch's operators for shards are, from the first on
_OF_SHARDS = {
    "fsdp::all_gather_copy_in": ("", SENT), "fsdp::split_with_sizes_copy": ("", "", "", GATHERED),
    "fsdp::chunk_cat": (WHOLE_GRADIENT, "", "", SENT), "c10d::_reduce_scatter_base_": (SENT,),
}  # fmt: skip
_RESIZE = Signature("resize of a storage")
_MOST_WAIT_S = 0.05
_BETWEEN = {"__torch_dispatch__", "_faked", "_replaced", "_fn", "inner"}  # our functions, and torch's around them
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


class _Op(NamedTuple):
    """An operator that was followed; ``aside``: one that packs or unpacks what is kept for backward."""

    signature: Signature
    work: tuple[int, ...]
    aside: bool
    took_ns: int


@dataclass(slots=True, eq=False)
class _Storage:
    """What operator ``birth`` made, as its result number ``place``, and was let go of before ``death`` (0: not yet);
    ``saver`` are the module and the operator that it is kept for, or that made it."""

    size_bytes: int
    birth: int
    place: int
    category: str
    saver: tuple[str, int]
    address: int = 0
    death: int = 0


class Stretch(NamedTuple):
    """Operators that followed each other from the ``first`` on, and what they ``made``; the places of results in it."""

    first: int
    ops: list[_Op]
    made: list[_Storage]
    results: list[int]


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
        self._ops: list[_Op] = []
        self._made: list[_Storage] = []
        self._living: dict[int, _Storage | None] = {}  # by storage; None for a resident
        self._refs: list[Any] = []
        self._segments: list[Segment] = []
        self._known: dict[Any, tuple[Signature, tuple[int, ...]]] = {}  # of calls on such looks, and their work
        self.calls: dict[Signature, Call] = {}  # of a replay
        self._parameters: list[torch.nn.Parameter] = []
        self._modules: list[str] = []
        self._resident_bytes: dict[str, int] = {}
        self._let_go: list[tuple[str, int, int]] = []
        self._sent: list[Any] = []
        self._residents: list[tuple[str, int]] = []
        self._device_type = next(tensor for tensors in residents.values() for tensor in tensors).device.type
        for category, tensors in residents.items():
            self._resident_bytes[category] = 0
            for storage in chain.from_iterable(map(storages, tensors)):
                self._resident_bytes[category] += storage.nbytes()
                self._residents.append((category, storage.nbytes()))
                self._lives(storage, None, self._residents[-1])

    @contextmanager
    def following(self, model: torch.nn.Module) -> Iterator[None]:
        """Follow what runs inside, module by module."""
        self._parameters, self._fakes = list(model.parameters()), active_fake_mode()
        self._shards = of_shards(map(type, self._parameters))
        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(torch.UntypedStorage, "resize_", self._resizing()))
            for name, module in model.named_modules():
                # handles are contexts: leaving one removes the hook
                stack.enter_context(module.register_forward_pre_hook(lambda *_, name=name: self._modules.append(name)))
                stack.enter_context(module.register_forward_hook(lambda *_: self._leave(), always_call=True))
            stack.enter_context(saved_tensor_hooks.watch(self._keep))
            stack.enter_context(self)
            yield
        for one in self._of(model.buffers()):  # in the place of others
            one.category = "buffer"

    def enter(self, phase: str) -> None:
        """A phase of the step begins."""
        self._modules.clear()
        if phase == OPTIMIZER:
            for one in self._of(p.grad for p in self._parameters if p.grad is not None):
                one.category = "gradient"
        # cutting off the first micro-batch belongs to it
        self._segments.append(Segment(phase, len(self._ops) if self._segments else 0))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is DEVICE:  # fake tensors ask for it
            return args[0].device
        if (taken := taken_as_it_is(func, args)) is not None:
            return taken
        if of_shards(types):
            return NotImplemented
        if self._shards and active_fake_mode() is not self._fakes:  # they try what an operator's results will look like
            return func(*args, **(kwargs or {}))
        number, kwargs = len(self._ops), kwargs or {}
        leaves, looks = call_of(func, args, kwargs)
        given = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if self._sent:
            self._wait_for_threads()
        if self._has_addresses and "c10d" in func.namespace:
            self._sent = [weakref.ref(tensor) for tensor in given]
        # a sparse tensor that is written into has other parts afterwards
        parts = {key for one in given if one.layout != torch.strided for key in storage_keys(one)}
        with self._mark(number):
            begun = time.perf_counter_ns()
            out = func(*args, **kwargs)
            took_ns = time.perf_counter_ns() - begun
        made = [leaf for leaf in (out if isinstance(out, tuple | list) else (out,)) if isinstance(leaf, torch.Tensor)]
        if (known := self._known.get(looks)) is None:
            known = _signature(func, leaves, given), timeline.work_of(func, args, kwargs, out, given, made)
            if not parts and torch.Tag.dynamic_output_shape not in func.tags:
                self._known[looks] = known
        first = len(self._made)
        for tensor, storage in ((one, storage) for one in made for storage in storages(one)):
            key = storage._cdata  # what is its inputs' is somebody else's
            if key not in self._living and key not in parts and not _among(key, given):
                self._birth(storage, tensor.device, number, len(self._made) - first)
        self._ops.append(_Op(*known, saved_tensor_hooks.at_work(), took_ns))
        if (categories := _OF_SHARDS.get(func._schema.name)) is not None:
            for category, of in zip(categories, (*args, *kwargs.values()), strict=False):
                for one in self._of(of if isinstance(of, list) else [of]) if category else ():
                    one.category = category
        if not self._has_addresses and known[0] not in self.calls and func.namespace == "aten":
            # of a storage only its type: who holds it keeps it alive
            plain = [torch.UntypedStorage if isinstance(leaf, torch.UntypedStorage) else leaf for leaf in leaves]
            alike = [self._like(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in plain]
            sizes = tuple(one.size_bytes for one in self._made[first:])
            self.calls[known[0]] = Call(func, alike, tree_flatten((args, kwargs))[1], torch.is_grad_enabled(), sizes)
        return out

    def _wait_for_threads(self) -> None:
        """Until gloo's have let go of what the last collective was given: what they free, no event tells."""
        limit = time.monotonic() + _MOST_WAIT_S
        while any((one := held()) is not None and one._use_count() > 1 for held in self._sent):
            if time.monotonic() > limit:
                break
            time.sleep(1e-4)  # and not 0: they may be waiting for this very core
        self._sent = []

    def _like(self, tensor: torch.Tensor) -> Like:
        own = [self._living.get(key) for key in storage_keys(tensor)]
        maker = (self._ops[own[0].birth].signature, own[0].place) if own and own[0] else None
        maker = maker if maker and maker[0] in self.calls else None  # nobody runs a collective again
        return Like(tuple(tensor.shape), _stride(tensor), tensor.dtype, tensor.device, maker)

    def _of(self, tensors: Iterable[torch.Tensor]) -> list[_Storage]:
        """What operators made of these tensors."""
        living = (self._living.get(key) for tensor in tensors for key in storage_keys(tensor))
        return [one for one in living if one is not None]

    @property
    def _latest(self) -> int:
        """The model's operator that has just run."""
        backwards = range(len(self._ops) - 1, -1, -1)
        return next((i for i in backwards if self._ops[i].work[timeline.MOVED] and not self._ops[i].aside), 0)

    def _leave(self) -> None:
        if self._modules:
            self._modules.pop()

    @property
    def _where(self) -> str:
        return self._modules[-1] if self._modules else OUTSIDE

    @property
    def _category(self) -> str:
        """Of what is made now, unless it turns out to be for something else."""
        again = bool(self._modules) and self._segments[-1].phase == BACKWARD
        return "recomputed activation" if again else "workspace"

    def _birth(self, storage: torch.UntypedStorage, device: torch.device, number: int, place: int) -> None:
        # what waits in host memory does not count on a GPU
        size = storage.nbytes() if device.type == self._device_type else 0
        address = storage.data_ptr() if self._has_addresses else 0
        self._made.append(_Storage(size, number, place, self._category, (self._where, number), address))
        self._lives(storage, self._made[-1])

    def _lives(self, storage: torch.UntypedStorage, one: _Storage | None, resident: tuple[str, int] = ("", 0)) -> None:
        """``None``: a resident, of this category and size."""
        key = storage._cdata

        def dead(_: Any) -> None:
            if one is None:
                self._living.pop(key, None)
                self._let_go.append((resident[0], len(self._ops), resident[1]))
            elif self._living.get(key) is one:  # and has not another size since
                del self._living[key]
                one.death = len(self._ops)

        self._living[key] = one
        self._refs.append(weakref.ref(storage, dead))

    def _resizing(self) -> Callable[[torch.UntypedStorage, int], Any]:
        """In the place of a storage's ``resize_``, of which no operator tells: FSDP2 frees and fills parameters so."""
        really = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, num_bytes: int) -> Any:
            if self not in _get_current_dispatch_mode_stack():  # fake tensors do so inside an operator
                return really(storage, num_bytes)
            key, number = storage._cdata, len(self._ops)
            one = self._living.pop(key, None)
            if one is not None:
                one.death = number
            with self._mark(number):
                out = really(storage, num_bytes)
            self._ops.append(_Op(_RESIZE, (1, 0, 0, 0), False, 0))
            if num_bytes:
                here = storage.device.type in ("meta", self._device_type)  # fake ones are on the meta device
                self._birth(storage, torch.device(self._device_type) if here else storage.device, number, 0)
            return out

        return resize

    def _keep(self, original: torch.Tensor, kept: Any) -> None:
        """Autograd keeps these for the backward of the operator that has just run, or of the one that comes next."""
        if self._segments[-1].phase != FORWARD:
            return
        # an output is handed to the hooks detached, an input as it is
        saver = self._where, len(self._ops) if original.grad_fn is not None else self._latest
        for one in self._of(saved_tensor_hooks.tensors_in(kept)):
            if one.category not in (*_KEPT, GATHERED):
                one.category, one.saver = _KEPT[0], saver
        for one in self._of(saved_tensor_hooks.tensors_away(kept)):
            one.category = _KEPT[1]

    @property
    def here(self) -> tuple[int, int]:
        """How many operators there were so far, and how many storages they made."""
        return len(self._ops), len(self._made)

    def stretch(self, since: tuple[int, int], results: Iterable[torch.Tensor]) -> Stretch | None:
        """What was followed since then, if these are all that is left of it, each with a storage of its own."""
        made, kept = self._made[since[1] :], self._of(results)
        left = [one for one in made if not one.death]
        if len(left) != len(kept) or any(one not in kept for one in left):
            return None
        return Stretch(since[0], self._ops[since[0] :], list(map(copy, made)), [made.index(one) for one in kept])

    def repeat(self, stretch: Stretch, results: Iterable[torch.Tensor]) -> None:
        """The same once more, which makes these."""
        by, first, where, category = len(self._ops) - stretch.first, len(self._made), self._where, self._category
        self._ops += stretch.ops
        self._made += [_Storage(one.size_bytes, one.birth + by, one.place, category, (where, one.birth + by), 0,
                                one.death and one.death + by) for one in stretch.made]  # fmt: skip
        for tensor, i in zip(results, stretch.results, strict=True):
            self._lives(tensor.untyped_storage(), self._made[first + i])

    @property
    def addresses(self) -> Any:
        """Where each allocation was, if the tensors were real."""
        return np.array([one.address for one in self._made], dtype="int64")

    @property
    def durations_ns(self) -> Ints:
        """How long each operator took."""
        return np.array([op.took_ns for op in self._ops], dtype="int64")

    def timeline(self) -> Timeline:
        """What was followed. Storages that are still alive die after the last operator."""
        signatures, rows, aside, _ = zip(*self._ops, strict=True)
        ops, work = tuple(one.name for one in signatures), np.array(rows, dtype="int64")
        # an operator of the model's that does more than show a tensor in another shape
        working = np.flatnonzero((work[:, timeline.MOVED] > 0) & ~np.array(aside))
        made_for = np.searchsorted(working, np.array([one.saver[1] for one in self._made], dtype="int64"))
        frame = pd.DataFrame({
            "size_bytes": np.array([one.size_bytes for one in self._made], dtype="int64"),
            "birth": np.array([one.birth for one in self._made], dtype="int64"),
            "death": np.array([one.death or len(ops) for one in self._made], dtype="int64"),
            "module": [one.saver[0] for one in self._made],
            "operator": [ops[op] for op in working[made_for.clip(max=len(working) - 1)]],
        })  # fmt: skip
        category = pd.Categorical(self._categories(frame), categories=timeline.CATEGORIES)
        return Timeline(
            ops, frame.assign(category=category), self._resident_bytes, tuple(self._segments), work, signatures,
            np.array(aside, dtype=bool), np.zeros(len(ops), dtype="int64"), tuple(self._let_go), tuple(self._residents),
        )  # fmt: skip

    def _categories(self, frame: pd.DataFrame) -> list[str]:
        """What backward finds there though forward made it was kept for it, whether or not the hooks were told."""
        phases, firsts = map(np.array, zip(*self._segments, strict=True))
        birth, death = frame["birth"].to_numpy(), frame["death"].to_numpy()
        backwards = firsts[phases == BACKWARD]
        starts = np.append(backwards, len(self._ops) + 1)[np.searchsorted(backwards, birth, "right")]  # of the next one
        phase = phases[np.searchsorted(firsts, birth, "right") - 1]
        kept = (phase == FORWARD) & (death > starts)
        state = (phase == OPTIMIZER) & (death == len(self._ops))  # what an optimizer makes and keeps
        return ["optimizer state" if state[i] else _KEPT[0] if kept[i] and one.category not in _OTHERS else one.category
                for i, one in enumerate(self._made)]  # fmt: skip


def of_shards(types: Any) -> bool:
    """Whether an operator is called on tensors that wrap this rank's part: they call it again with that."""
    return any(map(wraps, types))


def call_of(func: Any, args: Any, kwargs: Any) -> tuple[list[Any], tuple[Any, ...]]:
    """An operator's arguments in one row, and what tells this call from calls on tensors of other looks."""
    leaves: list[Any] = []
    looks: list[Any] = [func, *kwargs]
    for argument in (*args, *kwargs.values()):
        if isinstance(argument, list | tuple):
            looks.append(len(argument))
            leaves += argument
        else:
            leaves.append(argument)
    for leaf in leaves:
        if isinstance(leaf, torch.Tensor):
            looks += leaf.shape, _stride(leaf), leaf.dtype
        else:  # who holds a storage keeps it alive
            looks += type(leaf), None if isinstance(leaf, torch.UntypedStorage | torch.ScriptObject | list) else leaf
    return leaves, tuple(looks)


def _signature(func: Any, leaves: list[Any], given: list[torch.Tensor]) -> Signature:
    others = [func._overloadname, *(leaf if isinstance(leaf, _TELLING) else type(leaf).__name__ for leaf in leaves)]
    looks = tuple((tuple(t.shape), _stride(t), str(t.dtype)) for t in given)
    half = bool(given) and given[0].dtype in timeline.HALF
    return Signature(func._schema.name.removeprefix("aten::"), looks, str(others), half)


def _among(key: int, given: list[torch.Tensor]) -> bool:
    return any(one.layout == torch.strided and one.untyped_storage()._cdata == key for one in given)


def _stride(tensor: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor.stride()) if tensor.layout == torch.strided else ()


def taken_as_it_is(func: Any, args: Any) -> torch.Tensor | None:
    """A sparse gradient that autograd copies: it does so only where somebody has had its parts in hand, as we have."""
    if func is not torch.ops.aten.clone.default or not args[0].is_sparse:
        return None
    caller = sys._getframe(1)
    while caller.f_code.co_name in _BETWEEN:
        caller = caller.f_back  # type: ignore[assignment]
    if caller.f_code.co_name != "_engine_run_backward":
        return None
    return torch.ops.aten._sparse_coo_tensor_unsafe(
        args[0]._indices(), args[0]._values(), args[0].shape, is_coalesced=args[0].is_coalesced()
    )
