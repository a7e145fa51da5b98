"""Locality-sensitive hashing of tokens: one centroid travels for all that share a bucket (LSH-MoE, 2411.08446)."""

from __future__ import annotations

import functools

import torch

NUM_DIRECTIONS = 8  # of one hash: a token falls into one of 16 cells
MAX_HASHES = 12  # 16 ** 12 cells of each of 2 ** 15 experts fit into int64
_PER_UNIT, _MOST = 32, 255  # tokens are rounded to 1/32 and cut at 8: integers that even bfloat16 holds exactly


@functools.lru_cache(maxsize=8)
def directions(hidden: int, num_hashes: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Random signs, shape [hidden, num_hashes * NUM_DIRECTIONS], float32: every rank's hashes are the same."""
    draw = torch.Generator().manual_seed(hidden)
    return (torch.randint(2, (hidden, num_hashes * NUM_DIRECTIONS), generator=draw).float() * 2 - 1).to(device)


def num_cells(num_hashes: int) -> int:
    """Buckets there are; :func:`buckets` returns numbers below it."""
    return int((2 * NUM_DIRECTIONS) ** num_hashes)


@torch.no_grad()
def buckets(x: torch.Tensor, signs: torch.Tensor) -> torch.Tensor:
    """The bucket of each token: which direction of each hash it is closest to, and on which side.

    Cross-polytope hashing (Andoni et al., 1509.02897), with random signs for a random rotation. Rounded tokens make
    every sum an integer that float32 holds exactly, whatever the order and with TF32 too (for ``hidden`` up to 65,000),
    so that a token falls into the same bucket on every machine.

    ``x`` [num_tokens, hidden] is as after a layer norm (about unit variance), ``signs`` as of :func:`directions`; the
    buckets are int64 [num_tokens].
    """
    whole = (x.float() * _PER_UNIT).round().clamp(-_MOST, _MOST)
    with torch.autocast(x.device.type, enabled=False):  # it would round the sums
        along = (whole @ signs).long().view(len(x), signs.shape[1] // NUM_DIRECTIONS, NUM_DIRECTIONS)
    # equal sums: the first direction, wherever this runs
    first = torch.arange(NUM_DIRECTIONS, device=x.device)
    nearest = (along.abs() * NUM_DIRECTIONS - first).argmax(-1, keepdim=True)
    cell = 2 * nearest + (along.gather(-1, nearest) < 0)
    radix = (2 * NUM_DIRECTIONS) ** torch.arange(cell.shape[1], device=x.device)
    return (cell.squeeze(-1) * radix).sum(-1)


def centroids(rows: torch.Tensor, bucket: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean row of each bucket, and each row's place among them; buckets in ascending order.

    Shapes [num_buckets, hidden] and [num_rows]. Gradients flow through the means.
    """
    _, place, size = torch.unique(bucket, return_inverse=True, return_counts=True)
    wide = torch.promote_types(rows.dtype, torch.float32)  # many rows add up to more than bfloat16 resolves
    sums = rows.new_zeros(len(size), rows.shape[1], dtype=wide).index_add(0, place, rows.to(wide))
    return (sums / size[:, None]).to(rows.dtype), place
