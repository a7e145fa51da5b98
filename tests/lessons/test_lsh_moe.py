"""LSH-MoE: its speed-ups recounted; what training with it is worth is reported as it comes."""

import numpy as np
import pytest
import torch

from lessons.lsh_moe import compare_training, lsh_moe

TINY = {"num_tokens": 64, "hidden": 16, "ffn": 16, "num_clusters": 8}


def test_lsh_moe_closes_for_gpt_and_not_for_swin():
    table = lsh_moe()
    assert table["published"].tolist() == [1.3, 1.6, 1.28]
    assert abs(table["error"]["GPT"]) < 0.02
    assert abs(table["error"]["RoBERTa"]) < 0.10
    assert table["recomputed"]["Swin"] == pytest.approx(2.62, abs=0.01)
    assert table["error"]["Swin"] > 1
    again = 1 / (1 - table["share_frac"] + table["share_frac"] * table["implied_sent_frac"])
    assert again.tolist() == pytest.approx(table["published"].tolist())
    assert (table["published"] < table["limit"]).all()


def test_each_way_to_train_is_run_each_way():
    ways = ["none", "lsh", "lsh + residual"]
    found = compare_training(num_steps=3, num_seeds=2, **TINY)
    assert found.index.tolist() == [(trained, run) for trained in ways for run in ways]
    assert list(found.columns) == ["loss_frac", "loss_spread_frac", "output_error_frac", "output_error_spread_frac",
                                   "sent_frac"]  # fmt: skip
    plain, lossy = found.xs("none", level="run"), found.drop("none", level="run")
    assert (plain[["output_error_frac", "output_error_spread_frac"]] == 0).all(axis=None)
    assert (plain["sent_frac"] == 1).all()
    assert (lossy["output_error_frac"] > 0).all()
    assert (lossy["sent_frac"] < 1).all()
    assert found.equals(compare_training(num_steps=3, num_seeds=2, **TINY))


def test_spreads_are_over_seeds():
    each = [compare_training(num_steps=2, num_seeds=1, seed=seed, **TINY) for seed in (5, 6)]
    both = compare_training(num_steps=2, num_seeds=2, seed=5, **TINY)
    losses = np.array([one["loss_frac"] for one in each])
    assert both["loss_frac"].to_numpy() == pytest.approx(losses.mean(axis=0))
    assert both["loss_spread_frac"].to_numpy() == pytest.approx(losses.std(axis=0, ddof=1))
    assert each[0]["loss_spread_frac"].isna().all()


def test_training_learns_and_compensation_belongs_into_it():
    found = compare_training(num_steps=150, num_seeds=1)
    loss, error = found["loss_frac"], found["output_error_frac"]
    assert (found.xs("none", level="run")["loss_frac"] < 0.05).all()
    assert loss["lsh", "lsh + residual"] > 1.15 * loss["lsh", "lsh"], "added after training"
    assert 1.5 < error["lsh", "lsh + residual"] / error["lsh", "lsh"] < 3.5
    assert error["lsh + residual", "lsh + residual"] < error["lsh", "lsh + residual"]


def test_training_leaves_the_callers_mode_alone():
    with torch.no_grad():
        trained = compare_training(num_steps=2, num_seeds=1, **TINY)
        assert not torch.is_grad_enabled()
    assert trained.loc[("lsh", "none"), "loss_frac"] != trained.loc[("none", "none"), "loss_frac"]


@pytest.mark.parametrize("wrong", [{"num_steps": 0}, {"num_seeds": 0}])
def test_no_training_is_refused_in_a_sentence(wrong):
    with pytest.raises(ValueError, match="num_steps and num_seeds are at least 1; given"):
        compare_training(**wrong)
