"""Time and saved bytes of a few calls side by side: what comparisons of levers rest on."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import TypeVar

import torch

from effkit.device import synchronize

Key = TypeVar("Key", bound=Hashable)


def interleaved_ns(
    calls: Mapping[Key, Callable[[], object]], repeats: int, pick: Callable[[list[int]], float] = statistics.median
) -> dict[Key, int]:
    """Time of each call [ns], the GPU's part of it included: all once, ``repeats`` times after a warm-up.

    Each time in another order, so that none always finds the caches as the same other left them. ``pick`` makes one
    time of a call's: their median, or ``min`` where other work on the machine is the only noise.

    Raises
    ------
    ValueError
        When repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1; given: {repeats}")
    taken: dict[Key, list[int]] = {key: [] for key in calls}
    for turn in range(repeats + 1):
        for key in random.Random(turn).sample(list(calls), len(calls)):
            synchronize()
            started = time.perf_counter_ns()
            calls[key]()
            synchronize()
            if turn:
                taken[key].append(time.perf_counter_ns() - started)
    return {key: round(pick(times)) for key, times in taken.items()}


def saved_bytes(forward: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the storages that autograd saves for backward in this call, each once.

    Parameters
    ----------
    forward
        Its output is dropped; no backward is run.
    known
        What is in memory anyway, parameters and inputs: their storages are left out.
    """
    outside = {tensor.untyped_storage()._cdata for tensor in known}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in outside:
            kept[storage._cdata] = storage  # held, so that no later one can have its address
        return tensor.detach()  # an alias, since a node that kept its own output would hold itself

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(storage.nbytes() for storage in kept.values())
