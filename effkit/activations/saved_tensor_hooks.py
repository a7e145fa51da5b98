"""Stages that autograd's saved tensors pass through on their way to backward, in any nesting of contexts.

``torch.autograd.graph.saved_tensors_hooks`` applies the innermost pair of hooks only: a second context would switch the
first one off. Here each context adds a stage, and the innermost hooks run them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from functools import partial
from threading import local
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from effkit.activations.storage_views import Away, Kept, Once


class Place(IntEnum):
    """Where a stage stands: saved tensors pass from low to high, and come back from high to low."""

    COMPRESS = 0
    OFFLOAD = 1
    WATCH = 2


class _Stage(NamedTuple):
    place: Place
    pack: Callable[[Tensor, Kept], Kept]
    unpack: Callable[[Kept], Kept]


class _Packed(NamedTuple):
    """What autograd holds. The stages are in it, so that backward needs no context and may run in any thread."""

    stages: tuple[_Stage, ...]
    kept: Kept
    alias: Tensor | None  # of the tensor itself, where that is what is kept
    version: int


_STAGES: ContextVar[tuple[_Stage, ...]] = ContextVar("_STAGES", default=())


@contextmanager
def stage(place: Place, pack: Callable[[Tensor, Kept], Kept], unpack: Callable[[Kept], Kept]) -> Iterator[None]:
    """Let each tensor that autograd saves in this context pass through ``pack``, and in backward through ``unpack``.

    ``place`` says before or after which other stages, whatever the order in which the contexts were entered. Of several
    contexts at ``COMPRESS`` the innermost holds, and so at ``OFFLOAD``; at ``WATCH`` all do. ``pack`` is ``(the tensor
    as autograd saves it, what the stages before keep of it) -> what is kept``; the second is the first when no stage
    has changed it, and may be given back. ``unpack`` is its reverse; the last one yields a tensor of the shape, dtype
    and device that were saved.
    """
    others = [other for other in _STAGES.get() if other.place != place or place == Place.WATCH]
    stages = tuple(sorted([*others, _Stage(place, pack, unpack)], key=lambda stage: stage.place))
    token = _STAGES.set(stages)
    try:
        with torch.autograd.graph.saved_tensors_hooks(partial(_pack, stages), _unpack):
            yield
    finally:
        _STAGES.reset(token)


def _pack(stages: tuple[_Stage, ...], tensor: Tensor) -> _Packed:
    with _busy():
        # An alias from the start: a node that kept its own output would hold itself, and never be freed.
        kept = alias = tensor.detach()
        for stage in stages:
            kept = stage.pack(tensor, kept)
        kept = alias if kept is tensor else kept
        unchanged = any(part is alias for part in tensors_in(kept))
        return _Packed(stages, kept, alias if unchanged else None, tensor._version)


def _unpack(packed: _Packed) -> Tensor:
    kept, alias = packed.kept, packed.alias
    # autograd leaves this check to whoever hooks in
    if alias is not None and alias._version != packed.version:
        raise RuntimeError(
            f"a tensor of shape {tuple(alias.shape)} that backward needs was changed in place after it was saved "
            f"(version {alias._version}, expected {packed.version}): change a copy of it instead"
        )
    with _busy():
        for stage in reversed(packed.stages):
            kept = stage.unpack(kept)
    return kept


_WORK = local()


@contextmanager
def _busy() -> Iterator[None]:
    before, _WORK.going_on = at_work(), True
    try:
        yield
    finally:
        _WORK.going_on = before


def at_work() -> bool:
    """Whether stages are packing or unpacking in this thread, so that its operators are theirs and not the model's."""
    return getattr(_WORK, "going_on", False)


@contextmanager
def watch(seen: Callable[[Tensor, Kept], None]) -> Iterator[None]:
    """Call ``seen(original, kept)`` for each tensor that autograd saves in this context.

    Saved several times, it is seen several times: deduplicate by storage before adding bytes. Regions under
    ``torch.utils.checkpoint`` show their inputs only, and what selective checkpointing caches is not seen.

    ``kept`` is what is kept in its stead after all other stages: an alias of the tensor when none changed it, else a
    NamedTuple; :func:`tensors_in` lists the tensors in either.
    """

    def pack(original: Tensor, kept: Kept) -> Kept:
        seen(original, kept)
        return kept

    with stage(Place.WATCH, pack, lambda kept: kept):
        yield


def tensors_in(kept: Kept) -> list[Tensor]:
    """The tensors that a kept object holds, on the device or in host memory."""
    return [tensor for tensor, _ in _located(kept)]


def tensors_away(kept: Kept) -> list[Tensor]:
    """Those of them that were sent to host memory."""
    return [tensor for tensor, away in _located(kept) if away]


def _located(kept: Kept, away: bool = False) -> Iterator[tuple[Tensor, bool]]:
    for leaf in tree_leaves(kept):
        if isinstance(leaf, Tensor):
            yield leaf, away
        elif isinstance(leaf, Once):
            yield from _located(leaf.kept, away)
        elif isinstance(leaf, Away):
            yield from _located(leaf.kept, True)


# Nodes of autograd that show the same weight in another shape or precision; each has one input.
_SAME_WEIGHT = frozenset(
    f"{name}Backward{i}"
    for name in (
        "Alias", "AsStrided", "Clone", "Expand", "Narrow", "Permute", "ReshapeAlias", "Select", "Slice", "Split",
        "SplitWithSizes", "Squeeze", "T", "ToCopy", "Transpose", "Unbind", "UnsafeView", "Unsqueeze", "View",
    )
    for i in range(3)
)  # fmt: skip
_HOPS = 6


def is_weight(tensor: Tensor) -> bool:
    """Whether this is a parameter, a view of one or autocast's cast of one, which exist without being saved.

    A cast of a frozen parameter leaves no trace in the graph and passes for an activation.
    """
    if isinstance(tensor, torch.nn.Parameter) or isinstance(tensor._base, torch.nn.Parameter):
        return True
    node = tensor.grad_fn
    for _ in range(_HOPS):
        if node is None or node.name() not in _SAME_WEIGHT:
            break
        node = node.next_functions[0][0]
    return isinstance(getattr(node, "variable", None), torch.nn.Parameter)


def stays(tensor: Tensor, min_elements: int) -> bool:
    """Whether no stage puts anything in the place of this: a weight, a sparse tensor, one with fewer elements."""
    return tensor.numel() < max(1, min_elements) or tensor.layout != torch.strided or is_weight(tensor)
