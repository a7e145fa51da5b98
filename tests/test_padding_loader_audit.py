"""watch(): what a loader delivers, counted by hand, and the sentences it finds; account() of what was recorded."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from effkit.captured import Capture
from effkit.padding import account, plan, watch

BATCHES = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), min_size=1, max_size=10)
GROUPED = np.sort(np.random.default_rng(0).integers(20, 400, 640)).reshape(40, 16)
SHUFFLED = np.random.default_rng(1).permutation(GROUPED.ravel()).reshape(40, 16)


def masked(lengths):
    mask = torch.arange(max(lengths)) < torch.as_tensor(lengths)[:, None]
    return {"attention_mask": mask.long()}


def delivered(*batches):
    return [masked(list(batch)) for batch in batches]


def only(findings, words):
    return [sentence for sentence in findings if words in sentence]


# Nothing is changed


def test_batches_pass_through_unchanged():
    batches = delivered([3, 1], [5, 5, 2])
    before = [batch["attention_mask"].clone() for batch in batches]
    seen = list(watch(batches))
    assert all(one is other for one, other in zip(seen, batches, strict=True))
    assert all(torch.equal(one["attention_mask"], mask) for one, mask in zip(seen, before, strict=True))


def test_it_stands_in_for_a_real_loader():
    loader = DataLoader([3, 1, 4, 1, 5, 9], batch_size=2, collate_fn=masked)
    watched = watch(loader)
    assert len(watched) == len(loader) == 3
    for _ in range(2):  # every epoch is watched anew
        assert [batch["attention_mask"].shape[1] for batch in watched] == [3, 4, 9]
        assert watched.lengths["input_length"].tolist() == [3, 1, 4, 1, 5, 9]


def test_only_so_many_batches():
    watched = watch(delivered([3, 1], [5, 2], [9, 9]), num_batches=2)
    assert len(list(watched)) == 2
    assert watched.account.total == 6 + 10
    assert watched.account.setting == {"num_batches": 2}


def test_no_more_is_drawn_than_asked_for():
    source = iter(delivered([3], [5], [9]))
    watch(source, num_batches=2).run()
    assert len(list(source)) == 1


# The account against a hand count


@given(BATCHES, st.booleans())
def test_masks(batches, left):
    def side(batch):
        return {"attention_mask": batch["attention_mask"].flip(1) if left else batch["attention_mask"]}

    counted = watch([side(masked(batch)) for batch in batches]).run().account.closed()
    assert counted.frame.loc["real", "value"] == sum(map(sum, batches))
    assert counted.total == sum(len(batch) * max(batch) for batch in batches)


@pytest.mark.parametrize("name", ["input_lengths", "lengths", "length"])
def test_lengths_beside_a_padded_tensor(name):
    batch = {name: torch.tensor([3, 5]), "input_features": torch.zeros(2, 8, 80)}
    counted = watch([batch]).run().account
    assert counted.frame["value"].to_dict() == {"real": 8, "padding": 8}
    assert watch([{name: [3, 5]}]).run().account.total == 10


def test_a_block_mask_of_packed_rows():
    """Documents of 2 and 3 cells in a row of 6: the sixth cell is padding."""
    owner = torch.tensor([[0, 0, 1, 1, 1, -1]])
    mask = ((owner[:, :, None] == owner[:, None, :]) & (owner >= 0)[:, :, None]).tril()[:, None]
    assert watch([{"attention_mask": mask}]).run().account.frame["value"].to_dict() == {"real": 5, "padding": 1}


def test_labels_are_outputs_where_they_are_not_ignored():
    labels = torch.tensor([[7, 7, -100], [7, -100, -100]])
    watched = watch([masked([4, 2]) | {"labels": labels}]).run()
    assert watched.frame.loc[0].to_dict() == {
        "num_rows": 2, "input_length": 4, "input_real": 6, "output_length": 3, "output_real": 3,
    }  # fmt: skip
    expected = pd.DataFrame({"input_length": [4, 2], "output_length": [2, 1]})
    pd.testing.assert_frame_equal(watched.lengths, expected)


def test_objects_with_attributes_and_numpy_arrays():
    batch = SimpleNamespace(attention_mask=np.array([[1, 1, 1], [1, 0, 0]]))
    assert watch([batch]).run().account.frame["value"].to_dict() == {"real": 4, "padding": 2}


def test_what_was_watched_can_be_planned_better():
    watched = watch(delivered(*SHUFFLED)).run()
    better = plan(watched.lengths, "bucket", batch_size=16, num_buckets=10)
    assert better.account().share["padding"] < watched.account.share["padding"] / 2


# What is found


def test_shuffled_batches_mean_that_grouping_does_nothing():
    (sentence,) = watch(delivered(*SHUFFLED)).run().findings
    padding = 1 - SHUFFLED.sum() / (16 * SHUFFLED.max(axis=1).sum())
    assert sentence.startswith(f"length grouping does nothing here: {padding:.1%} of the cells are padding")


def test_grouped_batches_mean_that_it_does_something():
    shuffled_steps = np.random.default_rng(2).permutation(GROUPED)
    assert only(watch(delivered(*shuffled_steps)).run().findings, "grouping") == []


def test_equal_lengths_need_no_grouping():
    assert watch(delivered(*[[7] * 4] * 30)).run().findings == []


def test_a_batch_beyond_its_budget_is_named_with_its_factor():
    watched = watch(delivered([100] * 4, [250] * 4, [60] * 6), budget_cells=400).run()
    (sentence,) = only(watched.findings, "budget")
    assert sentence.startswith("1 of 3 batches exceed their own budget of 400 cells, the worst by 2.50x")
    assert only(watch(delivered([100] * 4, [50] * 8), budget_cells=400).run().findings, "budget") == []


def test_a_draining_packer_is_named():
    full = [[500, 500]] * 57
    (sentence,) = only(watch(delivered(*full, [500], [250], [250])).run().findings, "drain")
    assert sentence.startswith("the last 3 batches hold 33% of the usual cells")
    assert only(watch(delivered(*full, *full[:3])).run().findings, "drain") == []


def test_full_batches_of_grouped_lengths_drain_nothing():
    epochs = [np.random.default_rng(seed).permutation(GROUPED) for seed in range(20)]
    alarms = [seed for seed, epoch in enumerate(epochs) if only(watch(delivered(*epoch)).run().findings, "drain")]
    assert len(alarms) <= 1


def test_findings_stand_in_the_repr():
    watched = watch(delivered(*SHUFFLED), budget_cells=10)
    assert repr(watched) == "Watch of a loader, nothing drawn yet"
    lines = repr(watched.run()).splitlines()
    assert [line[:4] for line in lines[-2:]] == ["  ! ", "  ! "]
    assert lines[0].startswith("Input cells watched:")


# What cannot be seen is not guessed


@pytest.mark.parametrize("batch", [{"input_ids": torch.ones(2, 3)}, torch.ones(2, 3), SimpleNamespace(x=1)])
def test_no_mask_and_no_lengths(batch):
    with pytest.raises(ValueError, match=r"padding is not visible in this batch.*Let the collate function return"):
        watch([batch]).run()


@pytest.mark.parametrize("name", ["frame", "account", "lengths", "findings"])
def test_nothing_watched_yet(name):
    with pytest.raises(ValueError, match=r"nothing watched yet: .*\.run\(\)"):
        getattr(watch([]), name)


# account() of whatever was recorded


@given(BATCHES)
def test_plain_data_and_a_watch_and_a_capture_agree(batches):
    capture = Capture(pd.DataFrame(), provenance={"settings": {"batches": batches}})
    recorded = [account(batches), account(watch(delivered(*batches)).run()), account(capture)]
    assert {one.total for one in recorded} == {sum(len(batch) * max(batch) for batch in batches)}
    assert {int(one.frame.loc["real", "value"]) for one in recorded} == {sum(map(sum, batches))}


def test_the_account_of_a_plan():
    made = plan(pd.DataFrame({"input_length": [9, 1, 8, 2]}), "sorted", batch_size=2)
    assert account(made).frame["value"].to_dict() == {"real": 20, "padding": 2}
    assert account(made, "input_squared").total == 2 * 4 + 2 * 81


def test_account_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"padding is not visible in this capture.*Record it with"):
        account(Capture(pd.DataFrame()))
    with pytest.raises(ValueError, match="only a plan knows 'flops' cells"):
        account([[1, 2]], "flops")
    for nothing in ([], [[1], []]):
        with pytest.raises(ValueError, match="one non-empty array of input lengths per batch"):
            account(nothing)
