"""What one weight costs in a matrix product on this device: by data type, and by how many weights take turns."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from effkit.decoder.module_roles import CROSS, FFN, OUTPUT, SELF
from effkit.timing import elapsed_ns

_WITH_WEIGHTS = (SELF, CROSS, FFN, OUTPUT)
_ROWS = (1, 2, 16)
_NUM_REPEATS = 5
_SIZES_BYTES = tuple(2**power for power in range(20, 28))  # from a core's own cache to beyond all of them
_LEAST_PRODUCTS = 32  # in a timed turn
_MOST_SECONDS = 1.0  # of turns, where threads that others keep busy wait for each other
_HOST_BYTES = 2**25  # of weights, at which half of what the host needs is no longer in its caches


@dataclass(frozen=True)
class ProductCost:
    """Time per weight [ns] of a product with one row, and with several: ``several + per_row·rows``."""

    alone: float
    several: float
    per_row: float


@dataclass(frozen=True)
class Caches:
    """How much of the cost of cold memory a step pays, from 0 to 1, when it reads so many bytes.

    Smooth, for a cache is shared with all else that a step touches: ``s² / (s² + half²)`` for products with
    weights. The host's own work between them, whose data the weights push out, goes more slowly:
    ``s / (s + 32 MiB)``. Both forms were found on one processor, at 1 to 24 layers of two widths.
    """

    half_bytes: float

    def cold_frac(self, part: str, size_bytes: float) -> float:
        """For a part of a step that reads so many bytes of weights, keys and values."""
        if part in _WITH_WEIGHTS:
            return size_bytes**2 / (size_bytes**2 + self.half_bytes**2)
        return size_bytes / (size_bytes + _HOST_BYTES)


def product_cost(width: int, ffn: int, size_bytes: int, dtype: torch.dtype, device: torch.device) -> ProductCost:
    """From products of 1, 2 and 16 rows with matrices [ffn, width], as many as have ``size_bytes`` together."""
    times = _times(_matrices(width, ffn, size_bytes, dtype, device), _ROWS)
    one, two, many = (times[rows] for rows in _ROWS)
    per_row = max(0.0, (many - two) / (_ROWS[2] - _ROWS[1]))
    return ProductCost(one, max(0.0, two - _ROWS[1] * per_row), per_row)


def caches(width: int, ffn: int, dtype: torch.dtype, device: torch.device) -> Caches:
    """From products of one row with matrices [ffn, width], of 1 to 128 MiB together.

    Where they alone take turns, half of the cost of cold memory is reached at some size; within a model, half of the
    caches is left to the weights.
    """
    matrices = _matrices(width, ffn, _SIZES_BYTES[-1], dtype, device)
    costs = []
    for size in _SIZES_BYTES:
        number = max(1, size // matrices[0].nbytes)
        costs.append(_times(matrices[:number], (1,))[1])
    rising = np.maximum.accumulate(costs)
    middle = (rising[0] + rising[-1]) / 2
    above = int(np.argmax(rising >= middle))
    lower, upper = _SIZES_BYTES[max(0, above - 1)], _SIZES_BYTES[above]
    return Caches(float(np.sqrt(lower * upper)) / 2)


def _matrices(width: int, ffn: int, size_bytes: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    number = max(1, size_bytes // (ffn * width * torch.empty(0, dtype=dtype).element_size()))
    return [torch.full((ffn, width), 0.01, dtype=dtype, device=device) for _ in range(number)]


def _multiply(x: torch.Tensor, matrices: Sequence[torch.Tensor], again: int) -> None:
    for _ in range(again):
        for matrix in matrices:
            torch.nn.functional.linear(x, matrix)


def _times(matrices: Sequence[torch.Tensor], of_rows: Iterable[int]) -> dict[int, float]:
    """Rows -> time per weight [ns], the fastest of some turns through all matrices."""
    like = matrices[0]
    inputs: dict[int, Any] = {
        rows: torch.full((rows, 1, like.shape[1]), 0.01, dtype=like.dtype, device=like.device) for rows in of_rows
    }
    times: dict[int, list[float]] = {rows: [] for rows in inputs}
    again = -(-_LEAST_PRODUCTS // len(matrices))
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
