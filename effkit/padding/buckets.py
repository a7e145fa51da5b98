"""Where bucket edges go, and which bucket an example falls into.

Edges are inclusive upper bounds: bucket ``i`` holds lengths in ``(edges[i-1], edges[i]]``.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

Ints = np.ndarray[Any, np.dtype[np.integer[Any]]]

_LARGEST_TABLE = 1 << 24  # longest length for which a lookup table beats a search
_DP_POINTS = 512  # exact up to so many distinct lengths; beyond, edges fall on this many quantiles


def equal_duration_edges(lengths: Ints, num_buckets: int) -> Ints:
    """Edges between which the *summed* length is equal: the rule of Lhotse's ``estimate_duration_buckets``.

    A bucket closes with the example that takes its sum past ``total / num_buckets``; so there may be fewer buckets
    than asked for when single lengths are very frequent.
    """
    return _equal_sums(*_counted(lengths), num_buckets)


def _equal_sums(values: Ints, counts: Ints, num_buckets: int) -> Ints:
    """These edges, of distinct lengths in order and how many examples there are of each."""
    sums = np.cumsum(values * counts)
    share = sums[-1] / num_buckets
    edges, done = [int(values[-1])], 0
    while (place := int(np.searchsorted(sums, done + share, side="right"))) < len(values):
        value, count = int(values[place]), int(counts[place])
        before = int(sums[place]) - value * count
        taken = int((done + share - before) // value) + 1  # of these examples, with the one that passes the share
        done = before + taken * value
        place += taken == count
        if place < len(values) and (edge := int(values[place]) - 1) >= values[0]:  # that example opens the next bucket
            edges.append(edge)
    return np.unique(edges)


def optimal_edges(lengths: Ints, num_buckets: int) -> Ints:
    """Edges with the fewest padded cells when every example is padded to its bucket's edge.

    Dynamic programming over the distinct lengths: ``cost(i, j) = count(i..j)·length_j - sum(i..j)``,
    ``best_k(j) = min_i best_{k-1}(i) + cost(i+1, j)``. Exact up to 512 distinct lengths; beyond that the edges are
    chosen among 512 quantiles of the summed length.
    """
    values, counts = _counted(lengths)
    if len(values) > _DP_POINTS:
        mass = np.cumsum(values * counts)
        kept = np.unique(np.searchsorted(mass, np.linspace(0, mass[-1], _DP_POINTS + 1)[1:]))
        kept = np.union1d(np.minimum(kept, len(values) - 1), [len(values) - 1])
    else:
        kept = np.arange(len(values))
    ends = values[kept].astype("float64")
    count = np.concatenate([[0], np.cumsum(counts)[kept]]).astype("float64")
    total = np.concatenate([[0], np.cumsum(values * counts)[kept]]).astype("float64")
    size = len(ends)
    # cost[i, j]: examples after point i and up to point j, all padded to ends[j]
    cost = (count[None, 1:] - count[:-1, None]) * ends[None, :] - (total[None, 1:] - total[:-1, None])
    cost[np.tril_indices(size, -1)] = np.inf
    best, choices = cost[0], []
    for _ in range(min(num_buckets, size) - 1):
        through = best[:-1, None] + cost[1:]  # the last bucket starts after point i
        choice = through.argmin(axis=0)
        improved = through[choice, np.arange(size)]
        choices.append(np.where(improved < best, choice, -1))
        best = np.minimum(best, improved)
    edges, at = [int(ends[-1])], size - 1
    for choice in reversed(choices):
        if choice[at] >= 0:
            at = int(choice[at])
            edges.append(int(ends[at]))
    return np.array(sorted(edges))


def output_edges(inputs: Ints, outputs: Ints, edges: Ints, num_output_buckets: int) -> Ints:
    """Second-level edges: within each input bucket, output lengths split by equal summed length.

    Returns shape ``[len(edges), num_output_buckets]``; a row that needs fewer repeats its last edge. Each row ends
    at the longest output of the whole bucket.
    """
    width = int(outputs.max()) + 1
    keys, counts = _counted(assign(inputs, edges) * np.int64(width) + outputs)
    starts = np.searchsorted(keys, np.arange(len(edges) + 1) * width)
    rows = np.empty((len(edges), num_output_buckets), dtype="int64")
    for i, (first, end) in enumerate(pairwise(starts)):
        members = keys[first:end] - i * width, counts[first:end]
        row = _equal_sums(*members, num_output_buckets) if first < end else np.array([0])
        row = np.append(row[: num_output_buckets - 1], row[-1])
        rows[i] = np.pad(row, (0, num_output_buckets - len(row)), mode="edge")
    return rows


def assign(lengths: Ints, edges: Ints) -> Ints:
    """The bucket of each example, ``len(edges)`` for one longer than the last edge. Shape of ``lengths``."""
    kind = np.min_scalar_type(len(edges))  # one or two bytes: the sort by bucket is then a radix sort
    longest = int(lengths.max())
    if longest >= _LARGEST_TABLE:
        return np.searchsorted(edges, lengths).astype(kind)
    return np.searchsorted(edges, np.arange(longest + 1)).astype(kind)[lengths]


def assign2d(inputs: Ints, outputs: Ints, edges: Ints, second: Ints) -> Ints:
    """The flat bucket ``input_bucket · second.shape[1] + output_bucket`` of each example.

    ValueError when an example fits no bucket (longer input or output than its edges).
    """
    first = assign(inputs, edges)
    if len(first) and int(first.max()) >= len(edges):
        raise ValueError(f"an input of {int(inputs.max())} cells is longer than the last bucket edge {int(edges[-1])}")
    width = second.shape[1]
    longest = int(outputs.max())
    kind = np.min_scalar_type(len(edges) * width)
    table = (second[:, :, None] < np.arange(longest + 1)[None, None, :]).sum(axis=1)  # [input bucket, output length]
    if (misfits := table >= width).any():
        bad = np.flatnonzero(misfits[first, outputs])
        if len(bad):
            raise ValueError(f"an output of {int(outputs[bad[0]])} cells is longer than the last edge of its bucket")
    flat = (np.arange(len(edges))[:, None] * width + table).astype(kind).ravel()
    return flat[first * np.int64(longest + 1) + outputs]


def _counted(numbers: Ints) -> tuple[Ints, Ints]:
    """The distinct numbers in order, and how often each is there: by a table where they are small, 1M in 2 ms."""
    if int(numbers.max()) >= _LARGEST_TABLE:
        return np.unique(numbers, return_counts=True)
    counts = np.bincount(numbers)
    values = np.flatnonzero(counts)
    return values, counts[values]
