"""What one weight costs in a matrix product on this device: by data type and number of rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from effkit.timing import elapsed_ns

_NUM_REPEATS = 5
_LEAST_PRODUCTS, _ON_ACCELERATOR = 32, 512  # in a timed turn, of which waiting for an accelerator is a part
_MOST_SECONDS = 1.0  # of turns, where threads that others keep busy wait for each other


@dataclass(frozen=True)
class ProductCost:
    """Time per weight [ns] of a product with so many rows, at the numbers that were run."""

    rows: tuple[int, ...]
    times_ns: tuple[float, ...]


def product_cost(
    width: int, ffn: int, size_bytes: int, rows: Sequence[int], dtype: torch.dtype, device: torch.device
) -> ProductCost:
    """From products of so many rows with matrices [ffn, width], as many as have ``size_bytes`` together."""
    times = _times(_matrices(width, ffn, size_bytes, dtype, device), rows)
    return ProductCost(tuple(rows), tuple(times[number] for number in rows))


def _matrices(width: int, ffn: int, size_bytes: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    number = max(1, size_bytes // (ffn * width * torch.empty(0, dtype=dtype).element_size()))
    return [torch.full((ffn, width), 0.01, dtype=dtype, device=device) for _ in range(number)]


def _multiply(x: torch.Tensor, matrices: Sequence[torch.Tensor], again: int) -> None:
    for _ in range(again):
        for matrix in matrices:
            torch.nn.functional.linear(x, matrix)


def _times(matrices: Sequence[torch.Tensor], of_rows: Sequence[int]) -> dict[int, float]:
    """Rows -> time per weight [ns], the fastest of some turns through all matrices."""
    like = matrices[0]
    inputs = {
        rows: torch.full((rows, 1, like.shape[1]), 0.01, dtype=like.dtype, device=like.device) for rows in of_rows
    }
    times: dict[int, list[float]] = {rows: [] for rows in inputs}
    again = -(-(_LEAST_PRODUCTS if like.device.type == "cpu" else _ON_ACCELERATOR) // len(matrices))
    begin = time.perf_counter()
    with torch.no_grad():
        for turn in range(_NUM_REPEATS + 1):
            if turn > 1 and time.perf_counter() - begin > _MOST_SECONDS:
                break
            for rows, x in inputs.items():
                taken = elapsed_ns(partial(_multiply, x, matrices, again))
                if turn:  # the first brings them into the caches, as far as they fit
                    times[rows].append(taken / (again * len(matrices) * like.numel()))
    return {rows: min(taken) for rows, taken in times.items()}
