"""The examples behind a loader: drawn as the loader would, put together anew, and nobody's random numbers spent."""

from __future__ import annotations

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planted import GroupedByNothing, Texts, loader, padded, uneven
from torch.utils.data import DataLoader, IterableDataset

from effkit.advice.examples import drawn, rebuilt, why_not_drawn
from effkit.padding import watch

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = uneven(22)


class Together(Texts):
    """Fetches a batch at once, and says so."""

    def __init__(self, lengths):
        super().__init__(lengths)
        self.asked = []

    def __getitems__(self, indices):
        self.asked.append(list(indices))
        return [self.items[i] for i in indices]

    def __getitem__(self, i):
        raise AssertionError("one by one")


class Stream(IterableDataset):
    def __iter__(self):
        return iter(Texts([4, 5]).items)


def unshuffled(dataset=None, **more):
    if "batch_sampler" not in more:
        more = {"batch_size": 4} | more
    return DataLoader(dataset or Texts(LENGTHS), collate_fn=padded, **more)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


# What can be drawn


@pytest.mark.parametrize(("made", "why"), [
    (lambda: [padded([torch.ones(3)])], "the loader is a list, not a DataLoader"),
    (lambda: iter([]), "the loader is a list_iterator, not a DataLoader"),
    (lambda: watch(unshuffled()), "the loader is a Watch, not a DataLoader"),
    (lambda: DataLoader(Stream(), batch_size=2), "the dataset is a stream"),
    (lambda: DataLoader(Stream(), batch_size=None), "the dataset is a stream"),
    (lambda: DataLoader(Texts([3, 4]), batch_size=None), "the loader has no batch sampler"),
])  # fmt: skip
def test_why_not(made, why):
    sentence = why_not_drawn(made())
    assert sentence.startswith(why)
    assert sentence.endswith("batches cannot be put together anew")


@pytest.mark.parametrize("made", [
    unshuffled, lambda: loader(LENGTHS), lambda: unshuffled(Together(LENGTHS)),
    lambda: loader(LENGTHS, batch_sampler=GroupedByNothing(22, 5)),
])  # fmt: skip
def test_map_style_loaders_can(made):
    assert why_not_drawn(made()) is None


# Drawn


@pytest.mark.parametrize("made", [
    unshuffled, lambda: loader(LENGTHS, batch_sampler=GroupedByNothing(22, 5)),
    lambda: loader(LENGTHS, batch_sampler=[[3, 1], [2], [0, 21, 20]]), lambda: unshuffled(drop_last=True),
    lambda: unshuffled(Together(LENGTHS)), lambda: unshuffled(batch_size=100), lambda: unshuffled(batch_size=1),
])  # fmt: skip
def test_batches_are_those_that_the_loader_delivers(made):
    delivered = list(made())
    examples = drawn(made(), 100)
    assert all(map(equal, examples.batches, delivered))
    assert len(examples.batches) == len(examples.groups) == len(delivered)
    assert examples.sizes == [len(batch["input_ids"]) for batch in delivered]
    assert sum(examples.sizes) == len(examples.items)


def test_groups_are_numbers_of_the_dataset_and_items_are_its_examples():
    dataset = Texts(LENGTHS)
    examples = drawn(unshuffled(dataset, batch_sampler=[[3, 1], [2]]), 5)
    assert examples.groups == ((3, 1), (2,))
    assert all(one is dataset.items[i] for one, i in zip(examples.items, (3, 1, 2), strict=True))


def test_no_more_is_fetched_than_asked_for():
    dataset = Together(LENGTHS)
    examples = drawn(unshuffled(dataset), 2)
    assert dataset.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert len(examples.batches) == 2
    assert dataset.asked == [[0, 1, 2, 3], [4, 5, 6, 7]]  # put together from what was fetched


def test_shuffled_batches_hold_every_example_once():
    examples = drawn(loader(LENGTHS), 100)
    assert sorted(i for group in examples.groups for i in group) == list(range(22))
    assert examples.groups[0] != tuple(range(8))


def test_an_empty_loader():
    with pytest.raises(ValueError, match="the loader is empty: there is no batch to study"):
        drawn(loader(LENGTHS, batch_sampler=[]), 3)


def test_any_examples_make_a_batch():
    examples = drawn(unshuffled(batch_sampler=[[3, 1], [2, 0]]), 2)
    assert equal(examples.batch([2, 0]), padded([Texts(LENGTHS).items[2], Texts(LENGTHS).items[3]]))
    assert equal(examples.make_batch([np.array([2]), np.array([0, 1])], None), examples.batch(np.array([2, 0, 1])))


def test_loading_is_timed_per_batch(monkeypatch):
    from effkit.advice import examples as here

    wall, cpu = iter([1000, 9000]), iter([100, 500])
    clocks = SimpleNamespace(perf_counter_ns=lambda: next(wall), process_time_ns=lambda: next(cpu))
    monkeypatch.setattr(here, "time", clocks)
    found = drawn(unshuffled(batch_sampler=[[0], [1], [2], [3]]), 4)
    assert (found.loading_ns, found.loading_cpu_ns) == (2000, 100)


# Random numbers


def test_random_states_are_untouched():
    shuffled = loader(LENGTHS)
    before = states()
    first, second = (drawn(shuffled, 2) for _ in range(2))
    assert states() == before
    assert first.groups == second.groups


def test_the_loaders_own_generator_is_untouched():
    own = torch.Generator().manual_seed(5)
    shuffled = loader(LENGTHS, generator=own)
    before = own.get_state().clone()
    drawn(shuffled, 2)
    assert torch.equal(own.get_state(), before)


# Lengths and padding


def test_the_plan_has_the_lengths_and_the_padding_of_what_was_delivered():
    made = lambda: loader(LENGTHS, batch_sampler=GroupedByNothing(22, 5))  # noqa: E731
    examples = drawn(made(), 100)
    delivered = watch(made()).run()
    plan = examples.plan
    assert plan.account().frame["value"].to_dict() == delivered.account.frame["value"].to_dict()
    assert plan.account().total == delivered.account.total
    assert [len(batch) for batch in plan.batches] == examples.sizes == [5, 5, 5, 5, 2]
    again = [examples.make_batch([np.atleast_1d(row) for row in batch], plan.lengths) for batch in plan.batches]
    assert all(map(equal, again, examples.batches))
    assert plan.lengths["input_length"].tolist() == [len(item) for item in examples.items]


def test_the_plan_knows_the_usual_size():
    assert drawn(unshuffled(batch_size=5), 100).plan.limits["batch_size"] == 5


def test_batches_without_masks():
    dense = DataLoader(Texts([6] * 8), batch_size=4, collate_fn=lambda items: {"x": torch.stack(items)})
    examples = drawn(dense, 2)
    assert examples.watched is None
    assert examples.why_unseen.startswith("padding is not visible in this batch")
    assert len(examples.batches) == 2
    with pytest.raises(ValueError, match="padding is not visible in this batch"):
        examples.plan  # noqa: B018


def test_batches_with_other_rows_than_examples():
    """Each example makes two rows: lengths are no longer the examples'."""
    doubled = DataLoader(Texts([3, 6, 2, 5]), batch_size=2, collate_fn=lambda items: padded(items * 2))
    examples = drawn(doubled, 2)
    assert examples.watched is None
    assert examples.why_unseen == "the batches have other rows than their examples: padding is not visible"


def test_seen_batches_have_nothing_unseen():
    examples = drawn(unshuffled(), 2)
    assert examples.why_unseen == ""
    assert examples.watched.account.total == sum(batch["input_ids"].numel() for batch in examples.batches)


# Rebuilt


def test_rebuilt_without_changes_delivers_the_same():
    original = loader(LENGTHS, batch_sampler=GroupedByNothing(22, 5))
    again = rebuilt(original)
    assert all(map(equal, again, original))
    assert again.dataset is original.dataset
    assert again.batch_sampler is original.batch_sampler
    assert len(again) == len(original)


def test_other_batches():
    original = unshuffled()
    other = rebuilt(original, batch_sampler=[[5, 6], [7]])
    assert [len(batch["input_ids"]) for batch in other] == [2, 1]
    larger = rebuilt(original, batch_sampler=None, batch_size=8, sampler=original.sampler)
    assert [len(batch["input_ids"]) for batch in larger] == [8, 8, 6]
    assert equal(next(iter(larger)), padded(original.dataset.items[:8]))


def test_processes_stay_where_there_are_some():
    more = rebuilt(unshuffled(pin_memory=False, timeout=0), num_workers=2)
    assert more.num_workers == 2
    assert more.persistent_workers
    assert not rebuilt(more, num_workers=0).persistent_workers
    assert not rebuilt(more, persistent_workers=False).persistent_workers


def test_arguments_are_carried_over():
    def start(_):
        pass

    own = torch.Generator()
    original = unshuffled(num_workers=2, timeout=3, worker_init_fn=start, generator=own, multiprocessing_context="fork")
    again = rebuilt(original)
    assert (again.timeout, again.worker_init_fn, again.generator) == (3, start, own)
    assert again.multiprocessing_context.get_start_method() == "fork"
    assert again.collate_fn is padded


@pytest.mark.parametrize("name", ["drop_last", "prefetch_factor"])
def test_what_else_should_be_carried_over(name):
    original = unshuffled(num_workers=2, drop_last=True, prefetch_factor=5)
    larger = rebuilt(original, batch_sampler=None, batch_size=8, sampler=original.sampler)
    assert getattr(larger, name) == getattr(original, name)


def test_the_original_is_as_it_was():
    original = unshuffled()
    before = dict(vars(original))
    rebuilt(original, num_workers=1, batch_sampler=[[0]])
    assert vars(original) == before
