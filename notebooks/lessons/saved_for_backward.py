"""Bytes that autograd saves for backward in one call: what recomputing and smaller inputs save."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


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
