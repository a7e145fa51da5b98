"""What a step does otherwise on a GPU, for forecasts on machines without one: assumed, never measured here.

- Optimizers take all parameters at once (``foreach``), and need temporaries of the size of all.
- Dropout keeps its mask in one byte per value; on a CPU it keeps a factor of the value's own size.
- Attention with dropout stays in one kernel and saves no scores.
- The allocator rounds every request up to 512 bytes.
- cuBLAS holds a workspace of 8 MiB and a little (torch's default before Hopper).
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from effkit.training import MakeOptimizer

ROUNDING_BYTES = 512
CUBLAS_BYTES = 4096 * 1024 * 2 + 16 * 1024 * 8  # CUBLAS_WORKSPACE_CONFIG=:4096:2:16:8
ASSUMED = "; assumed of a GPU: foreach optimizer, 1-byte dropout masks, fused attention, 512-byte blocks, cuBLAS"


class AsOnGpu(TorchFunctionMode):
    """Dropout and attention as a GPU does them."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.nn.functional.dropout:
            return _dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            kwargs.pop("dropout_p", None)
            args = args[:4]
        return func(*args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    return torch.native_dropout(input, p, True)[0] if training and p > 0 else input


def at_once(make: MakeOptimizer | None) -> MakeOptimizer:
    """The optimizer as it is made for parameters on a GPU."""

    def made(parameters: Any) -> torch.optim.Optimizer:
        update = (make or torch.optim.AdamW)(parameters)
        for group in update.param_groups:
            if group.get("foreach", True) is None and not group.get("fused"):
                group["foreach"] = True
        return update

    return made
