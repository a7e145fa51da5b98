"""Regions of storages: what several views of one tensor share, kept once for all of them."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

# What is kept in a tensor's stead: a tensor, or a NamedTuple that holds tensors.
Kept = Any


@dataclass(frozen=True, slots=True)
class Region:
    """The stretch of a storage that is kept for a tensor, and how the tensor lies in it.

    A tensor without gaps is its own stretch, in whatever order its dimensions are, so that ``x``, ``x.view(-1, d)`` and
    ``x.t()`` are kept once. One with gaps (a third of ``qkv``) takes the whole storage, which its siblings then share,
    unless it is less than a quarter of it: then it is kept as a contiguous copy.
    """

    key: Hashable
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    start: int | None  # in the storage; None for a copy of a small part
    numel: int

    @classmethod
    def of(cls, tensor: Tensor, *, in_order: bool = False) -> Region:
        """The region of a strided tensor, valid until it is changed in place.

        ``in_order``: one whose values are in the order of the tensor, and shared with tensors of the same last
        dimension only.
        """
        size, stride, start, num = tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()), tensor.numel()
        storage = tensor.untyped_storage()
        version = (StorageWeakRef(storage), tensor._version, tensor.dtype)
        extent = 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if num else 0
        in_all = storage.nbytes() // tensor.element_size()
        if in_order and tensor.is_contiguous():
            return cls((*version, start, extent, size[-1:]), size, stride, 0, start, extent)
        if extent <= num and not in_order:
            return cls((*version, start, extent), size, stride, 0, start, extent)
        if 4 * num >= in_all and not in_order:
            return cls((*version, 0, in_all), size, stride, start, 0, in_all)
        return cls((*version, start, size, stride), size, (), 0, None, num)

    def cut(self, tensor: Tensor) -> Tensor:
        """The region [n] of the tensor that it was made of; a view, or a copy where the tensor is a small part."""
        if self.start is None:
            return tensor.detach().contiguous().view(-1)
        return tensor.detach().as_strided((self.numel,), (1,), self.start)

    def place(self, flat: Tensor) -> Tensor:
        """The tensor, as a view of its region [n]."""
        return flat.view(self.size) if self.start is None else flat.as_strided(self.size, self.stride, self.offset)


class Away(ABC):
    """What is kept, in host memory."""

    kept: Kept

    @abstractmethod
    def back(self) -> Kept:
        """The same on its device."""


class Once:
    """What is kept of one region: shared by all its views, as is what it is restored to while one of them is alive."""

    __slots__ = ("__weakref__", "_alive", "_like", "kept")

    def __init__(self, kept: Kept) -> None:
        self.kept = kept
        self._alive: Callable[[], torch.UntypedStorage | None] = lambda: None
        self._like: tuple[torch.dtype, torch.device, torch.Size] | None = None

    def restored(self, restore: Callable[[Kept], Tensor]) -> Tensor:
        """``restore(kept)`` ([n], filling its storage), or the same memory again while it is in use."""
        storage, like = self._alive(), self._like
        if storage is None or like is None:
            flat = restore(self.kept.back() if isinstance(self.kept, Away) else self.kept)
            # The storage and not the tensor: autograd wraps what it unpacks anew.
            self._alive, self._like = weakref.ref(flat.untyped_storage()), (flat.dtype, flat.device, flat.shape)
            return flat
        dtype, device, shape = like
        # Of a constant: for others a FakeTensorMode caches the call with its arguments, and the storage never dies.
        return torch.tensor([], dtype=dtype, device=device).set_(storage, 0, shape, (1,))


class PerStorage(weakref.WeakValueDictionary[Hashable, Once]):
    """Makes one :class:`Once` per region of a storage; it lives as long as something packed refers to it.

    The weak reference in a region's key reserves the storage's address, so that no later storage is taken for it.
    """

    def once(self, region: Region, make: Callable[[], Kept]) -> Once:
        """The one of this region, made now if there is none."""
        values = self.get(region.key)
        if values is None:
            values = self[region.key] = Once(make())
        return values
