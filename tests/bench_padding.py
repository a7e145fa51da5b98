"""The timed bars of the padding analysis, each against its peer in the same run: ``make bench``.

CPU time (``time.process_time``) of one million examples. Ours is the plan and its statistics, median of five. Theirs is
the sampler alone: cuts are made before the clock starts, padding is summed up after it stops.
"""

from __future__ import annotations

import gc
import statistics
import time

import bench_table
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import trl.data_utils
from datasets import Dataset, disable_progress_bars
from lhotse.dataset import DynamicBucketingSampler
from test_padding_peers import MAX_CELLS, bins, fixed_sizes, one_dimensional, quiet, spoken, to_cuts, two_dimensional

from effkit.padding import plan
from effkit.padding.planning import best_fit_decreasing

__all__ = ["quiet"]  # the fixture that silences Lhotse's warnings

NUM_EXAMPLES = 1_000_000
CAPACITY = 2048


def cpu_s(function):
    """CPU seconds of one call, and what it returned."""
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def median_cpu_s(function, repeats=5):
    times, results = zip(*(cpu_s(function) for _ in range(repeats)), strict=True)
    return statistics.median(times), results[-1]


def row(*cells):
    print("  {:<24}{:>14}{:>12}{:>9}{:>11}{:>11}{:>11}{:>11}".format(*cells))


@pytest.fixture(scope="module")
def examples():
    lengths = spoken(NUM_EXAMPLES)
    cuts = to_cuts(lengths)
    gc.collect()
    gc.freeze()  # a million cuts that the collector would otherwise walk through in Lhotse's time
    print(f"\n\n{NUM_EXAMPLES:,} examples, CPU time")
    row("", "lhotse s", "ours ms", "ratio", "steps", "ours", "padding", "ours")
    yield lengths, cuts
    gc.unfreeze()


def raced(name, examples, limits, ours, bar):
    lengths, cuts = examples

    def drain():
        sampler = DynamicBucketingSampler(
            cuts, shuffle=True, seed=1, world_size=1, rank=0, buffer_size=20_000, **limits
        )
        return list(sampler)

    def planned():
        made = plan(lengths, **ours)
        return made, made.account()

    our_s, (made, account) = median_cpu_s(planned)
    their_s, batches = cpu_s(drain)
    durations = [[cut.duration for cut in batch] for batch in batches]
    padding = 1 - sum(map(sum, durations)) / sum(max(batch) * len(batch) for batch in durations)
    share, steps = account.share["padding"], len(made.batches)
    bench_table.row(
        f"1M lengths, {name}: lhotse's sampler over plan and account", their_s / our_s, bar, "x", at_least=True
    )
    row(
        name, f"{their_s:.2f}", f"{our_s * 1e3:.1f}", f"{their_s / our_s:.0f}x",
        f"{len(batches):,}", f"{steps:,}", f"{padding:.3%}", f"{share:.3%}",
    )  # fmt: skip
    assert share == pytest.approx(padding, abs=0.001)
    assert steps == pytest.approx(len(batches), rel=0.002)
    assert their_s / our_s >= bar / 1.6  # what was held before, on a busier machine


def test_fixed_sizes(examples):
    edges, limits = one_dimensional(examples[0])
    raced("1D, fixed sizes", examples, limits, {"strategy": "bucket", "batch_size": fixed_sizes(edges)}, bar=300)


def test_two_dimensions(examples):
    _, _, sizes, limits = two_dimensional(examples[0])
    ours = {"strategy": "bucket2d", "num_buckets": 15, "num_output_buckets": 2, "batch_size": sizes}
    raced("2D, fixed sizes", examples, limits, ours, bar=250)


@pytest.mark.parametrize("quadratic", [None, 1500])
def test_dynamic(examples, quadratic):
    ours = {"strategy": "bucket", "max_input_cells": MAX_CELLS, "quadratic": quadratic, "put_back": False}
    edges, _ = one_dimensional(examples[0])
    limits = {"max_duration": float(MAX_CELLS), "quadratic_duration": quadratic, "duration_bins": bins(edges)}
    raced(f"dynamic, quadratic {quadratic}", examples, limits, ours, bar=200 if quadratic else 120)


def test_packing(monkeypatch):
    """trl's ``pack_dataset(strategy="bfd")`` on an Arrow dataset of one-byte tokens, in memory, all in one batch.

    Its time includes reading the dataset, the packing loop, gathering the tokens into packed rows and the new dataset.
    The loop alone runs from the making of its tree to the gathering of the tokens.
    """
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5, 1, NUM_EXAMPLES), 4, CAPACITY).astype("int64")
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype("int32"))
    tokens = pa.ListArray.from_arrays(offsets, pa.array(np.zeros(lengths.sum(), dtype="int8")))
    dataset = Dataset(pa.table({"input_ids": tokens}))
    disable_progress_bars()
    marks = {}

    class Tree(trl.data_utils._SegmentTree):
        def __init__(self, size):
            marks["start"] = time.process_time()
            super().__init__(size)

    take = trl.data_utils.pc.take

    def marked_take(*arguments):
        if "start" in marks:
            marks.setdefault("end", time.process_time())
        return take(*arguments)

    monkeypatch.setattr(trl.data_utils, "_SegmentTree", Tree)
    monkeypatch.setattr(trl.data_utils.pc, "take", marked_take)
    frame = pd.DataFrame({"input_length": lengths})

    def planned():
        made = plan(frame, "pack", max_input_cells=CAPACITY)
        made.account()
        return made

    options = {"batch_size": NUM_EXAMPLES, "keep_in_memory": True, "new_fingerprint": "packed"}
    our_s, rows = median_cpu_s(lambda: best_fit_decreasing(lengths, CAPACITY))
    whole_s, made = median_cpu_s(planned)
    their_s, packed = cpu_s(lambda: trl.pack_dataset(dataset, CAPACITY, strategy="bfd", map_kwargs=options))
    loop_s = marks["end"] - marks["start"]
    print(f"\n\nbest-fit decreasing, {NUM_EXAMPLES:,} items into rows of {CAPACITY:,}, CPU time")
    print(f"  trl pack_dataset {their_s:.2f} s, of which its loop {loop_s:.2f} s; {len(packed):,} rows")
    print(f"  ours, the row of every item {our_s * 1e3:.1f} ms; {rows.max() + 1:,} rows")
    print(f"  ours, plan() and its account {whole_s * 1e3:.1f} ms")
    print(
        f"  ratio {their_s / our_s:.0f}x; loop alone {loop_s / our_s:.0f}x; to our whole plan {their_s / whole_s:.0f}x"
    )
    assert rows.max() + 1 == len(packed) == made.num_rows
    assert np.bincount(rows, weights=lengths).max() <= CAPACITY
    assert their_s / our_s >= 50
