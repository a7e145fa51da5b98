"""Bucket edges against brute force and against Lhotse's own estimate; who falls into which bucket."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from lhotse import MonoCut
from lhotse.dataset.sampling.dynamic_bucketing import estimate_duration_buckets

from effkit.padding import buckets

FEW = st.lists(st.integers(1, 30), min_size=1, max_size=25).map(np.array)
MANY = st.lists(st.integers(1, 300), min_size=1, max_size=120).map(np.array)


def cells_to_edge(lengths, edges):
    """Padded cells when every example is padded to the edge of its bucket."""
    return sum(min(edge for edge in edges if edge >= length) for length in lengths.tolist())


def uneven(num_examples=3000):
    return np.clip(np.random.default_rng(0).lognormal(5, 0.7, num_examples), 10, 2000).astype("int64")


@given(FEW, st.integers(1, 4))
def test_optimal_edges_against_every_possible_choice(lengths, num_buckets):
    values = np.unique(lengths).tolist()
    inner, last = values[:-1], values[-1]
    choices = [c for k in range(num_buckets) for c in combinations(inner, k)]
    fewest = min(cells_to_edge(lengths, [*choice, last]) for choice in choices)
    edges = buckets.optimal_edges(lengths, num_buckets)
    assert len(edges) <= num_buckets
    assert cells_to_edge(lengths, edges.tolist()) == fewest


@given(MANY, st.integers(1, 12))
def test_optimal_edges_are_never_worse_than_equal_duration(lengths, num_buckets):
    equal = buckets.equal_duration_edges(lengths, num_buckets).tolist()
    optimal = buckets.optimal_edges(lengths, num_buckets).tolist()
    assert cells_to_edge(lengths, optimal) <= cells_to_edge(lengths, equal)


def test_beyond_512_distinct_lengths_the_edges_stay_better_than_equal_duration():
    lengths = uneven()
    assert len(np.unique(lengths)) > 512
    cells = [cells_to_edge(lengths, rule(lengths, 8)) for rule in (buckets.optimal_edges, buckets.equal_duration_edges)]
    assert cells[0] < cells[1]


@given(MANY, st.integers(1, 12))
def test_edges_rise_and_end_at_the_longest(lengths, num_buckets):
    for rule in (buckets.optimal_edges, buckets.equal_duration_edges):
        edges = rule(lengths, num_buckets)
        assert (np.diff(edges) > 0).all()
        assert edges[-1] == lengths.max()
        assert len(edges) <= num_buckets


@given(st.lists(st.integers(1, 300), min_size=12, max_size=120).map(np.array), st.integers(2, 12))
def test_equal_duration_edges_are_lhotses(lengths, num_buckets):
    cuts = [MonoCut(id=str(i), start=0, duration=float(n), channel=0) for i, n in enumerate(lengths.tolist())]
    # Lhotse says where the next bucket starts, we say where this one ends
    starts = estimate_duration_buckets(cuts, num_buckets)
    ends = sorted({int(start) - 1 for start in starts if start > lengths.min()} | {int(lengths.max())})
    assert buckets.equal_duration_edges(lengths, num_buckets).tolist() == ends


def test_buckets_hold_equal_sums():
    lengths = uneven()
    bucket = buckets.assign(lengths, buckets.equal_duration_edges(lengths, 6))
    sums = np.bincount(bucket, weights=lengths)
    assert np.abs(sums / sums.mean() - 1).max() < 0.02


@given(MANY, st.integers(1, 12))
def test_assign_is_inclusive_above_and_exclusive_below(lengths, num_buckets):
    edges = buckets.optimal_edges(lengths, num_buckets)
    bucket = buckets.assign(lengths, edges).astype(int)
    assert (lengths <= edges[bucket]).all()
    assert (lengths > np.concatenate([[0], edges])[bucket]).all()


def test_assign_by_hand():
    edges = np.array([10, 20, 40])
    assert buckets.assign(np.array([1, 10, 11, 20, 21, 40, 41, 99]), edges).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_very_long_lengths_need_no_table():
    lengths = np.array([5, 10, 1 << 30, (1 << 30) + 1])
    edges = np.array([5, 1 << 30, 1 << 31])
    assert buckets.assign(lengths, edges).tolist() == [0, 1, 1, 2]
    assert buckets.equal_duration_edges(lengths, 2).tolist() == [1 << 30, (1 << 30) + 1]


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 20)), min_size=1, max_size=60), st.integers(1, 5), st.data()
)
def test_assign2d_by_a_plain_loop(pairs, num_buckets, data):
    inputs, outputs = np.array(pairs).T
    edges = buckets.equal_duration_edges(inputs, num_buckets)
    second = buckets.output_edges(inputs, outputs, edges, data.draw(st.integers(1, 4)))
    expected = []
    for length, output in pairs:
        row = next(i for i, edge in enumerate(edges) if length <= edge)
        column = next(j for j, edge in enumerate(second[row]) if output <= edge)
        expected.append(row * second.shape[1] + column)
    assert buckets.assign2d(inputs, outputs, edges, second).tolist() == expected


def test_output_edges_split_each_input_bucket_by_summed_output():
    inputs = np.repeat([10, 20], 1000)
    outputs = np.tile(np.arange(1, 1001), 2)
    outputs[1000:] *= 2
    second = buckets.output_edges(inputs, outputs, np.array([10, 20]), 2)
    # half of 1 + … + n lies below n / sqrt(2)
    assert second.tolist() == [[pytest.approx(1000 / 2**0.5, abs=2), 1000], [pytest.approx(2000 / 2**0.5, abs=4), 2000]]


def test_a_bucket_that_needs_fewer_output_edges_repeats_the_last():
    second = buckets.output_edges(np.array([1, 1, 9]), np.array([7, 7, 3]), np.array([1, 9]), 3)
    assert second.tolist() == [[7, 7, 7], [3, 3, 3]]


def test_assign2d_names_what_fits_no_bucket():
    edges, second = np.array([10, 20]), np.array([[2, 4], [3, 6]])
    assert buckets.assign2d(np.array([10, 20]), np.array([4, 6]), edges, second).tolist() == [1, 3]
    with pytest.raises(ValueError, match="input of 21 cells is longer than the last bucket edge 20"):
        buckets.assign2d(np.array([10, 21]), np.array([1, 1]), edges, second)
    with pytest.raises(ValueError, match="output of 5 cells is longer than the last edge"):
        buckets.assign2d(np.array([20, 10]), np.array([5, 5]), edges, second)
