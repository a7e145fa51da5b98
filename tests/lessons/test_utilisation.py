"""MegaScale's table from its own iteration times, its bubble; and low-rank adapters."""

import pytest
import torch

import effkit as ek
from lessons import utilisation
from lessons.low_rank import LowRank, adapted


def test_flops_of_a_token_are_those_that_a_hand_counts():
    # per layer 12 h² weights, 2 FLOPs each, backward twice forward; scores and values: 2 products of s h, 2 FLOPs each
    layers, h, s, vocabulary = 96, 12_288, 2048, 64_000
    weights = 3 * 2 * (layers * 12 * h * h + vocabulary * h)
    assert utilisation.flops_per_token().total == weights + 3 * 2 * 2 * layers * s * h
    assert utilisation.flops_per_token("causal").total == weights + 3 * 2 * layers * s * h
    for how in ("full", "causal"):
        assert utilisation.flops_per_token(how).closed().residual == 0
    with pytest.raises(ValueError, match="attention is 'half', expected 'full' or 'causal'"):
        utilisation.flops_per_token("half")


def test_mfu_closes_within_three_tenths_of_a_point_where_the_table_agrees_with_itself():
    table = utilisation.megascale()
    assert len(table) == 16
    closing = table[table["consistent"]]
    assert closing["gap_frac"].abs().max() < 0.003
    assert table.index[~table["consistent"]].to_list() == [("MegaScale", 768)]
    assert abs(table.loc[("MegaScale", 768), "gap_frac"]) > 0.003, "and the row that does not agree does not close"
    assert table.groupby("system")["fits"].first().to_dict() == {"MegaScale": "causal", "Megatron-LM": "full"}


def test_throughputs_are_batch_over_time():
    table = utilisation.megascale()
    assert (table["tokens_per_s"] / table["published_tokens_per_s"] - 1).abs().max() < 0.005


def test_the_headline_rate_contradicts_its_own_utilisation():
    headline = utilisation.megascale().loc[("MegaScale", 12288)]
    assert headline["rate_mfu_frac"] - headline["published_mfu_frac"] == pytest.approx(0.013, abs=1e-3)


def test_the_bubble_does_not_close():
    assert utilisation.bubbles(4).share["saved"] == 0.75 != utilisation.PUBLISHED_BUBBLE_SAVED_FRAC
    assert utilisation.bubbles(8).share["saved"] == utilisation.PUBLISHED_BUBBLE_SAVED_FRAC
    assert utilisation.bubbles(1).share["saved"] == 0
    with pytest.raises(ValueError, match="batch_factor is 0"):
        utilisation.bubbles(0)


def test_adapters_begin_as_the_model_and_alone_learn():
    model = ek.models.vision()
    few = adapted(model, rank=2)
    batch = model.random_batch(2)
    torch.testing.assert_close(few.eval()(**batch).logits, model.eval()(**batch).logits)
    learning = {name for name, parameter in few.named_parameters() if parameter.requires_grad}
    assert learning
    assert all(name.endswith((".up", ".down")) for name in learning)
    assert all(parameter.requires_grad for parameter in model.parameters()), "the model given stays as it was"
    few(**batch).loss.backward()
    assert {name for name, parameter in few.named_parameters() if parameter.grad is not None} == learning


def test_an_adapter_adds_a_product_of_low_rank():
    linear = torch.nn.Linear(6, 4)
    one = LowRank(linear, 2)
    one.up.data.normal_()
    x = torch.randn(3, 6)
    torch.testing.assert_close(one(x), x @ (linear.weight + one.up @ one.down).T + linear.bias)
    for rank in (0, 5):
        with pytest.raises(ValueError, match=f"rank is {rank}, expected 1 to 4"):
            LowRank(torch.nn.Linear(6, 4), rank)
    with pytest.raises(ValueError, match="ReLU has no linear layer"):
        adapted(torch.nn.ReLU())
