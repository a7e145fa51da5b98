"""Which cells are real is told from what a batch holds, whatever its masks are called, and refused where it is not."""

from __future__ import annotations

from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effkit.account import Account
from effkit.padding import lengths, watch
from effkit.padding.real_cells import input_lengths, real_cells

ROWS = st.lists(st.integers(1, 12), min_size=2, max_size=6)


def cells(numbers, width, side="right"):
    """Which cells are real, [B, T]."""
    real = torch.arange(width) < torch.as_tensor(numbers)[:, None]
    return real if side == "right" else real.flip(1)


def ids(real, padding=0):
    """Tokens 7, 8, 9, ... at real cells."""
    return (torch.arange(real.shape[1]).expand(real.shape) + 7).masked_fill(~real, padding)


def shares(batch):
    return watch([batch]).run().account.frame["value"].to_dict()


CONVENTIONS = {
    "ones at real cells": lambda real: real.long(),
    "true at real cells": lambda real: real,
    "true at padding": lambda real: ~real,
    "ones at padding": lambda real: (~real).to(torch.uint8),
    "minus infinity is added": lambda real: torch.zeros(real.shape).masked_fill(~real, -torch.inf),
    "a large number is subtracted": lambda real: torch.zeros(real.shape).masked_fill(~real, -1e4),
    "added to all heads": lambda real: torch.zeros(real.shape).masked_fill(~real, -1e9)[:, None, None].bfloat16(),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", ["attention_mask", "padding_mask", "mask", "src_key_padding_mask"])
@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("width", [6, 8], ids=["a row is whole", "no row is whole"])
def test_conventions_of_masks(convention, name, side, padding, width):
    real = cells([6, 4, 5, 2], width, side)
    batch = {"input_ids": ids(real, padding), name: CONVENTIONS[convention](real)}
    assert shares(batch) == {"real": 17, "padding": 4 * width - 17}


@given(ROWS, st.integers(0, 4), st.booleans(), st.booleans())
def test_the_values_at_padding_tell_which_it_is(numbers, more, turned, left):
    real = cells(numbers, max(numbers) + more, "left" if left else "right")
    mask = (~real if turned else real).numpy()
    assert real_cells(mask, [ids(real).numpy()]).sum(axis=1).tolist() == numbers


@given(ROWS, st.booleans())
def test_a_whole_row_tells_it_too(numbers, turned):
    real = cells(numbers, max(numbers)).numpy()
    if len(set(numbers)) > 1 or turned:
        assert real_cells(~real if turned else real).sum(axis=1).tolist() == numbers


def test_lengths_tell_it_too():
    real = cells([3, 5], 8)
    for mask in (real, ~real):
        assert shares({"mask": mask, "lengths": torch.tensor([3, 5]), "inputs": torch.ones(2, 8)})["real"] == 8


def test_numbers_are_factors_where_nothing_else_speaks():
    assert shares({"attention_mask": cells([3, 5], 8).long()}) == {"real": 8, "padding": 8}


@pytest.mark.parametrize("name", ["attention_mask", "padding_mask"])
def test_what_may_be_read_both_ways_is_refused(name):
    """Two of eight cells are marked in every row, and the inputs look alike at all of them."""
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[:, 6:] = True
    with pytest.raises(ValueError, match=r"may be True at real cells or at padding: no row is whole.*give lengths"):
        watch([{"inputs": torch.ones(4, 8), name: mask}]).run()


def test_a_mask_of_other_numbers_is_refused():
    with pytest.raises(ValueError, match=r"0 and large negative numbers; given: -1\.5 to 0: "):
        watch([{"mask": torch.tensor([[0.0, -1.5], [0.0, 0.0]])}]).run()


def test_padded_labels_tell_it_where_inputs_are_alike():
    real = cells([3, 5], 8)
    labels = ids(real).masked_fill(~real, -100)
    assert shares({"inputs": torch.ones(2, 8), "padding_mask": ~real, "labels": labels})["real"] == 8


# Batches without names


PAIRS = namedtuple("PAIRS", ["x", "attention_mask"])


@pytest.mark.parametrize("made", [
    lambda real, x: (x, real), lambda real, x: [x, ~real, torch.tensor([1, 2])], lambda real, x: PAIRS(x, real.long()),
    lambda real, x: (x, real.sum(1)), lambda real, x: (x, torch.tensor([2, 1]), real.sum(1)),
    lambda real, x: ({"input_ids": x, "attention_mask": real}, torch.tensor([0, 1])),
    lambda real, x: {"net_input": {"src_tokens": x, "src_lengths": real.sum(1)}, "target": x},
    lambda real, x: SimpleNamespace(input_ids=x, attention_mask=~real),
    lambda real, x: (x[..., None] * torch.arange(1, 4), real.sum(1), torch.ones(2)),
])  # fmt: skip
@pytest.mark.parametrize("numbers", [[3, 6], [3, 5]])
def test_tuples_and_nested_batches(made, numbers):
    real = cells(numbers, 6)
    assert shares(made(real, ids(real))) == {"real": sum(numbers), "padding": 12 - sum(numbers)}


@pytest.mark.parametrize("classes", [[1, 2], [0, 1], [3, 3]])
def test_classes_beside_inputs_are_no_lengths(classes):
    x = ids(cells([4, 6], 6))
    with pytest.raises(ValueError, match=r"padding is not visible in this batch \(0, 1\)"):
        watch([(x, torch.tensor(classes))]).run()


# Layouts


def features(numbers, width, mel=80, seed=0):
    real = cells(numbers, width)
    return torch.rand(len(numbers), width, mel, generator=torch.Generator().manual_seed(seed)) * real[..., None]


@pytest.mark.parametrize(
    ("numbers", "width"), [([300, 240, 240, 180], 300), ([70, 50, 60, 30], 300), ([9, 8, 9, 9], 9)]
)
@pytest.mark.parametrize("first", [True, False], ids=["channels first", "time first"])
def test_lengths_beside_features(numbers, width, first):
    x = features(numbers, width)
    batch = {"input_features": x.transpose(1, 2) if first else x, "input_lengths": torch.tensor(numbers)}
    assert shares(batch) == {"real": sum(numbers), "padding": 4 * width - sum(numbers)}


def test_features_of_zeros_are_as_wide_as_their_lengths():
    batch = {"input_features": torch.zeros(4, 80, 300), "input_lengths": torch.tensor([300, 240, 240, 180])}
    assert shares(batch) == {"real": 960, "padding": 240}


def test_a_length_beyond_its_rows_is_refused():
    batch = {"input_values": torch.zeros(2, 80), "lengths": torch.tensor([16000, 12000])}
    with pytest.raises(ValueError, match=r"a length of 16,000 cannot lie in a tensor of shape \(2, 80\): "):
        input_lengths(batch)


def test_a_part_of_a_total_is_not_negative():
    with pytest.raises(ValueError, match="a part of a total is 0 or more; given: padding -5 of 10 cells"):
        Account.of("Cells", "cells", {"real": 15, "padding": -5}, total=10, source="shapes")


# Classes are no outputs


@pytest.mark.parametrize("labels", [[0, 1, 1], [1, 5, 3], ["good", "bad", "good"]])
def test_classes_of_a_dataset_are_no_output_lengths(labels):
    table = pd.DataFrame({"input_ids": [[7] * 9, [7] * 4, [7] * 6], "labels": labels})
    assert lengths(table).to_dict("list") == {"input_length": [9, 4, 6]}


def test_a_column_that_is_asked_for_is_taken():
    table = pd.DataFrame({"input_ids": [[7] * 9, [7] * 4], "labels": [2, 3]})
    assert lengths(table, output="labels")["output_length"].tolist() == [2, 3]


@pytest.mark.parametrize("labels", [torch.tensor([3, 1]), torch.rand(2, 5), torch.tensor([[0, 1, 1], [1, 0, 0]])])
def test_classes_in_a_batch_are_no_output_lengths(labels):
    watched = watch([{"attention_mask": cells([3, 2], 3).long(), "labels": labels}]).run()
    assert "output_length" not in watched.lengths


def test_what_has_no_cells_is_looked_past():
    real = cells([3, 5], 6)
    others = {"graph": torch.eye(2).to_sparse(), "temperature": torch.tensor(2), "name": ["a", "b"], "nothing": None}
    assert shares({"input_ids": ids(real), "attention_mask": real, **others})["real"] == 8
    assert shares((ids(real), torch.tensor(2), None, real))["real"] == 8


def test_dummy_rows_of_padding_alone_do_not_turn_a_mask_round():
    real = cells([3, 5, 0], 8)
    assert shares({"input_ids": ids(real), "attention_mask": real.long()})["real"] == 8
    assert shares({"input_ids": ids(real), "padding_mask": ~real})["real"] == 8


def test_numbers_of_packed_documents_are_real_cells():
    mask = torch.tensor([[1, 1, 2, 2, 2, 0], [1, 2, 2, 3, 0, 0]])
    assert shares({"attention_mask": mask}) == {"real": 9, "padding": 3}


def test_numpy_and_python_come_in_too():
    assert input_lengths({"lengths": [3, 5]}) == (pytest.approx(np.array([3, 5])), 5)
