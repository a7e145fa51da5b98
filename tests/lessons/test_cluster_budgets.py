"""Budgets on paper: tokens, FLOPs, copies and forwards; and contexts that are knotted."""

import numpy as np
import pytest

from lessons.cluster import budgets, knots


def test_an_answer_reads_weights_and_cache_for_every_token():
    decoder = budgets.Decoder(weights_bytes=1000, cache_bytes_per_token=10, bytes_per_s=1e9)
    # 3 tokens after a question of 5: caches of 5, 6 and 7 tokens
    assert decoder.answer_ns(5, 3) == 3 * 1000 + 10 * (5 + 6 + 7)


def test_answers_are_compared_with_those_of_megascience():
    table = budgets.answers()
    assert table.loc["MegaScience", ["times_tokens", "times_time"]].tolist() == [1, 1]
    assert table.loc["MegaScience", "training_tokens"] == 1_250_000 * 821
    long = table.loc["long chains (assumed)"]
    assert long["times_time"] > long["answer_tokens"] / 721  # the cache makes long answers dearer per token
    with pytest.raises(ValueError, match="at least 1 token"):
        budgets.answers({"empty": 0})


def test_six_n_d_and_what_it_multiplies_to():
    flops = budgets.training_flops(budgets.OURS).closed()
    assert flops.total == 6 * 17e9 * 20e9 / 1e15
    assert set(flops.frame["basis"]) == {"derived"}
    assert set(budgets.training_flops(budgets.OURS, "active").frame["basis"]) == {"assumed"}
    fewer = budgets.recipes()["times_fewer"]
    assert fewer["FLOPs, all parameters"] == pytest.approx(5.5 * 1.7)
    assert fewer["FLOPs, active parameters"] == pytest.approx(5.5 * 15 / 13)
    with pytest.raises(ValueError, match="'all' or 'active'"):
        budgets.training_flops(budgets.OURS, "some")


def test_the_ledger_of_preferences():
    ledger = budgets.preference_ledger(sampling_steps=10, used_steps=4)
    assert ledger["model_copies"].tolist() == [3, 2, 2]
    assert ledger.loc["reward model", "forwards"] == 2 * (10 + 1 + 4 * 4)
    assert ledger.loc["Inversion-DPO", "forwards"] == 2 * (10 + 4 * 4)
    assert ledger.loc["Diffusion-DPO", "forwards"] == 2 * 4  # one noise level, and nothing before
    assert (ledger["forwards"] == ledger[["sampling", "scoring", "training"]].sum(axis="columns")).all()
    with pytest.raises(ValueError, match="used_steps is 11"):
        budgets.preference_ledger(sampling_steps=10, used_steps=11)


def test_targets_of_pictures():
    table = budgets.picture_targets()
    assert table.loc[1024, "vae_tokens"] == (1024 // 16) ** 2
    assert table.loc[1024, "times_tokens"] == 64
    assert table.loc[1024, "times_pairs"] == 64**2
    assert table["clip_numbers"].nunique() == 1
    assert table.loc[256, "clip_numbers"] > table.loc[256, "vae_numbers"]
    with pytest.raises(ValueError, match="at least one patch of 16"):
        budgets.picture_targets((8,))


@pytest.fixture(scope="module")
def packed():
    return knots.packed(16_384, mean_tokens=1000, seed=2)


def test_a_packed_context_is_full_and_its_pairs_are_near(packed):
    assert packed.account().closed().share["padding"] == 0
    place, document = packed.positions()
    assert (place == np.arange(16_384)).all()
    assert (np.diff(document) >= 0).all()
    assert knots.distances(packed).max() < packed.chunks["num_tokens"].max()


@pytest.mark.parametrize("seed", range(3))
def test_knots_move_chunks_and_keep_every_token_and_order(packed, seed):
    knotted = knots.knotted(packed, chunk_tokens=200, seed=seed)
    assert knotted.account().closed().share["real"] == 1
    by_document = knotted.chunks.groupby("document")
    assert by_document["num_tokens"].sum().tolist() == packed.chunks["num_tokens"].tolist()
    assert by_document["part"].apply(lambda parts: list(parts) == list(range(len(parts)))).all()
    assert knotted.chunks["num_tokens"].max() <= 200
    assert knots.distances(knotted).mean() > 2 * knots.distances(packed).mean()


def test_chunks_longer_than_documents_leave_them_whole(packed):
    knotted = knots.knotted(packed, chunk_tokens=16_384)
    assert sorted(knotted.chunks["num_tokens"]) == sorted(packed.chunks["num_tokens"])
    assert np.sort(knots.distances(knotted)).mean() == pytest.approx(knots.distances(packed).mean(), rel=0.02)


def test_markers_take_the_place_of_tokens_at_the_end(packed):
    marked = knots.knotted(packed, chunk_tokens=200, num_markers=4)
    account = marked.account().closed()
    assert account.frame.loc["markers", "value"] == 4 * len(marked.chunks)
    assert account.frame["value"].min() >= 0
    assert account.frame.loc["padding", "value"] < 4
    assert marked.positions()[0].max() < 16_384


def test_mean_distance_of_one_document_by_hand():
    one = knots.packed(300, mean_tokens=10**9)  # cut to the context
    far = knots.distances(one, num_pairs=200_000)
    assert far.min() >= 1
    assert far.mean() == pytest.approx(301 / 3, rel=0.02)


def test_contexts_that_cannot_be(packed):
    with pytest.raises(ValueError, match="at least 1 each"):
        knots.packed(0)
    with pytest.raises(ValueError, match="at least 1 and 0"):
        knots.knotted(packed, chunk_tokens=0)
