"""Settings and routing: who goes where, exactly, and what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effkit import moe
from effkit.moe import routing

S = moe.Setting


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_tokens": 0}, "num_tokens is a whole number from 1 on; given: 0"),
        ({"skew": -1.0}, "skew is a number from 0 on; given: -1.0"),
        ({"compress": "zip"}, "compress is one of none, lsh; given: 'zip'"),
        ({"message_dtype": "int4"}, "message_dtype is one of same, bfloat16, float8"),
        ({"placement": "best"}, "placement is one of block, balanced, or a rank per expert"),
        ({"placement": (0, 1)}, "placement names a rank for each expert; given: 2 ranks for 8 experts"),
        ({"top_k": 9}, "top_k is at most the number of experts to choose from, 8; given: 9"),
        ({"num_modalities": 3}, "num_experts is a multiple of num_modalities"),
        ({"pad": True}, "pad fills every expert up to its capacity: give a capacity_factor"),
        ({"pad": True, "capacity_factor": 1.0, "compress": "lsh"}, "choose one"),
        ({"message_dtype": "float8", "hidden": 100}, "hidden is a multiple of 128"),
        ({"num_replicas": 9}, "num_replicas is at most num_experts"),
        ({"tokens": 1}, "no such knob: tokens; the knobs are num_tokens, hidden"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_in_one_sentence(change, words):
    with pytest.raises(ValueError, match=words):
        S().change(**change)


def test_a_setting_survives_json():
    setting = S(num_tokens=7, placement=(0, 1) * 4, skew=0.25)
    assert S.of(setting.plain()) == setting


SETTINGS = st.builds(
    S, num_tokens=st.integers(1, 60), hidden=st.just(8), num_experts=st.sampled_from([4, 8]), top_k=st.integers(1, 2),
    capacity_factor=st.sampled_from([0.0, 0.5, 1.0]), skew=st.floats(0, 2), num_modalities=st.sampled_from([1, 2]),
    num_clusters=st.sampled_from([0, 5]), compress=st.sampled_from(["none", "lsh"]),
    num_replicas=st.sampled_from([0, 2]), seed=st.integers(0, 5),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(SETTINGS, st.integers(0, 3))
def test_no_copy_is_lost(setting, step):
    seen = routing.traffic(setting, 2, step)
    assert (seen.routed.sum(axis=1) == setting.num_tokens * setting.top_k).all()
    assert (seen.kept <= routing.capacity(setting)).all()
    assert (seen.dropped == (seen.routed - seen.kept).sum(axis=1)).all()
    assert (seen.rows <= seen.kept).all()
    assert ((seen.rows > 0) == (seen.kept > 0)).all()
    assert seen.moved.sum() == seen.rows.sum() == sum(seen.held(rank).sum() for rank in range(2))


def test_every_choice_of_a_token_is_another_expert_of_its_modality():
    setting = S(num_tokens=50, num_modalities=2)
    chosen = np.argsort(-routing.scores(setting, 0, 0), axis=1)[:, :2]
    assert (chosen[:, 0] != chosen[:, 1]).all()
    assert (chosen % 2 == np.arange(50)[:, None] % 2).all()


def test_popularity_is_zipfs_law_and_is_drawn():
    setting = S(num_tokens=20_000, top_k=1, skew=1.0)
    expected = routing.popularity(setting)
    assert expected == pytest.approx(np.array([1 / i for i in range(1, 9)]) / sum(1 / i for i in range(1, 9)))
    seen = routing.traffic(setting, 2, 0).routed.sum(axis=0) / 40_000
    assert seen == pytest.approx(expected, abs=0.01)


def test_tokens_of_a_cluster_choose_the_same_experts():
    setting = S(num_tokens=100, num_clusters=3)
    of_token, scores = routing.clusters(setting, 1, 2), routing.scores(setting, 1, 2)
    for cluster in range(3):
        assert len(np.unique(scores[of_token == cluster], axis=0)) == 1


def test_steps_and_ranks_differ_and_repeat():
    first, again = (routing.traffic(S(), 2, 0).routed for _ in range(2))
    assert (first == again).all()
    assert (first != routing.traffic(S(), 2, 1).routed).any()
    assert (first[0] != first[1]).any()


def test_replicas_answer_at_home():
    seen = routing.traffic(S(num_replicas=2, skew=1.0), 2, 0)
    assert (seen.owner == [-1, -1, 0, 0, 0, 1, 1, 1]).all()
    away = seen.rows[0, 5:].sum()
    assert seen.moved[0].tolist() == [seen.rows[0, :5].sum(), away]


def test_a_balanced_placement_evens_out_popularity():
    block, balanced = (routing.traffic(S(skew=1.5, placement=p), 2, 0).moved.sum(axis=0) for p in ("block", "balanced"))
    assert np.ptp(balanced) < np.ptp(block)


def test_a_placement_names_ranks_that_there_are():
    with pytest.raises(ValueError, match="placement names ranks 0 to 1"):
        routing.traffic(S(placement=(0, 1, 2, 0, 1, 2, 0, 1)), 2, 0)
