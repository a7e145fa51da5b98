"""offloaded(): keep what autograd saves in host memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple
from weakref import WeakSet

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from effkit.activations.saved_tensor_hooks import Place, stage, stays, tensors_in
from effkit.activations.storage_views import Away, Kept, Once, PerStorage, Region
from effkit.arguments import checked_whole
from effkit.lab.knobs import checked_share

# Below this a copy is all latency: 10 us over PCIe is the time of 256 KiB at 25 GB/s.
_MIN_ELEMENTS = 4096


class Offloaded(NamedTuple):
    """What is kept in place of a saved tensor: a region of its storage in host memory, and how it lies in it.

    Where another stage has put a :class:`~effkit.activations.storage_views.Once` in the tensor's place, what that
    holds goes to host memory instead; ``tensors_away`` tells in both cases.
    """

    region: Region
    values: Once


class Staying(NamedTuple):
    """A tensor that stays on the device, and the decision, which holds for other views of its region."""

    kept: Tensor
    decided: Once


@contextmanager
def offloaded(frac: float = 1.0, *, min_elements: int = _MIN_ELEMENTS) -> Iterator[None]:
    """Keep what autograd saves in this context in host memory, until backward.

    On a GPU the copies travel on a stream of their own, to pinned memory and back, and each tensor that backward takes
    has the one that was saved before it fetched ahead. On a CPU the same copies are made in plain memory: values and
    order are the same, yet nothing leaves the device, so only on a GPU do its bytes count as offloaded. Each region of
    a storage travels once, and in eight bits where :func:`~effkit.activations.compressing.compressed` is active.
    Weights stay.

    Parameters
    ----------
    frac
        Share of the saved bytes that goes. Tensors go or stay in the order in which they are saved, so that the share
        so far is as close to ``frac`` as it can be.
    min_elements
        Tensors with fewer stay.
    """
    frac, min_elements = checked_share("frac", frac), checked_whole("min_elements", min_elements, 0)
    regions, decided, gone, saved = PerStorage(), WeakSet[Once](), 0, 0
    last: weakref.ref[_Sent] | None = None

    def takes(size: int) -> bool:
        nonlocal gone, saved
        saved += size
        goes = gone + size / 2 <= frac * saved
        gone += size * goes
        return goes

    def send(kept: Kept) -> _Sent:
        nonlocal last  # it knows what was sent before, without keeping any of it
        sent = _Sent(kept, last)
        last = weakref.ref(sent)
        return sent

    def pack(original: Tensor, kept: Kept) -> Kept:
        if stays(original, min_elements):
            return kept
        if isinstance(kept, Tensor):
            region = Region.of(kept)
            num_bytes = region.numel * kept.element_size()
            values = regions.once(region, lambda: send(region.cut(kept)) if takes(num_bytes) else None)
            return Staying(kept, values) if values.kept is None else Offloaded(region, values)
        for values in (leaf for leaf in tree_leaves(kept) if isinstance(leaf, Once)):
            if values not in decided:
                decided.add(values)
                if takes(sum(tensor.nbytes for tensor in tensors_in(values.kept))):
                    values.kept = send(values.kept)
        return kept

    with stage(Place.OFFLOAD, pack, _fetch):
        yield


def _fetch(kept: Kept) -> Kept:
    if isinstance(kept, Staying):
        return kept.kept
    if isinstance(kept, Offloaded):
        return kept.region.place(kept.values.restored(lambda flat: flat))
    return kept


class _Sent(Away):
    """Tensors that were sent to the host, with the stream that brings them there and back."""

    def __init__(self, kept: Kept, previous: weakref.ref[_Sent] | None) -> None:
        self.device, self.previous = tensors_in(kept)[0].device, previous
        self.stream = _stream_of(self.device)
        self.ahead: Kept = None
        self.was_back = False
        self.arrival: Any = None
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with _on(self.stream):
            self.kept = tree_map_only(Tensor, self._to_host, kept)

    def back(self) -> Kept:
        """The tensors on their device, ready for its current stream; what was sent before them sets out."""
        if self.ahead is None:
            self._set_out()
        kept, self.ahead, self.was_back = self.ahead, None, True
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_event(self.arrival)
            for tensor in tensors_in(kept):
                tensor.record_stream(current)
            previous = self.previous() if self.previous else None
            if previous is not None and previous.ahead is None and not previous.was_back:
                previous._set_out()
        return kept

    def _to_host(self, tensor: Tensor) -> Tensor:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=self.stream is not None)
        copy.copy_(tensor, non_blocking=True)
        if self.stream is not None:
            tensor.record_stream(self.stream)  # its memory is not for others until the copy is made
        return copy

    def _set_out(self) -> None:
        with _on(self.stream):
            # allocated on the side stream, so that it need not wait for what the current one has yet to do
            self.ahead = tree_map_only(Tensor, lambda x: x.to(self.device, non_blocking=True, copy=True), self.kept)
            self.arrival = None if self.stream is None else self.stream.record_event()


@cache
def _stream_of(device: torch.device) -> Any:
    """The stream for copies of this GPU, the same for all contexts; none on other devices."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def _on(stream: Any) -> AbstractContextManager[Any]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
