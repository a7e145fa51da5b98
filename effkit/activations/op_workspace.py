"""What a replay cannot see: memory that an operator allocates inside itself, found by running that operator alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves, tree_unflatten

from effkit.activations.real_step import Recording, mark
from effkit.activations.storage_tracker import Call, Like
from effkit.activations.timeline import MOVED, Signature, Timeline
from effkit.recording import memory_events
from effkit.training import storage_keys, storages

_REFUSED = (RuntimeError, IndexError, TypeError, ValueError, NotImplementedError)
_NUMBERS_BYTES = 64  # inside an operator, up to so much is numbers that became tensors: the same at any size


@dataclass(eq=False)
class Workspace:
    """Bytes that operators allocate inside themselves, and the sizes of what they return.

    A replay knows of each operator all but this. An operator that hid nothing in a real step hides nothing at smaller
    sizes; any other is run alone, on zeros, at each size that is asked for: which way a library goes depends on it.

    ``inside`` and ``sizes`` are of each signature that was run alone; ``hidden`` has, by name and data types, the most
    that such an operator hid in a real step, or alone, and the most it moved there; ``larger`` are those that return
    more than a replay knows.
    """

    inside: dict[Signature, int] = field(default_factory=dict)
    sizes: dict[Signature, tuple[int, ...]] = field(default_factory=dict)
    hidden: dict[Any, tuple[int, int]] = field(default_factory=dict)
    larger: set[Signature] = field(default_factory=set)

    @property
    def unknown(self) -> frozenset[Signature]:
        """Those that could not be run alone."""
        return frozenset(self.sizes.keys() - self.inside.keys())

    def watch(self, real: Timeline, replayed: Timeline) -> None:
        """Learn from a real step, and its replay, which operators hide something."""
        expected = dict(zip(replayed.signatures, _returned(replayed), strict=True))
        for signature, work, inside, sizes in zip(
            real.signatures, real.work, real.inside_bytes, _returned(real), strict=True
        ):
            self._note(signature, int(work[MOVED]), int(inside), sizes, expected.get(signature, sizes))

    def learn(self, timeline: Timeline, calls: Mapping[Signature, Call]) -> None:
        """Run alone those operators of a replay that may hide something, and were not run yet."""
        moves = dict(zip(timeline.signatures, timeline.work[:, MOVED], strict=True))
        new = [signature for signature, moved in moves.items()
               if moved and signature in calls and signature not in self.sizes and self._may_hide(signature, moved)
               # who is given a storage only makes a tensor show it
               and not any(leaf is torch.UntypedStorage for leaf in calls[signature].leaves)]  # fmt: skip
        if not new:
            return
        tries: list[Signature] = []
        ran: dict[int, int] = {}  # number of a try that went well -> bytes that it left

        def attempt(signature: Signature, real: bool) -> bool:
            tries.append(signature)
            call = calls[signature]
            try:
                args, kwargs = self._arguments(signature, calls, real)
                with torch.set_grad_enabled(call.learns), mark(len(tries) - 1):
                    out = call.func(*args, **kwargs)
            except _REFUSED:
                return False
            sizes = tuple(storage.nbytes() for _, storage in _made(out, (args, kwargs)))
            ran[len(tries) - 1] = sum(sizes)
            # where values decide how much it returns, the replay knows them
            self.sizes[signature] = call.sizes if torch.Tag.dynamic_output_shape in call.func.tags else sizes
            return True

        def run() -> None:
            # a replay may be wrong about what an operator returns, such as its data type, and the next refuse that
            for signature in new:
                if not attempt(signature, False) and not attempt(signature, True):
                    self.sizes[signature] = calls[signature].sizes

        with torch.random.fork_rng():
            recording = Recording.of(memory_events(run), _device(calls[signature] for signature in new))
        kept = np.array([ran.get(number, 0) for number in recording.numbers.tolist()], dtype="int64")
        for number, amount in zip(recording.numbers.tolist(), recording.inside(kept).tolist(), strict=True):
            if number in ran:
                signature = tries[number]
                self.inside[signature] = amount
                if sum(self.sizes[signature]) > sum(calls[signature].sizes) + _NUMBERS_BYTES:
                    self.larger.add(signature)
                self._note(signature, int(moves[signature]), amount, self.sizes[signature], calls[signature].sizes)

    def _note(
        self, signature: Signature, moved: int, inside: int, real: Sequence[int], replayed: Sequence[int]
    ) -> None:
        hidden = max(inside, abs(sum(real) - sum(replayed)))
        most, moved_most = self.hidden.get(signature.kind, (0, 0))
        self.hidden[signature.kind] = max(most, hidden), max(moved_most, moved)

    def _may_hide(self, signature: Signature, moved: int) -> bool:
        """Nothing is known of it, it hid something, or it moves more than any that hid nothing."""
        most, moved_most = self.hidden.get(signature.kind, (0, 0))
        return moved > moved_most or most > _NUMBERS_BYTES

    def _arguments(self, signature: Signature, calls: Mapping[Signature, Call], real: bool = False) -> Any:
        """Zeros of these looks, and masks that choose all; but of what a replay has only an empty tensor, and with
        ``real`` of all that an operator made, what that really returns."""
        call = calls[signature]
        leaves = [self._tensor(leaf, calls, real) if isinstance(leaf, Like) else leaf for leaf in call.leaves]
        return tree_unflatten(leaves, call.spec)

    def _tensor(self, like: Like, calls: Mapping[Signature, Call], real: bool) -> torch.Tensor:
        if like.maker is not None:
            maker, place = like.maker
            empty = not calls[maker].sizes[place] and any(self.sizes.get(maker, ())[place : place + 1])
            if real or empty:
                args, kwargs = self._arguments(maker, calls)
                with torch.set_grad_enabled(calls[maker].learns):
                    made, _ = _made(calls[maker].func(*args, **kwargs), (args, kwargs))[place]
                if empty or made.shape == like.shape:
                    return made
        span = 1 + sum((size - 1) * step for size, step in zip(like.shape, like.stride, strict=True))
        fill = torch.ones if like.dtype == torch.bool else torch.zeros  # a mask that chooses all
        flat = fill(max(0, span) if all(like.shape) else 0, dtype=like.dtype, device=like.device)
        return flat.as_strided(like.shape, like.stride)

    def applied(self, timeline: Timeline) -> Timeline:
        """A replayed timeline with what the replay did not see."""
        if not self.sizes and not self.hidden:
            return timeline
        inside = [self.inside[s] if s in self.inside else min(self.hidden.get(s.kind, (0, 0))[0], _NUMBERS_BYTES)
                  for s in timeline.signatures]  # fmt: skip
        births = timeline.allocations["birth"].to_numpy()
        sizes = timeline.allocations["size_bytes"].to_numpy().copy()
        for row, (op, place) in enumerate(zip(births, places(births), strict=True)):
            real = self.sizes.get(timeline.signatures[op], ())
            sizes[row] = real[place] if place < len(real) else sizes[row]
        return replace(timeline, allocations=timeline.allocations.assign(size_bytes=sizes),
                       inside_bytes=timeline.inside_bytes + np.array(inside, dtype="int64"))  # fmt: skip


def places(births: Any) -> Any:
    """Of each allocation, in order of birth: how many the same operator made before it."""
    return np.arange(len(births)) - np.searchsorted(births, births, "left")


def _returned(timeline: Timeline) -> list[list[int]]:
    """Sizes of what each operator made."""
    sizes: list[list[int]] = [[] for _ in timeline.ops]
    for op, size in zip(timeline.allocations["birth"], timeline.allocations["size_bytes"], strict=True):
        sizes[op].append(int(size))
    return sizes


def _made(out: Any, given: Any) -> list[tuple[torch.Tensor, torch.UntypedStorage]]:
    """The storages that an operator made, with the first tensor of each: its inputs' are somebody else's."""
    seen = {key for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor) for key in storage_keys(leaf)}
    made = []
    for leaf in (leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)):
        made += [(leaf, storage) for storage in storages(leaf) if storage._cdata not in seen]
        seen.update(storage_keys(leaf))
    return made


def _device(calls: Iterable[Call]) -> torch.device:
    """Where these run: some of what runs on a GPU is given numbers of the CPU."""
    devices = [leaf.device for call in calls for leaf in call.leaves if isinstance(leaf, Like)]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
