"""Batches cut into parts and made larger or smaller; one step, phase by phase."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from effkit.activations.levers import Levers
from effkit.activations.stepping import lengths, parts, resized, rows, run
from effkit.training import still

torch.set_num_threads(1)


def batch(num_rows=4, cells=6):
    tokens = torch.arange(num_rows * cells).view(num_rows, cells)
    return {"input_ids": tokens, "mask": tokens[:, None, :, None].expand(-1, 1, -1, cells), "class": tokens[:, 0],
            "scale": torch.tensor(3.0), "flag": True}  # fmt: skip


def told(batch):
    """Of each length that may vary: its cells, and the tensors and dimensions that have them."""
    return [(one.num_cells, sorted(one.where)) for one in lengths(batch)]


def test_rows_and_lengths_are_told_from_the_shapes():
    assert rows(batch()) == 4
    assert told(batch())[0] == (6, [(0, 1), (1, 2), (1, 3)]), "a mask's too"
    assert told({"features": torch.zeros(2, 9, 3)}) == [(9, [(0, 1)])]
    assert told({"pixels": torch.zeros(2, 3, 8, 8)}) == []
    assert told({"pixels": torch.zeros(2, 3, 8, 8), "classes": torch.zeros(2, 8, 8).long()}) == [], "sides of images"
    assert told({"pixels": torch.zeros(2, 3, 8, 8), "labels": torch.zeros(2, 5).long()}) == [(5, [(1, 1)])]
    assert told(torch.zeros(2, dtype=torch.long)) == []
    assert told(torch.zeros(2, 1)) == []


def test_channels_may_come_first_and_a_width_may_be_as_large_as_a_length():
    assert told(torch.zeros(2, 4, 64)) == [(4, [(0, 1)]), (64, [(0, 2)])]
    assert told(torch.zeros(2, 6, 6)) == [(6, [(0, 1), (0, 2)]), (6, [(0, 1)])]
    (alike, alone, *_), shapes = lengths((torch.zeros(2, 6, 6), torch.zeros(2, 6))), lambda b: [t.shape[1:] for t in b]
    assert shapes(resized((torch.zeros(2, 6, 6), torch.zeros(2, 6)), 2, 3, alike)) == [(3, 3), (3,)]
    assert shapes(resized((torch.zeros(2, 6, 6), torch.zeros(2, 6)), 2, 3, alone)) == [(3, 6), (3,)]
    assert shapes(resized((torch.zeros(2, 6, 6), torch.zeros(2, 6)), 3, None, None)) == [(6, 6), (6,)]


def test_batches_that_cannot_be_told_are_refused():
    with pytest.raises(ValueError, match=r"share their first dimension, .*at least one row; given: \[2, 3\]"):
        rows((torch.zeros(2), torch.zeros(3)))
    with pytest.raises(ValueError, match="a batch holds tensors: a mapping of keyword arguments, a tuple"):
        rows({"text": "hello"})


@given(st.integers(1, 30), st.data())
def test_parts_make_up_the_batch(num_rows, data):
    count = data.draw(st.integers(1, num_rows))
    whole = batch(num_rows)
    cut = list(parts(whole, count))
    assert len(cut) == count
    sizes = [rows(part) for part in cut]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
    for name in ("input_ids", "mask", "class"):
        assert torch.equal(torch.cat([part[name] for part in cut]), whole[name])
        assert all(part[name].data_ptr() >= whole[name].data_ptr() for part in cut), "views, not copies"
    assert all(part["scale"] is whole["scale"] and part["flag"] is True for part in cut)


def test_more_parts_than_rows_are_refused():
    with pytest.raises(ValueError, match="a batch of 4 rows cannot be cut into 5 micro-batches; use at most 4"):
        list(parts(batch(), 5))


@given(st.integers(1, 9), st.integers(1, 14))
def test_a_batch_takes_any_size(num_rows, cells):
    small = batch(3, 5)
    found = resized(small, num_rows, cells, lengths(small)[0])
    assert found["input_ids"].shape == (num_rows, cells)
    assert found["mask"].shape == (num_rows, 1, cells, cells)
    assert found["class"].shape == (num_rows,)
    r, c = min(num_rows, 3), min(cells, 5)
    assert torch.equal(found["input_ids"][:r, :c], small["input_ids"][:r, :c])
    if num_rows > 3:
        assert torch.equal(found["class"][3], small["class"][0]), "contents are repeated"
    assert found["scale"] is small["scale"]


def test_a_batch_of_its_own_size_is_itself():
    whole = batch()
    assert resized(whole, 4, 6, lengths(whole)[0]) is whole
    assert resized(whole, 4) is whole


# The step


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))


def mean_square(output):
    return output.square().mean()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_micro_batches_of_any_size_add_up_to_the_gradient_of_the_batch(count):
    one, found = model(), {}
    inputs = torch.randn(7, 6)
    mean_square(one(inputs)).backward()
    expected = [parameter.grad.clone() for parameter in one.parameters()]
    one.zero_grad(set_to_none=True)
    update = still(one.parameters())
    update.register_step_pre_hook(lambda *_: found.update(grads=[p.grad.clone() for p in one.parameters()]))
    run(one, inputs, mean_square, update, Levers(micro_batches=count))
    for a, b in zip(expected, found["grads"], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_phases_are_told_in_order_and_gradients_are_gone_at_the_end():
    one, told = model(), []
    run(one, torch.randn(4, 6), mean_square, still(one.parameters()), Levers(micro_batches=2), told.append)
    assert told == ["forward", "backward"] * 2 + ["optimizer"]
    assert all(parameter.grad is None for parameter in one.parameters())


def test_micro_batches_after_the_first_few_are_left_out():
    one, told = model(), []
    run(one, torch.randn(9, 6), mean_square, still(one.parameters()), Levers(micro_batches=9), told.append, 2)
    assert told == ["forward", "backward"] * 2 + ["optimizer"]


def test_levers_are_in_force_in_forward_only():
    one, seen = model(), []
    one[0].register_forward_hook(lambda module, given, out: seen.append(out.dtype))
    run(one, torch.randn(4, 6), mean_square, still(one.parameters()), Levers(autocast="bfloat16"))
    run(one, torch.randn(4, 6), mean_square, still(one.parameters()), Levers())
    assert seen == [torch.bfloat16, torch.float32]
    assert not torch.is_autocast_enabled("cpu")
