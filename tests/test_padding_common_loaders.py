"""The loaders that people bring: the share of padding is right in each, and rows of one width are advised against."""

from __future__ import annotations

from functools import partial

import numpy as np
import planted
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader, IterableDataset

import effkit as ek
from effkit.advice import batch_levers
from effkit.advice.examples import drawn, to_longest
from effkit.padding import lengths, plan, watch

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = [int(n) for n in np.random.default_rng(0).integers(5, 69, 64)]
TEXTS = planted.Texts(LENGTHS)


def padded_to(items, width=None, multiple=1, turned=False):
    """Tokens padded to a width or a multiple, and a mask."""
    longest = max(map(len, items))
    width = width or -(-longest // multiple) * multiple
    ids = torch.zeros(len(items), width, dtype=torch.long)
    for row, tokens in zip(ids, items, strict=True):
        row[: len(tokens)] = tokens
    mask = ids == 0 if turned else (ids > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(ids == 0, -100)}


class Stream(IterableDataset):
    def __iter__(self):
        return iter(TEXTS.items)


def numbers(items):
    return torch.tensor([len(item) for item in items])


def ids_of(items):
    return padded_to(items)["input_ids"]


def features(items):
    """[B, 8, T], noise at real frames."""
    real = padded_to(items)["attention_mask"]
    return torch.rand(len(items), 8, real.shape[1]) * real[:, None]


def made(collate, dataset=TEXTS, **more):
    return DataLoader(dataset, 8, collate_fn=collate, **more)


def batches(width):
    """Padded cells of all batches of eight, each as wide as ``width(longest)``."""
    return sum(8 * width(max(LENGTHS[i : i + 8])) for i in range(0, 64, 8))


LONGEST, FIXED, MULTIPLE = batches(lambda n: n), batches(lambda n: 128), batches(lambda n: -(-n // 8) * 8)
LOADERS = {
    "max_length": (lambda: made(partial(padded_to, width=128)), FIXED),
    "max_length in the dataset": (lambda: DataLoader(Dataset.from_dict(
        {k: v.tolist() for k, v in padded_to(TEXTS.items, 128).items()}).with_format("torch"), 8), FIXED),
    "a multiple": (lambda: made(partial(padded_to, multiple=8)), MULTIPLE),
    "a stream": (lambda: made(padded_to, Stream()), LONGEST),
    "workers": (lambda: made(padded_to, num_workers=2), LONGEST),
    "dict": (lambda: made(padded_to), LONGEST),
    "tuple with a mask": (lambda: made(lambda items: (ids_of(items), ids_of(items) > 0, torch.ones(8))), LONGEST),
    "tuple with lengths": (lambda: made(lambda items: (ids_of(items), numbers(items))), LONGEST),
    "tuple with classes": (lambda: made(lambda x: (ids_of(x), torch.zeros(8).long(), numbers(x))), LONGEST),
    "channels first": (lambda: made(lambda x: {"input_features": features(x), "input_lengths": numbers(x)}), LONGEST),
    "true at padding": (lambda: made(partial(padded_to, width=128, turned=True)), FIXED),
    "fairseq's": (lambda: made(lambda items: {"net_input": {
        "src_tokens": ids_of(items), "src_lengths": numbers(items)}, "target": ids_of(items)}), LONGEST),
}  # fmt: skip


@pytest.mark.parametrize("kind", LOADERS)
def test_common_loaders(kind):
    make, total = LOADERS[kind]
    account = watch(make()).run().account
    assert account.frame["value"].to_dict() == {"real": sum(LENGTHS), "padding": total - sum(LENGTHS)}
    assert lengths(make())["input_length"].tolist() == LENGTHS


@pytest.mark.parametrize("kind", ["max_length", "max_length in the dataset", "true at padding"])
def test_one_width_is_named(kind):
    (sentence,) = watch(LOADERS[kind][0]()).run().findings
    assert sentence == f"every batch is 128 wide, its longest row {max(LENGTHS)}: pad to the longest row"


def test_one_width_that_some_rows_fill():
    """Truncated to 40 cells, which some rows are in most batches."""
    short = planted.Texts(np.minimum(LENGTHS, 40))
    assert "pad to the longest" not in str(watch(made(partial(padded_to, width=40), short)).run().findings)
    (sentence,) = watch(made(partial(padded_to, width=68), short)).run().findings
    assert sentence.startswith("every batch is 68 wide, its longest row 40: ")


@pytest.mark.parametrize(("kind", "limits"), [
    ("dict", {}), ("max_length", {"pad_to_multiple_of": 128}), ("a multiple", {"pad_to_multiple_of": 8}),
])  # fmt: skip
def test_what_rows_are_padded_to_is_a_limit_of_the_plan(kind, limits):
    make, total = LOADERS[kind]
    assert watch(make()).run().padded_to == limits
    delivered = drawn(make(), 8).plan
    assert delivered.account().total == total
    assert {name: value for name, value in delivered.limits.items() if name != "batch_size"} == limits


def test_a_multiple_blames_nobody_for_grouping():
    ordered = planted.Texts(sorted(LENGTHS))
    assert watch(made(partial(padded_to, multiple=8), ordered)).run().findings == []


def test_rows_with_cells_to_spare_by_no_multiple():
    def with_ends(items):
        width = max(map(len, items)) + 2
        return padded_to(items, width)

    examples = drawn(made(with_ends), 8)
    assert examples.watched is None
    assert "wider than the longest, by no multiple" in examples.why_unseen


@pytest.mark.parametrize("strategy", ["random", "sorted", "bucket", "optimal", "token_budget"])
def test_plans_count_multiples(strategy):
    limits = {"max_input_cells": 640, "pad_to_multiple_of": 16}
    planned = plan(lengths(LENGTHS), strategy, **limits)
    assert (planned.frame["input_length"] % 16 == 0).all()
    assert (planned.frame["num_rows"] * planned.frame["input_length"]).max() <= 640
    assert planned.account().residual == 0


# Cut


@pytest.mark.parametrize("side", [lambda x: x, lambda x: x.flip(1)], ids=["right", "left"])
def test_cut_to_the_longest_row(side):
    batch = {name: side(tensor) for name, tensor in padded_to(TEXTS.items[:3], 128).items()}
    batch |= {"block": torch.ones(3, 1, 128, 128), "classes": torch.tensor([0, 1, 0]), "name": "a"}
    cut, expected = to_longest(batch), padded_to(TEXTS.items[:3])
    assert all(torch.equal(side(cut[name]), expected[name]) for name in expected)
    longest = max(LENGTHS[:3])
    assert cut["block"].shape == (3, 1, longest, longest)
    assert cut["classes"].tolist() == [0, 1, 0]
    assert batch["input_ids"].shape == (3, 128), "the batch itself is as it was"


# Studied


@pytest.fixture(scope="module")
def fixed():
    model = ek.models.text(layers=2, hidden=64, ffn=128)
    return ek.study(**planted.training(model, made(partial(padded_to, width=128), shuffle=True)), num_batches=6)


def lever(study, name):
    return next(one for one in batch_levers.levers(study, None) if one.name == name)


def test_the_longest_row_is_advised_and_pays(fixed):
    one = lever(fixed, "pad to the longest row")
    assert one.found.startswith(f"every batch is 128 wide, its longest row {max(fixed.examples.watched.lengths.max())}")
    assert one.helps
    receipt = one.measure()
    assert receipt.measured.total < fixed.account.total
    assert 0.5 < receipt.predicted.total / receipt.measured.total < 2
    applied = one.apply()
    assert all(batch["input_ids"].shape[1] == batch["attention_mask"].sum(1).max() for batch in applied)


def test_buckets_are_cut_too(fixed):
    bucketed = lever(fixed, "batches of like length")
    assert bucketed.predicted.total < lever(fixed, "pad to the longest row").predicted.total * 1.1
    assert sum(batch["input_ids"].numel() for batch in bucketed.apply()) < LONGEST


def test_a_multiple_is_studied():
    model = ek.models.text(layers=1, hidden=32, ffn=64)
    study = ek.study(**planted.training(model, made(partial(padded_to, multiple=8))), num_batches=4)
    cells = study.epoch.companion(ek.padding.EPOCH_CELLS)
    assert cells.total == sum(8 * -(-max(LENGTHS[i : i + 8]) // 8) * 8 for i in range(0, 32, 8))
