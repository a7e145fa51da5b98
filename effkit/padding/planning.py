"""plan(): a strategy and its limits become a Plan, which assigns every example to a batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd

from effkit.arguments import checked_amount, checked_whole
from effkit.padding import buckets
from effkit.padding.buckets import Ints
from effkit.padding.calibration import MemoryModel
from effkit.padding.plans import Plan, padded, taken

BUCKETED = ("bucket", "bucket2d", "optimal")
STRATEGIES = ("random", "sorted", "bucket", "bucket2d", "optimal", "token_budget", "pack")


def plan(
    lengths: pd.DataFrame, strategy: str = "random", *, batch_size: int | Sequence[int] | None = None,
    max_input_cells: int | None = None, num_buckets: int = 30, num_output_buckets: int = 2,
    quadratic: float | None = None, memory: MemoryModel | None = None, edges: Ints | Sequence[int] | None = None,
    output_edges: Ints | None = None, put_back: bool = True, pad_to_multiple_of: int | None = None, seed: int = 0,
) -> Plan:  # fmt: skip
    """Assign every example to a batch.

    ValueError when a limit is missing, out of range, or an example alone exceeds ``max_input_cells``.

    Parameters
    ----------
    lengths
        What :func:`effkit.padding.lengths` returns: ``input_length`` and, for ``bucket2d``, ``output_length`` [cells].
    strategy
        ``random`` (shuffled), ``sorted`` (by length), ``bucket`` (edges at equal summed length, shuffled inside),
        ``bucket2d`` (input and output length), ``optimal`` (edges with the fewest padded cells), ``token_budget``
        (sorted, filled up to ``max_input_cells``), ``pack`` (best-fit decreasing into rows of ``max_input_cells``).
    batch_size
        Rows per batch; for the bucket strategies also one size per bucket. With ``max_input_cells``: a cap.
    max_input_cells
        Padded input cells per batch, at most: ``rows · longest``. For ``pack``: the cells of one row.
    num_buckets, num_output_buckets
        Input buckets, and output buckets inside each of them.
    quadratic
        Length at which attention doubles the cost of an example: its effective length is ``T + T²/quadratic``
        (Lhotse's ``quadratic_duration``).
    memory
        A fitted :class:`~effkit.padding.MemoryModel`: gives each bucket the largest batch that fits; with
        ``batch_size``, at most that.
    edges, output_edges
        Bucket edges of your own, inclusive upper bounds [cells]; output edges have shape [buckets, output buckets].
    put_back
        ``False`` keeps the example that overshoots ``max_input_cells``, as Lhotse's samplers do.
    pad_to_multiple_of
        Inputs are padded to the next multiple of it [cells], as the collate function does; to the longest unless given.
    seed
        Of the shuffle.

    Examples
    --------
    >>> lengths = pd.DataFrame({"input_length": [9, 1, 8, 2]})
    >>> [batch.tolist() for batch in plan(lengths, "sorted", batch_size=2).batches]
    [[1, 3], [2, 0]]
    """
    limits = {name: limit for name, limit in locals().items() if name not in ("lengths", "strategy")}
    _check(lengths, strategy, limits)
    inputs = lengths["input_length"].to_numpy()
    sizes: Any = batch_size
    used = LIMITS[strategy]
    kept = {name: limit for name, limit in limits.items() if name in used and limit is not None}
    if strategy == "pack":
        assert max_input_cells is not None
        row = best_fit_decreasing(inputs, int(max_input_cells))
        order, row_starts = np.argsort(row, kind="stable"), np.concatenate([[0], np.cumsum(np.bincount(row))[:-1]])
        starts: Ints = np.arange(0, len(row_starts), sizes or 1)
        table = pd.DataFrame({"input_length": [int(max_input_cells)]})
        return Plan(lengths, strategy, kept, order, row_starts, starts, np.zeros_like(starts), table, plan)
    group, table = np.zeros(1, dtype="int64"), pd.DataFrame({"input_length": [int(inputs.max())]})
    if strategy in ("sorted", "token_budget"):
        columns = [lengths[name].to_numpy() for name in ("output_length", "input_length") if name in lengths]
        order = np.lexsort(columns)
    else:
        order = np.random.default_rng(seed).permutation(len(lengths))
    if strategy in BUCKETED:
        bucket, table = _bucketed(lengths, strategy, limits)
        order = order[np.argsort(bucket[order], kind="stable")]
        group = np.concatenate([[0], np.cumsum(np.bincount(bucket, minlength=len(table)))[:-1]])
    if memory is not None and "memory" in used:
        fitting = memory.largest_batches(table.assign(input_length=padded(table["input_length"], kept)))
        sizes = fitting if batch_size is None else np.minimum(fitting, batch_size)
    starts, of_bucket = _cut(inputs, order, group, sizes, max_input_cells, kept)
    return Plan(lengths, strategy, kept, order, None, starts, of_bucket, table, planner=plan)


_COMMON = {"batch_size", "max_input_cells", "quadratic", "put_back", "pad_to_multiple_of"}
_BUCKET = _COMMON | {"num_buckets", "memory", "edges", "seed"}
# which limits each strategy heeds; the others are dropped
LIMITS: Mapping[str, set[str]] = {
    "random": _COMMON | {"seed"},
    "sorted": _COMMON,
    "bucket": _BUCKET,
    "optimal": _BUCKET,
    "bucket2d": _BUCKET | {"num_output_buckets", "output_edges"},
    "token_budget": _COMMON,
    "pack": {"batch_size", "max_input_cells"},
}


_WHOLE = {"batch_size": 1, "num_buckets": 1, "num_output_buckets": 1, "pad_to_multiple_of": 1, "seed": 0,
          "memory_bytes": 0, "max_length": 1, "world_size": 1}  # fmt: skip


def _check(lengths: pd.DataFrame, strategy: str, limits: Mapping[str, Any]) -> None:
    if strategy not in STRATEGIES:
        raise ValueError(f"unknown strategy {strategy!r}; choose one of {', '.join(STRATEGIES)}")
    if not isinstance(lengths, pd.DataFrame) or "input_length" not in lengths or not len(lengths):
        raise ValueError("plan() takes a non-empty frame with the column input_length; padding.lengths() makes one")
    if strategy == "bucket2d" and "output_length" not in lengths:
        raise ValueError("bucket2d needs output lengths, and these lengths have none; use strategy='bucket'")
    if (shortest := lengths["input_length"].min()) < 1:
        raise ValueError(f"the shortest length is {shortest}; a length is at least 1: mend or drop what is shorter")
    cells, size = limits["max_input_cells"], limits["batch_size"]
    if strategy in ("pack", "token_budget") and cells is None:
        raise ValueError(
            f"{strategy} needs max_input_cells, the cells that one {'row' if strategy == 'pack' else 'batch'} holds"
        )
    if size is None and cells is None and (limits["memory"] is None or strategy not in BUCKETED):
        raise ValueError(
            f"{strategy} needs a limit: batch_size or max_input_cells (bucket strategies also take memory)"
        )
    check_whole(limits)
    for name in ("max_input_cells", "quadratic"):
        if limits[name] is not None:
            checked_amount(name, limits[name])
    if not isinstance(size, (int, np.integer, type(None))) and strategy not in BUCKETED:
        raise ValueError(f"one batch_size per bucket goes with a bucket strategy; {strategy} takes a single number")
    if cells is None or not (limits["put_back"] or strategy == "pack"):
        return
    longest = lengths["input_length"].max()
    longest = float(longest if strategy == "pack" else padded(longest, limits))
    penalty = limits["quadratic"] if "quadratic" in LIMITS[strategy] else None
    effective = longest + (longest**2 / penalty if penalty else 0)
    if effective > cells:
        raise ValueError(
            f"the longest example counts {effective:,.0f} cells and max_input_cells is {cells:,}: raise the limit "
            "or filter the list"
        )


def check_whole(limits: Mapping[str, Any]) -> None:
    """Refuse a limit that has to be a whole number and is none; ``batch_size`` may be several."""
    for name, least in _WHOLE.items():
        for value in () if limits.get(name) is None else np.ravel(limits[name]).tolist():
            checked_whole(name, value, least)


def _bucketed(lengths: pd.DataFrame, strategy: str, limits: Mapping[str, Any]) -> tuple[Ints, pd.DataFrame]:
    """The bucket of each example, and the table of upper edges."""
    inputs = lengths["input_length"].to_numpy()
    rule = buckets.optimal_edges if strategy == "optimal" else buckets.equal_duration_edges
    edges = np.asarray(rule(inputs, limits["num_buckets"]) if limits["edges"] is None else limits["edges"])
    if strategy != "bucket2d":
        bucket = buckets.assign(inputs, edges)
        if int(bucket.max()) >= len(edges):
            raise ValueError(f"an input of {int(inputs.max())} cells is longer than the last edge {int(edges[-1])}")
        return bucket, pd.DataFrame({"input_length": edges})
    outputs = lengths["output_length"].to_numpy()
    second = limits["output_edges"]
    if second is None:
        second = buckets.output_edges(inputs, outputs, edges, limits["num_output_buckets"])
    second = np.asarray(second)
    table = pd.DataFrame({"input_length": np.repeat(edges, second.shape[1]), "output_length": second.ravel()})
    return buckets.assign2d(inputs, outputs, edges, second), table


def _cut(
    inputs: Ints, order: Ints, group: Ints, batch_size: Any, max_input_cells: int | None, limits: Mapping[str, Any]
) -> tuple[Ints, Ints]:
    """Cut each group of consecutive examples into batches; returns batch starts and the group of each batch."""
    ends = np.append(group[1:], len(order))
    if batch_size is not None and not np.isscalar(batch_size) and len(batch_size) != len(group):
        raise ValueError(f"{len(group)} buckets and {len(batch_size)} batch sizes: give one size per bucket")
    caps = np.broadcast_to(np.asarray(len(order) if batch_size is None else batch_size, dtype="int64"), len(group))
    if max_input_cells is None:
        counts = -(-(ends - group) // caps)
        of_group = np.repeat(np.arange(len(group)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        return group[of_group] + within * caps[of_group], of_group
    most, put_back, quadratic = max_input_cells, limits["put_back"], limits.get("quadratic")

    @cache
    def fitting(size: int) -> int:
        """How many rows so long make a full batch: as many as fit; as Lhotse has it, at least that many."""
        effective = size + float(size) * size / quadratic if quadratic else size
        if put_back:
            return int(most / effective)
        rows = max(1, int(most // effective))
        return rows + ((rows + 1) * effective <= most)  # as doubles have it

    sizes = padded(taken(inputs, order), limits)
    starts = [
        first + np.array(_starts(sizes[first:last].tolist(), fitting, cap, put_back), dtype="int64")
        for first, last, cap in zip(group.tolist(), ends.tolist(), caps.tolist(), strict=True)
    ]
    return np.concatenate(starts), np.repeat(np.arange(len(group)), [len(part) for part in starts])


def _starts(sizes: list[int], fitting: Callable[[int], int], cap: int, put_back: bool) -> list[int]:
    """Starts of batches of at most ``cap`` rows, and no more than are ``fitting`` where the longest is so long.

    The row that would overshoot opens the next batch where it is ``put_back``; else it is the last of its own, as with
    Lhotse's ``close_to_exceeding``.
    """
    starts: list[int] = []
    begin = end = longest = 0
    for i, size in enumerate(sizes):
        if i < end and size <= longest:
            continue
        rows = fitting(size)
        rows = cap if rows > cap else rows  # min() takes three times as long
        if i >= end or (put_back and i >= begin + rows):
            starts.append(i)
            begin = i
        longest, end = size, begin + rows
    return starts


def best_fit_decreasing(lengths: Ints, capacity: int) -> Ints:
    """The row of each item, numbered from 0 without gaps, in the best-fit-decreasing order (Johnson 1974).

    ``lengths`` [num_items] are each in ``1..capacity``, the cells per row.

    Items are taken from long to short; each goes to the row with the least room that still holds it. All items of
    one length, and all rows with one amount of room, are alike: so they move together, thousands in one step. A row
    with room ``r`` takes ``r // length`` items in succession: after each item it is again the fullest row that fits.

    >>> best_fit_decreasing(np.array([3, 5, 2, 4]), capacity=7).tolist()
    [1, 0, 0, 1]
    """
    # counting sort by key: stable, so that equal inputs give equal rows
    order = np.argsort((capacity - lengths).astype(np.min_scalar_type(capacity)), kind="stable")
    counts = np.bincount(lengths, minlength=capacity + 1)
    open_rows: list[deque[np.ndarray] | None] = [None] * (capacity + 1)  # room -> chunks of rows with that room
    rooms = 0  # bit r is set when some row has room r: the best fit is then one shift and one lowest bit
    rows = np.empty(len(lengths), dtype="int64")
    num_rows, done = 0, 0
    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        while left:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                waiting = open_rows[room]
                assert waiting is not None
                chunk = waiting.popleft()
                if not waiting:
                    rooms &= ~(1 << room)
            else:
                room = capacity
                chunk = np.arange(num_rows, num_rows + -(-left // (capacity // length)))
                num_rows += len(chunk)
            each = room // length
            whole = min(len(chunk), left // each)  # rows that take their fill
            changed = [(chunk[:whole], room - each * length), (chunk[whole:], room)]
            rows[order[done : done + whole * each]] = np.repeat(chunk[:whole], each)
            done, left = done + whole * each, left - whole * each
            if left and whole < len(chunk):  # the last few items only part-fill one row
                rows[order[done : done + left]] = chunk[whole]
                changed[1:] = [(chunk[whole : whole + 1], room - left * length), (chunk[whole + 1 :], room)]
                done, left = done + left, 0
            for part, room_left in changed:
                if len(part) and room_left:
                    if (queue := open_rows[room_left]) is None:
                        queue = open_rows[room_left] = deque()
                    queue.append(part) if room_left != room else queue.appendleft(part)
                    rooms |= 1 << room_left
    return rows
