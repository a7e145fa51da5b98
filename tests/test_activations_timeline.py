"""Timelines: arithmetic on a step that was followed equals the step that was not."""

import numpy as np
import pytest
import torch
from activation_models import SMALL, made_timeline
from hypothesis import given
from hypothesis import strategies as st

from effkit import models
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import Levers
from effkit.activations.timeline import CATEGORIES, rows_at

torch.set_num_threads(1)
SAVED, WORK = CATEGORIES.index("saved activation"), CATEGORIES.index("workspace")


@pytest.fixture(scope="module")
def forecaster():
    gpt = models.gpt(layers=2, **SMALL)
    found = Forecaster(gpt, gpt.random_batch(5, 64))
    found.runs_operators = False
    return found


@pytest.mark.parametrize("states", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("levers", [{"checkpoint_every": 1}, {"micro_batches": 3}, {"compress": "int8"}], ids=str)
def test_another_optimizer_put_in_equals_a_replay_of_both_op_by_op(forecaster, levers, states):
    both = Levers(**levers, optimizer_states=states)
    joined = forecaster.timeline(forecaster.size, both)
    direct = forecaster.replayer.replay(forecaster.batch(forecaster.size), both)
    assert joined.ops == direct.ops
    assert joined.phases == direct.phases
    assert joined.signatures == direct.signatures
    assert (joined.work == direct.work).all()
    assert (joined.aside == direct.aside).all()
    assert (joined.levels() == direct.levels()).all()
    assert joined.resident_bytes == direct.resident_bytes
    plain = forecaster.timeline(forecaster.size, Levers(**levers))
    assert joined.ops != plain.ops


@pytest.mark.parametrize("parts", [2, 3, 5])
def test_operators_of_two_micro_batches_stand_for_those_of_all(forecaster, parts):
    two, all_of_them = (forecaster.replayer for _ in range(2))
    batch = forecaster.batch(forecaster.size)
    seen = two.replay(batch, Levers(micro_batches=parts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("effkit.activations.fake_step._MOST_PARTS", None)
        whole = all_of_them.replay(batch, Levers(micro_batches=parts))
    count = seen.times_run(parts)
    assert set(count) == ({1, parts - 1} if parts > 2 else {1})
    own = [sum(c for c, aside in zip(count, seen.aside, strict=True) if not aside), sum(~whole.aside)]
    assert own[0] == pytest.approx(own[1], rel=0.02)
    peaks = [one.levels().sum(axis=0).max() for one in (seen, whole)]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.002)  # the replay holds on to indices of each part


def test_a_step_without_micro_batches_runs_each_operator_once(forecaster):
    assert set(forecaster.timeline(forecaster.size, Levers()).times_run(1)) == {1}


# Made up


MADE = made_timeline(
    ["mm", "pack", "relu", "loss", "unpack", "mm", "mm", "adam", "adam"],
    [(100, 0, 6, "saved activation"), (40, 1, 2, "workspace"), (25, 3, 9, "gradient"), (7, 5, 7, "workspace")],
    firsts=(0, 3, 7), aside=[False, True, False, False, True, False, False, False, False],
    inside=[0, 0, 0, 0, 500, 0, 3, 0, 0], resident={"parameter": 1000},
)  # fmt: skip


def test_levels_are_those_of_the_allocations_that_are_alive():
    levels = MADE.levels()
    assert levels[SAVED].tolist() == [100] * 6 + [0] * 3
    assert levels[WORK].tolist() == [0, 40, 0, 0, 500, 7, 7 + 3, 0, 0]
    assert levels.sum(axis=0).tolist() == [1100, 1140, 1100, 1125, 1625, 1132, 1035, 1025, 1025]
    assert rows_at(levels[:, 1]) == {"parameter": 1000, "saved activation": 100, "workspace": 40}


def test_what_runs_aside_counts_with_the_operator_before_it():
    main = MADE.main_levels()
    assert MADE.main_ops == ("mm", "relu", "loss", "mm", "mm", "adam", "adam")
    assert main.sum(axis=0).tolist() == [1140, 1100, 1625, 1132, 1035, 1025, 1025]
    assert main.sum(axis=0).max() == MADE.levels().sum(axis=0).max()


def test_every_operator_has_its_phase():
    assert MADE.phases == ["forward"] * 3 + ["backward"] * 4 + ["optimizer"] * 2


def test_what_is_retained_was_made_in_forward():
    assert MADE.retained["size_bytes"].tolist() == [100]


def test_the_gradients_live_as_long_as_the_other_optimizer_works():
    other = made_timeline(["mm", "loss", "a", "b", "c"], [(9, 2, 4, "workspace"), (5, 0, 5, "gradient")],
                          firsts=(0, 1, 2), resident={"parameter": 1000, "optimizer state": 30})  # fmt: skip
    joined = MADE.with_optimizer_of(other)
    assert joined.ops == (*MADE.ops[:7], "a", "b", "c")
    levels = joined.levels()
    assert levels[CATEGORIES.index("gradient")].tolist() == [0] * 3 + [25] * 7
    assert levels[WORK].tolist() == [0, 40, 0, 0, 500, 7, 10, 9, 9, 0]
    assert (levels[CATEGORIES.index("optimizer state")] == 30).all()


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 8), st.integers(1, 9)), max_size=20))
def test_levels_are_the_sum_over_whatever_lives(spans):
    allocations = [(size, birth, min(9, birth + life), "workspace") for size, birth, life in spans]
    expected = [sum(size for size, birth, death, _ in allocations if birth <= op < death) for op in range(9)]
    levels = made_timeline(["op"] * 9, allocations).levels()
    assert levels.sum(axis=0).tolist() == expected
    assert (np.delete(levels, WORK, axis=0) == 0).all()
