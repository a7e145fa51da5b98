"""Imbalance is taken per step, on experts and on their ranks; a placement hands over what evens it out."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from effkit.account import Account
from effkit.moe.loads import balanced_placement, imbalance


def by_hand(tokens: list[list[float]]) -> dict[str, float]:
    """The figures of tokens [num_steps, num_members], in plain Python."""
    ratios, spreads, idle = [], [], []
    for step in tokens:
        mean = sum(step) / len(step)
        ratios.append(max(step) / mean)
        spreads.append((sum((one - mean) ** 2 for one in step) / len(step)) ** 0.5 / mean)
        idle.append(1 - mean / max(step))
    overall = [sum(member) for member in zip(*tokens, strict=True)]
    return {
        "max_over_mean": sum(ratios) / len(ratios),
        "coefficient_of_variation": sum(spreads) / len(spreads),
        "busiest": overall.index(max(overall)),
        "share_of_busiest_frac": max(overall) / sum(overall),
        "idle_frac": sum(idle) / len(idle),
    }


def test_each_step_counts_before_the_mean_is_taken():
    """Two steps whose peaks are on different ranks: averaged first, they look balanced, and nobody would wait."""
    loads = np.array([[30, 30, 10, 10], [10, 10, 30, 30]])
    found = imbalance(loads, num_ranks=2)
    assert found.loc["rank", "max_over_mean"] == 1.5
    assert found.loc["rank", "idle_frac"] == pytest.approx(1 / 3)
    wrong = imbalance(loads.mean(axis=0, keepdims=True), num_ranks=2)
    assert wrong.loc["rank", "max_over_mean"] == 1.0
    assert wrong.loc["rank", "idle_frac"] == 0.0


@given(arrays.arrays("int64", st.tuples(st.integers(1, 5), st.just(6)), elements=st.integers(1, 999)))
def test_the_figures_are_those_by_hand_and_averaging_first_understates(loads):
    found = imbalance(loads, num_ranks=3)
    assert found.loc["expert"].to_dict() == pytest.approx(by_hand(loads.tolist()))
    ranks = [[sum(step[2 * rank : 2 * rank + 2]) for rank in range(3)] for step in loads.tolist()]
    assert found.loc["rank"].to_dict() == pytest.approx(by_hand(ranks))
    # with equal tokens per step, as top-k routing without dropping gives
    equal = loads / loads.sum(axis=1, keepdims=True)
    first = imbalance(equal.mean(axis=0, keepdims=True), num_ranks=3)
    assert (first["max_over_mean"] <= imbalance(equal, num_ranks=3)["max_over_mean"] + 1e-9).all()


def test_sources_are_summed_and_give_the_number_of_ranks():
    loads = np.arange(2 * 2 * 4).reshape(2, 2, 4)
    found = imbalance(loads)
    assert found.equals(imbalance(loads.sum(axis=1), num_ranks=2))
    assert list(found.index) == ["expert", "rank"]
    assert list(imbalance(loads.sum(axis=1)).index) == ["expert"], "ranks are not known"


def test_a_placement_says_who_holds_what():
    loads = [[8, 1, 1, 8]]
    assert imbalance(loads, owner=(0, 0, 1, 1)).loc["rank", "max_over_mean"] == 1.0
    assert imbalance(loads, owner=(0, 1, 1, 0)).loc["rank", "max_over_mean"] == pytest.approx(16 / 9)
    assert imbalance(loads, owner=(0, 1, 1, 0), num_ranks=4).loc["rank", "busiest"] == 0


def test_an_expert_that_every_rank_holds_takes_each_ranks_own_tokens():
    loads = np.array([[[10, 1, 0], [30, 0, 1]]])  # expert 0 is everywhere
    found = imbalance(loads, owner=(-1, 0, 1))
    assert found.loc["rank", "max_over_mean"] == pytest.approx(31 / 21)
    with pytest.raises(ValueError, match="give the loads as"):
        imbalance(loads.sum(axis=1), owner=(-1, 0, 1))


def test_steps_without_tokens_have_no_imbalance():
    assert imbalance([[3, 1], [0, 0]]).equals(imbalance([[3, 1]]))


def account_of(loads, owner) -> Account:
    calibration = SimpleNamespace(loads=np.array(loads), owner=np.array(owner))
    return Account.of("Step", "ns", {"experts": 1}, total=1, source="a clock", calibration=calibration)


def test_an_account_brings_its_loads_and_owners():
    loads, owner = [[[8, 1, 1, 8], [8, 1, 1, 8]]], [0, 1, 1, 0]
    measured = account_of(loads, owner)
    assert imbalance(measured).equals(imbalance(loads, owner=owner))
    assert imbalance(measured, owner=(0, 0, 1, 1)).loc["rank", "max_over_mean"] == 1.0
    assert balanced_placement(measured, 2) == balanced_placement(loads, 2)
    with pytest.raises(ValueError, match="holds no loads"):
        imbalance(Account.of("Step", "ns", {"experts": 1}, total=1, source="a clock"))


@st.composite
def loads_and_ranks(draw):
    num_ranks, each = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    shape = (draw(st.integers(1, 4)), num_ranks * each)
    loads = draw(arrays.arrays("int64", shape, elements=st.integers(0, 1000)).filter(lambda array: array.any()))
    return loads, num_ranks


@given(loads_and_ranks())
def test_a_balanced_placement_is_never_worse_than_blocks(drawn):
    loads, num_ranks = drawn
    placed = balanced_placement(loads, num_ranks)
    each = loads.shape[1] // num_ranks
    assert np.bincount(placed, minlength=num_ranks).tolist() == [each] * num_ranks
    mean = loads.mean(axis=0)
    ours = max(sum(mean[expert] for expert, rank in enumerate(placed) if rank == one) for one in range(num_ranks))
    blocks = max(mean[one * each : (one + 1) * each].sum() for one in range(num_ranks))
    assert ours <= blocks + 1e-9
    assert all(isinstance(rank, int) for rank in placed)


def test_a_balanced_placement_spreads_the_popular():
    popular = 1 / np.arange(1, 17)
    placed = balanced_placement(popular[None], 4)
    assert len({placed[expert] for expert in range(4)}) == 4
    before, after = (imbalance(popular[None] * 1e6, owner=owner) for owner in (np.repeat(range(4), 4), placed))
    assert after.loc["rank", "max_over_mean"] < 0.7 * before.loc["rank", "max_over_mean"]


def test_greedy_gives_way_to_blocks_that_are_better():
    assert balanced_placement([[7, 6, 4, 8, 8, 1]], 2) == (0, 0, 0, 1, 1, 1)  # 17 and 17; the longest first gives 18


@pytest.mark.parametrize(
    ("loads", "options", "said"),
    [
        ([1, 2], {}, r"given: shape \[2\]"),
        (np.zeros((0, 4)), {}, "at least one of each"),
        ([[1, -1]], {}, "none negative"),
        ([[1, float("nan")]], {}, "none missing"),
        ([[0, 0]], {}, "nothing to balance"),
        ([["a", "b"]], {}, "numbers of tokens"),
        ([[1, 2, 3]], {"num_ranks": 2}, "3 experts cannot be shared equally by 2 ranks"),
        ([[1, 2, 3]], {"num_ranks": 0}, "cannot be shared"),
        ([[1, 2, 3]], {"owner": (0, 1)}, "a rank for each of 3 experts"),
        ([[1, 2]], {"owner": (0.5, 1.0)}, "a rank for each"),
        ([[1, 2]], {"owner": (0, 5), "num_ranks": 2}, "owner names ranks 0 to 1"),
        ([[1, 2]], {"owner": (0, -2)}, "owner names ranks"),
        (np.ones((1, 2, 4)), {"num_ranks": 4}, "the loads are of 2 ranks"),
    ],
)
def test_bad_loads_are_refused_in_one_sentence(loads, options, said):
    with pytest.raises(ValueError, match=said) as error:
        imbalance(loads, **options)
    assert "\n" not in str(error.value)


def test_a_placement_needs_equal_numbers_of_experts():
    with pytest.raises(ValueError, match="4 experts cannot be shared equally by 3 ranks"):
        balanced_placement([[1, 2, 3, 4]], 3)
