"""Our plans against the real Lhotse samplers, with the same data and limits.

``put_back=False`` keeps the example that overshoots, as Lhotse does. Lengths stand for durations: an edge of ours is a
``duration_bins`` entry of Lhotse's, whose samplers put a cut as long as a bin into the bucket below it.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import pytest
from lhotse import MonoCut
from lhotse.dataset import DynamicBucketingSampler, DynamicCutSampler
from lhotse.dataset.sampling.dynamic_bucketing import FixedBucketBatchSizeConstraint

from effkit.padding import plan
from effkit.padding.buckets import equal_duration_edges, output_edges

MAX_CELLS = 36_000
PADDING_BAR = 0.001  # 0.1 percentage points
STEPS_BAR = 0.002


def spoken(num_examples):
    rng = np.random.default_rng(0)
    inputs = np.clip(rng.lognormal(6.8, 0.55, num_examples), 50, 4000).astype("int64")
    outputs = np.maximum(1, (inputs * 0.03 * rng.lognormal(0, 0.3, num_examples)).astype("int64"))
    return pd.DataFrame({"input_length": inputs, "output_length": outputs})


def to_cuts(lengths):
    pairs = zip(lengths["input_length"].tolist(), lengths["output_length"].tolist(), strict=True)
    return [
        MonoCut(id=str(i), start=0, duration=float(t), channel=0, custom={"tokens": u})
        for i, (t, u) in enumerate(pairs)
    ]


@pytest.fixture(scope="module", autouse=True)
def quiet():
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def few():
    lengths = spoken(20_000)
    return lengths, to_cuts(lengths)


@pytest.fixture(scope="module")
def many():
    lengths = spoken(100_000)
    return lengths, to_cuts(lengths)


@dataclass
class InTwoDimensions(FixedBucketBatchSizeConstraint):
    """Lhotse's constraint of fixed sizes, with our 2D rule: first the input bucket, then the output bucket in it."""

    input_edges: list = field(default_factory=list)
    output_edges: list = field(default_factory=list)

    def measure_length(self, cut):
        return cut.duration, cut.custom["tokens"]

    def select_bucket(self, buckets, example=None, example_len=None):
        length, tokens = self.measure_length(example) if example_len is None else example_len
        row = bisect_left(self.input_edges, length)
        return row * len(self.output_edges[row]) + bisect_left(self.output_edges[row], tokens)


def fixed_sizes(edges):
    return [max(1, MAX_CELLS // edge) for edge in edges]


def bins(edges):
    return [float(edge) for edge in edges[:-1]]


def bucketing(cuts, seed=1, shuffle=True, **limits):
    return DynamicBucketingSampler(
        cuts, shuffle=shuffle, seed=seed, world_size=1, rank=0, buffer_size=20_000 if shuffle else len(cuts), **limits
    )


def two_dimensional(lengths):
    """Our edges, and the constraint that says the same to Lhotse."""
    inputs, outputs = (lengths[name].to_numpy() for name in ("input_length", "output_length"))
    edges = equal_duration_edges(inputs, 15)
    second = output_edges(inputs, outputs, edges, 2)
    pairs = [(float(edge), int(output)) for edge, row in zip(edges, second, strict=True) for output in row]
    sizes = fixed_sizes(np.repeat(edges, 2).tolist())
    constraint = InTwoDimensions(pairs, sizes, input_edges=edges.tolist(), output_edges=second.tolist())
    return edges, second, sizes, {"constraint": constraint, "duration_bins": pairs[:-1]}


def one_dimensional(lengths):
    edges = equal_duration_edges(lengths["input_length"].to_numpy(), 30).tolist()
    constraint = FixedBucketBatchSizeConstraint(
        max_seq_len_buckets=[*map(float, edges)], batch_sizes=fixed_sizes(edges)
    )
    return edges, {"constraint": constraint, "duration_bins": bins(edges)}


def drained(sampler):
    """Steps of Lhotse's epoch, and the fraction of its cells that is padding."""
    steps, cells, real = 0, 0.0, 0.0
    for batch in sampler:
        durations = [cut.duration for cut in batch]
        steps, cells, real = steps + 1, cells + max(durations) * len(durations), real + sum(durations)
    return steps, 1 - real / cells


def within_the_bars(ours, theirs):
    """Means over the seeds: padding within 0.1 percentage points and steps within 0.2%."""
    steps = np.mean([len(planned.batches) for planned in ours]), np.mean([count for count, _ in theirs])
    padding = np.mean([p.account().share["padding"] for p in ours]), np.mean([frac for _, frac in theirs])
    assert padding[0] == pytest.approx(padding[1], abs=PADDING_BAR)
    assert steps[0] == pytest.approx(steps[1], rel=STEPS_BAR)


def in_plan_order(cuts, planned):
    return [cuts[i] for i in planned.order.tolist()]


def ids(sampler):
    return {tuple(int(cut.id) for cut in batch) for batch in sampler}


def batches_of(planned):
    return {tuple(batch.tolist()) for batch in planned.batches}


# Given the examples in our order and told not to shuffle, Lhotse makes the very same batches.


@pytest.mark.parametrize("quadratic", [None, 1500])
def test_the_same_dynamic_batches(few, quadratic):
    lengths, cuts = few
    planned = plan(lengths, "bucket", max_input_cells=MAX_CELLS, quadratic=quadratic, put_back=False)
    limits = {"max_duration": float(MAX_CELLS), "quadratic_duration": quadratic}
    sampler = bucketing(
        in_plan_order(cuts, planned), shuffle=False, duration_bins=bins(planned.edges["input_length"]), **limits
    )
    assert ids(sampler) == batches_of(planned)


def test_the_same_batches_of_fixed_sizes(few):
    lengths, cuts = few
    edges, limits = one_dimensional(lengths)
    planned = plan(lengths, "bucket", batch_size=fixed_sizes(edges))
    assert ids(bucketing(in_plan_order(cuts, planned), shuffle=False, **limits)) == batches_of(planned)


def test_the_same_batches_in_two_dimensions(few):
    lengths, cuts = few
    _, _, sizes, limits = two_dimensional(lengths)
    planned = plan(lengths, "bucket2d", num_buckets=15, num_output_buckets=2, batch_size=sizes)
    assert ids(bucketing(in_plan_order(cuts, planned), shuffle=False, **limits)) == batches_of(planned)


def test_the_same_batches_without_buckets(few):
    lengths, cuts = few
    planned = plan(lengths, "random", max_input_cells=MAX_CELLS, put_back=False)
    sampler = DynamicCutSampler(in_plan_order(cuts, planned), max_duration=float(MAX_CELLS), world_size=1, rank=0)
    assert ids(sampler) == batches_of(planned)


# Each shuffling for itself, as in training.


@pytest.mark.parametrize("quadratic", [None, 1500])
def test_dynamic_bucketing(many, quadratic):
    lengths, cuts = many
    seeds = range(2)
    ours = [
        plan(lengths, "bucket", max_input_cells=MAX_CELLS, quadratic=quadratic, put_back=False, seed=seed)
        for seed in seeds
    ]
    limits = {"max_duration": float(MAX_CELLS), "quadratic_duration": quadratic}
    limits["duration_bins"] = bins(ours[0].edges["input_length"])
    within_the_bars(ours, [drained(bucketing(cuts, seed, **limits)) for seed in seeds])


def test_dynamic_bucketing_where_lhotse_estimates_the_bins(many):
    lengths, cuts = many
    ours = plan(lengths, "bucket", max_input_cells=MAX_CELLS, num_buckets=30, put_back=False)
    limits = {"num_buckets": 30, "num_cuts_for_bins_estimate": len(cuts)}
    within_the_bars([ours], [drained(bucketing(cuts, max_duration=float(MAX_CELLS), **limits))])


def test_fixed_sizes(many):
    lengths, cuts = many
    edges, limits = one_dimensional(lengths)
    within_the_bars([plan(lengths, "bucket", batch_size=fixed_sizes(edges))], [drained(bucketing(cuts, **limits))])


def test_two_dimensions(many):
    lengths, cuts = many
    edges, second, sizes, limits = two_dimensional(lengths)
    ours = plan(lengths, "bucket2d", edges=edges, output_edges=second, batch_size=sizes)
    within_the_bars([ours], [drained(bucketing(cuts, **limits))])


def test_unbucketed(many):
    lengths, cuts = many
    seeds = range(6)  # random batches vary: one epoch's padding by 0.06 percentage points
    ours = [plan(lengths, "random", max_input_cells=MAX_CELLS, put_back=False, seed=seed) for seed in seeds]
    limits = {"max_duration": float(MAX_CELLS), "shuffle": True, "world_size": 1, "rank": 0}
    within_the_bars(ours, [drained(DynamicCutSampler(cuts, seed=seed, **limits)) for seed in seeds])


def test_lhotses_unbucketed_batches_exceed_their_budget_and_ours_need_not(many):
    lengths, cuts = many
    limits = {"max_duration": float(MAX_CELLS), "shuffle": True, "world_size": 1, "rank": 0}
    largest = max(
        len(durations) * max(durations)
        for durations in ([cut.duration for cut in batch] for batch in DynamicCutSampler(cuts, **limits))
    )
    assert largest > 2 * MAX_CELLS
    kept = plan(lengths, "random", max_input_cells=MAX_CELLS).frame
    assert (kept["num_rows"] * kept["input_length"]).max() <= MAX_CELLS
