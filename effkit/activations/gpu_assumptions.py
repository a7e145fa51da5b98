"""What a step does otherwise on a GPU: :data:`FACTS`, each with its source, assumed where no GPU is there to ask.

:func:`as_on_gpu` lets CPU tensors go the ways that CUDA's go.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

BLOCK_BYTES, SMALL_BYTES = 512, 2**20
# requests below the first are cut from segments of the second, or of multiples of the third where that is less [bytes]
SEGMENT_BYTES = (SMALL_BYTES + 1, 2 * 2**20, 1), (10 * 2**20, 20 * 2**20, 1), (2**62, 0, 2 * 2**20)
WORKSPACE_BYTES = {
    r"\bG?H\d|\bG?B\d00": 4096 * 8 * 1024,
    r"\b([VTAPL]\d|RTX|GTX|TITAN|Quadro)": 4096 * 1024 * 2 + 16 * 1024 * 8,
}
# Under autocast, of what torch registers for CUDA and not for CPUs, the first are computed in half precision, the next
# write float32, the third group takes the widest type that it is given; the last is refused; all else is in float32.
HALF = {
    "einsum", "addmv", "addr", "mv", "chain_matmul", "linalg_multi_dot", "lstm_cell", "gru_cell", "rnn_tanh_cell",
    "rnn_relu_cell", "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "_scaled_dot_product_flash_attention",
    "_convolution", "convolution", "cudnn_convolution", "cudnn_convolution_transpose",
}  # fmt: skip
SUMS = {"prod", "softmax", "log_softmax", "cumprod", "cumsum", "linalg_vector_norm", "linalg_matrix_norm", "sum"}
WIDEST = {
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
    "scatter_add",
}  # fmt: skip
_REFUSED = {"binary_cross_entropy"}
# What is assumed, and where torch's source says so: on all chips, but for cuBLAS's workspace of 32 MiB for each thread
# that multiplies on Hopper and on Blackwell in data centres (8.1 MiB on others), and for attention from Ampere on.
FACTS = (
    "an allocator of blocks",  # c10/cuda/CUDACachingAllocator.cpp
    "cuBLAS workspaces",  # aten/src/ATen/cuda/CublasHandlePool.cpp
    "foreach optimizers",  # torch/optim/optimizer.py: _default_to_fused_or_foreach
    "1-byte dropout masks",  # aten/src/ATen/native/Dropout.cpp; CPUs keep a factor of the value's size
    "fused attention",  # aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; keeps no scores, with dropout too
    "CUDA's autocast",  # aten/src/ATen/autocast_mode.h: another list of operators in float32 than a CPU's
)
ASSUMED = f"; assumed of a GPU: {', '.join(FACTS)}"
_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
_Cast = dict[int, tuple[torch.Tensor, torch.Tensor]]  # weights, and the same in half precision


def workspace_bytes(device: Any) -> int:
    """What cuBLAS holds for a thread on ``"cuda"``, or on a chip of this name; asked of the GPU where one is there.

    ValueError for a name that is not known.
    """
    if device == "cuda" and torch.cuda.is_available():
        held_by_cublas()
        torch.ones(64, 64, device=device) @ torch.ones(64, 64, device=device)
        return held_by_cublas()
    if device == "cuda":
        return min(WORKSPACE_BYTES.values())
    for pattern, size in WORKSPACE_BYTES.items():
        if re.search(pattern, str(device)):
            return size
    raise ValueError(
        'device is cpu, cuda, the name of an NVIDIA GPU such as "H100", or left out for the model\'s own; given: '
        f"{device!r}"
    )


def held_by_cublas() -> int:
    """What it holds on this GPU [bytes]; it lets go of that, and takes it anew for its next product."""
    before = torch.cuda.memory_allocated()
    torch._C._cuda_clearCublasWorkspaces()
    return before - torch.cuda.memory_allocated()


@contextmanager
def as_on_gpu() -> Iterator[None]:
    """Dropout, attention and autocast on CPU tensors as CUDA does them; in backward, too."""
    cast: _Cast = {}
    clear = torch.clear_autocast_cache

    def cleared() -> None:
        cast.clear()
        clear()

    on_gpu, here = (set(torch._C._dispatch_get_registrations_for_dispatch_key(f"Autocast{kind}"))
                    for kind in ("CUDA", "CPU"))  # fmt: skip
    with (
        torch.library._scoped_library("aten", "IMPL") as library,
        mock.patch.object(torch, "clear_autocast_cache", cleared),
    ):
        library.impl("dropout", _dropout, "AutogradCPU")
        library.impl("scaled_dot_product_attention", _attention, "AutogradCPU")
        for name in (one.removeprefix("aten::") for one in on_gpu - here):
            if name not in _REFUSED:
                library.impl(name, _casting(name, cast), "AutocastCPU")
        yield


def _dropout(input: torch.Tensor, p: float, train: bool) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if train and p > 0 else input


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, **more: Any,
) -> torch.Tensor:  # fmt: skip
    operator = torch.ops.aten.scaled_dot_product_attention.default
    return operator.decompose(query, key, value, mask, 0.0, is_causal, **more)


def _casting(name: str, cast: _Cast) -> Callable[..., Any]:
    """An operator as CUDA's autocast calls it."""
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.aten, base), overload or "default")

    def called(*args: Any, **kwargs: Any) -> Any:
        half = torch.get_autocast_dtype("cpu")
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            if base not in SUMS:
                given = {leaf.dtype for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
                lower = base in HALF or (base in WIDEST and torch.float32 not in given)
                to = partial(_cast, dtype=half if lower else torch.float32, half=half, cast=cast)
                args, kwargs = tree_map_only(torch.Tensor, to, (args, kwargs))
            elif args[0].is_floating_point() and args[0].dtype != torch.float64 and kwargs.get("dtype") is None:
                # softmax takes it as its third argument
                kwargs |= {} if isinstance(args[-1], torch.dtype) else {"dtype": torch.float32}
            return operator(*args, **kwargs)

    return called


def _cast(tensor: torch.Tensor, dtype: torch.dtype, half: torch.dtype, cast: _Cast) -> torch.Tensor:
    """In this type; a weight is cast to half precision once, until autocast is left, but for inference mode."""
    if not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    weight = dtype == half and tensor.requires_grad and tensor.is_leaf and not tensor._is_view()
    if not weight or not torch.is_autocast_cache_enabled() or torch.is_inference_mode_enabled():
        return tensor.to(dtype)
    if id(tensor) not in cast:
        cast[id(tensor)] = tensor, tensor.to(dtype)
    return cast[id(tensor)][1]
