"""Best-fit-decreasing packing: against one item at a time, and against trl."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from trl import pack_dataset

from effkit.padding.planning import best_fit_decreasing


def one_at_a_time(lengths, capacity):
    """The textbook: each item, longest first, into the fullest row that still holds it. Returns the rows' fills."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=lambda i: rooms[i])] -= length
        else:
            rooms.append(capacity - length)
    return sorted(capacity - room for room in rooms)


def fills(lengths, rows):
    return np.bincount(rows, weights=lengths).astype(int)


@st.composite
def items(draw):
    capacity = draw(st.integers(1, 120))
    return np.array(draw(st.lists(st.integers(1, capacity), min_size=1, max_size=90))), capacity


@given(items())
def test_the_same_rows_as_one_at_a_time(case):
    lengths, capacity = case
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(fills(lengths, rows)) == one_at_a_time(lengths.tolist(), capacity)


@given(items())
def test_rows_are_numbered_without_gaps_and_hold_no_more_than_they_can(case):
    lengths, capacity = case
    rows = best_fit_decreasing(lengths, capacity)
    assert sorted(set(rows.tolist())) == list(range(rows.max() + 1))
    assert fills(lengths, rows).max() <= capacity


@given(items(), st.randoms())
def test_the_order_of_the_list_does_not_change_the_number_of_rows(case, random):
    lengths, capacity = case
    shuffled = np.array(random.sample(lengths.tolist(), len(lengths)))
    assert best_fit_decreasing(shuffled, capacity).max() == best_fit_decreasing(lengths, capacity).max()


def test_packing_is_deterministic():
    lengths = np.random.default_rng(0).integers(1, 500, 5000)
    assert (best_fit_decreasing(lengths, 1024) == best_fit_decreasing(lengths, 1024)).all()


def test_items_as_long_as_the_row_have_it_to_themselves():
    assert best_fit_decreasing(np.array([8, 8, 8]), 8).tolist() == [0, 1, 2]


def test_equal_items_fill_rows_in_succession():
    assert np.bincount(best_fit_decreasing(np.full(10, 3), 10)).tolist() == [3, 3, 3, 1]


CAPACITY = 256
DISTRIBUTIONS = {
    "uniform": lambda rng, n: rng.integers(1, CAPACITY + 1, n),
    "short": lambda rng, n: rng.geometric(0.05, n),
    "lognormal": lambda rng, n: rng.lognormal(4, 0.8, n).astype(int) + 1,
    "two humps": lambda rng, n: np.where(rng.random(n) < 0.5, rng.integers(20, 30, n), rng.integers(150, 220, n)),
    "just over a third": lambda rng, n: rng.integers(CAPACITY // 3 + 1, CAPACITY // 2, n),
}


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_as_many_rows_as_trl(distribution):
    lengths = np.clip(distribution(np.random.default_rng(1), 3000), 1, CAPACITY)
    dataset = Dataset.from_dict({"input_ids": [[0] * n for n in lengths.tolist()]})
    packed = pack_dataset(
        dataset, CAPACITY, strategy="bfd", map_kwargs={"batch_size": len(lengths), "keep_in_memory": True}
    )
    rows = best_fit_decreasing(lengths, CAPACITY)
    assert len(packed) == rows.max() + 1
    assert sorted(map(len, packed["input_ids"])) == sorted(fills(lengths, rows))
