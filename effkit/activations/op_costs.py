"""The work of one operator: FLOPs by precision, and bytes read and written."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from effkit.training import size_bytes

HALF = (torch.bfloat16, torch.float16)
# what a step's time is made of; all of them add up over operators
FEATURES = ("num_operators", "flops", "half_flops", "moved_bytes")
FLOPS, HALF_FLOPS, MOVED = map(FEATURES.index, FEATURES[1:])


def work(
    func: Any, args: Any, kwargs: Any, out: Any, given: list[torch.Tensor], made: list[torch.Tensor]
) -> tuple[int, int, int, int]:
    """One operator, its FLOPs in single and in half precision, and the bytes of what it reads and writes.

    FLOPs are torch's own count of matrix products, convolutions and attention; a view moves nothing.
    """
    sizes = (one.nbytes if one.layout == torch.strided else size_bytes([one]) for one in (*given, *made))
    moved = 0 if func.is_view else sum(sizes)
    count = _COUNTS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket)
    flops = int(count(*args, **(kwargs or {}), out_val=out)) if count else 0
    half = bool(flops) and given[0].dtype in HALF
    return 1, 0 if half else flops, flops if half else 0, moved


# torch counts attention on GPUs only
_COUNTS: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
        lambda query, key, value, *_, **more: sdpa_flop_count(query.shape, key.shape, value.shape),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward:
        lambda grad, q, k, v, *_, **more: sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape),
}  # fmt: skip
