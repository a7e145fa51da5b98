"""What a weight costs on this device: to read, and in a matrix product, by data type and number of rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from effkit.device import fastest_ns
from effkit.timing import elapsed_ns

_COLUMNS, _SECONDS = 1024, 0.05  # of the matrices that are read, and for how long
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
    """From products of so many rows with matrices [ffn, width], as many as have ``size_bytes`` together: the fastest of
    some turns through all of them."""
    like: dict[str, Any] = {"dtype": dtype, "device": device}
    size = ffn * width
    matrices = [torch.full((ffn, width), 0.01, **like) for _ in range(max(1, size_bytes // (size * dtype.itemsize)))]
    again = -(-(_LEAST_PRODUCTS if device.type == "cpu" else _ON_ACCELERATOR) // len(matrices))

    def multiply(x: torch.Tensor) -> None:
        for _ in range(again):
            for matrix in matrices:
                torch.nn.functional.linear(x, matrix)

    times: dict[int, list[float]] = {number: [] for number in rows}
    inputs = {number: torch.full((number, 1, width), 0.01, **like) for number in rows}
    begin = time.perf_counter()
    with torch.no_grad():
        for turn in range(_NUM_REPEATS + 1):
            if turn > 1 and time.perf_counter() - begin > _MOST_SECONDS:
                break
            for number, x in inputs.items():
                taken = elapsed_ns(partial(multiply, x))
                if turn:  # the first brings them into the caches, as far as they fit
                    times[number].append(taken / (again * len(matrices) * size))
    return ProductCost(tuple(rows), tuple(min(times[number]) for number in rows))


def reading_rate(size_bytes: int, dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second at which a matrix of this size is multiplied with a vector, again and again: the fastest of
    many. One that the caches hold is read far more quickly than memory is. ``size_bytes`` is all that a step reads:
    weights, keys and values.
    """
    # several matrices, as a model has: one large product could be split among threads otherwise than they are
    matrix = torch.ones(max(1, size_bytes // (_COLUMNS * dtype.itemsize)), _COLUMNS, dtype=dtype, device=device)
    pieces, vector = matrix.split(max(1, -(-len(matrix) // 64))), torch.ones(_COLUMNS, dtype=dtype, device=device)

    def read(parts: Sequence[torch.Tensor]) -> None:
        for part in parts:
            torch.mv(part, vector)

    with torch.no_grad():
        fastest = min(fastest_ns(partial(read, parts), seconds=_SECONDS) for parts in (pieces, (matrix,)))
    return matrix.nbytes / fastest * 1e9
