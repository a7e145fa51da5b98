"""What no plan, watch or measurement can be made of is refused in one sentence, before anything is run."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import effkit as ek
from effkit import padding

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = padding.lengths(np.arange(1, 33))
MODEL = ek.models.text(layers=1, hidden=32, ffn=64)


def plan(**limits):
    return padding.plan(LENGTHS, "bucket", **{"batch_size": 4, "num_buckets": 2} | limits)


def step(_):
    raise AssertionError("nothing may be run")


def study(**given):
    return ek.study(**{"step": step, "model": MODEL, "loader": []} | given)


@pytest.mark.parametrize(("call", "kind", "words"), [
    (lambda: plan(batch_size=True), ValueError, "batch_size is a whole number from 1 on; given: True"),
    (lambda: plan(batch_size=[4, 2.5]), ValueError, r"batch_size is a whole number from 1 on; given: 4\.0|2\.5"),
    (lambda: plan(batch_size="4"), ValueError, "batch_size is a whole number from 1 on; given: '4'"),
    (lambda: plan(num_buckets=2.5), ValueError, r"num_buckets is a whole number from 1 on; given: 2\.5"),
    (lambda: plan(seed="a"), ValueError, "seed is a whole number from 0 on; given: 'a'"),
    (lambda: plan(pad_to_multiple_of=0), ValueError, "pad_to_multiple_of is a whole number from 1 on; given: 0"),
    (lambda: plan(max_input_cells=np.nan), ValueError, "max_input_cells is a number above 0, and finite; given: nan"),
    (lambda: plan(max_input_cells="400"), ValueError, "max_input_cells is a number above 0, and finite; given: '400'"),
    (lambda: plan(quadratic=-1), ValueError, "quadratic is a number above 0, and finite; given: -1"),
    (lambda: plan().batch_sampler("0", 2), ValueError, r"rank is in 0\.\.world_size-1; given: rank 0 of 2"),
    (lambda: plan().batch_sampler(0, 2.0), ValueError, r"world_size is a whole number from 0 on; given: 2\.0"),
    (lambda: padding.watch(5), TypeError, "loader yields batches, as a DataLoader or a list does; given: 5"),
    (lambda: padding.watch("abc"), TypeError, "loader yields batches.*given: 'abc'"),
    (lambda: padding.watch([], num_batches=-1), ValueError, "num_batches is a whole number from 1 on; given: -1"),
    (lambda: study(loader=5), TypeError, "loader yields batches.*given: 5"),
    (lambda: study(loader=MODEL), TypeError, "loader yields batches.*given: Text"),
    (lambda: study(num_batches=True), ValueError, "num_batches is a whole number from 1 on; given: True"),
    (lambda: padding.measure(LENGTHS, MODEL), TypeError, r"plan is a Plan, from padding\.plan.*given: DataFrame"),
    (lambda: padding.measure(plan(), MODEL, repeats="3"), ValueError, "repeats is a whole number from 1 on"),
    (lambda: padding.measure(plan(), MODEL, num_batches=4.5), ValueError, "num_batches is a whole number from 3 on"),
    (lambda: padding.measure(plan(), MODEL, world_size=0), ValueError, "world_size is a whole number from 1 on"),
    (lambda: padding.whatif(5), TypeError, "base is an Account.*given: 5"),
])  # fmt: skip
def test_refused(call, kind, words):
    before = [value.clone() for value in MODEL.parameters()]
    with pytest.raises(kind, match=words) as refused:
        call()
    assert "\n" not in str(refused.value)
    assert all(torch.equal(*pair) for pair in zip(before, MODEL.parameters(), strict=True))


def test_numpys_whole_numbers_are_sound():
    four = np.int64(4)
    measured = padding.measure(plan(batch_size=four, num_buckets=four), MODEL, num_batches=four, repeats=np.int64(1))
    assert padding.predict(measured, batch_size=four).total == measured.total
    assert len(list(plan().batch_sampler(np.int64(1), np.int64(2)))) > 0


def test_a_speech_model_makes_outputs_for_inputs_alone():
    frames = padding.lengths(np.arange(40, 80))
    batch = ek.models.speech().make_batch([np.array([0]), np.array([39])], frames)
    assert batch["labels"].shape == (2, 79 // 16)
    measured = padding.measure(
        padding.plan(frames, "random", batch_size=8), ek.models.speech(), num_batches=3, repeats=1
    )
    assert measured.companion(padding.EPOCH_CELLS).frame["value"]["real"] == frames["input_length"].sum()
