"""Experts of a model: found, counted token by token, described by one exponent, and left without hooks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import hot_expert
from torch import nn

import effkit as ek
from effkit.advice import experts
from effkit.advice.experts import Experts, layers_of, watched

pytestmark = pytest.mark.usefixtures("one_thread")


def of_loads(loads, **more):
    loads = np.atleast_2d(np.asarray(loads))
    shape = {"num_layers": 1, "num_experts": loads.shape[1], "top_k": 1, "hidden": 8, "ffn": 16, "num_tokens": 1}
    return Experts(**(shape | more), loads=loads, forward_ns=1.0)


def hooks_of(model):
    return sum(len(one._forward_hooks) + len(one._forward_pre_hooks) for one in model.modules())


@pytest.fixture(scope="module")
def mixtral():
    planted = hot_expert().study
    batch = {name: tensor[:4, :16] for name, tensor in next(iter(planted["loader"])).items()}
    return planted["model"], batch


@pytest.fixture(scope="module")
def layer():
    return ek.models.expert_parallel(hidden=16, ffn=24, num_experts=4, top_k=2)


# Popularity and its law, of made-up loads


@pytest.mark.parametrize("exponent", [0.0, 0.35, 1.0, 1.7, 3.0])
@pytest.mark.parametrize("num_experts", [4, 16, 64])
def test_skew_recovers_the_exponent_of_zipf_loads(exponent, num_experts):
    loads = np.round(1e9 * np.arange(1, num_experts + 1) ** -exponent)
    assert of_loads(loads).skew == pytest.approx(exponent, abs=0.026)
    assert of_loads(np.random.default_rng(0).permutation(loads)).skew == of_loads(loads).skew


def test_even_loads_have_no_skew_and_one_expert_for_all_has_the_most():
    assert of_loads([5, 5, 5, 5]).skew == 0
    assert of_loads([100, 0, 0, 0]).skew == 4


@given(
    st.lists(st.lists(st.integers(0, 99), min_size=3, max_size=3), min_size=1, max_size=4).filter(lambda x: np.sum(x))
)
def test_popularity_is_a_share_over_all_steps(loads):
    popularity = of_loads(loads).popularity
    assert popularity.sum() == pytest.approx(1)
    assert popularity * np.sum(loads) == pytest.approx(np.sum(loads, axis=0))


@pytest.mark.parametrize(("loads", "num_ranks", "expected"), [
    ([1, 5, 3, 2], 2, (0, 1, 1, 0)),  # the most popular are experts 1, 2, 3, 0
    ([9, 8, 7, 6], 2, (0, 0, 1, 1)), ([6, 7, 8, 9], 4, (3, 2, 1, 0)), ([4, 4, 4, 4], 2, (0, 0, 1, 1)),
    ([9, 1, 8, 2], 1, (0, 0, 0, 0)),
])  # fmt: skip
def test_placement(loads, num_ranks, expected):
    assert of_loads(loads).placement(num_ranks) == expected


@given(st.lists(st.integers(1, 99), min_size=8, max_size=8), st.sampled_from([1, 2, 4, 8]))
def test_every_rank_holds_as_many(loads, num_ranks):
    placed = of_loads(loads).placement(num_ranks)
    assert np.bincount(placed, minlength=num_ranks).tolist() == [8 // num_ranks] * num_ranks


# A layer of effkit's own


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_loads_of_expert_parallel(top_k):
    layer = ek.models.expert_parallel(hidden=16, ffn=24, num_experts=4, top_k=top_k)
    batches = [layer.random_batch(30, seed)["x"] for seed in (0, 1, 2)]
    seen = watched(layer, [lambda x=x: layer(x) for x in batches])
    assert (seen.num_layers, seen.num_experts, seen.top_k, seen.hidden, seen.ffn) == (1, 4, top_k, 16, 24)
    assert seen.num_tokens == 30
    assert seen.loads.sum(axis=1).tolist() == [30 * top_k] * 3
    for x, loads in zip(batches, seen.loads, strict=True):
        chosen = (x @ layer.gate.weight.T).topk(top_k, dim=-1).indices
        assert torch.bincount(chosen.flatten(), minlength=4).tolist() == loads.tolist()


def test_the_most_uneven_layer_speaks():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.even, self.uneven = (ek.models.expert_parallel(hidden=16, ffn=24, num_experts=4, top_k=1)
                                      for _ in range(2))  # fmt: skip
            with torch.no_grad():
                self.uneven.gate.weight[1:] = 0
                self.uneven.gate.weight[0] = 1

        def forward(self, x):
            return self.uneven(self.even(x).abs())

    model = Two()
    x = model.even.random_batch(50)["x"]
    seen = watched(model, [lambda: model(x)])
    assert seen.num_layers == 2
    assert seen.loads.tolist() == [[50, 0, 0, 0]]
    assert seen.popularity.tolist() == [1, 0, 0, 0]


def test_forward_is_timed_per_step_by_the_clock(layer, monkeypatch):
    clock = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(experts, "time", SimpleNamespace(perf_counter_ns=lambda: next(clock)))
    x = layer.random_batch(10)["x"]
    assert watched(layer, [lambda: layer(x)] * 3).forward_ns == 1000


def test_steps_of_several_forward_passes(layer):
    x = layer.random_batch(10)["x"]
    seen = watched(layer, [lambda: [layer(x), layer(x)]] * 3)
    assert seen.loads.shape == (3, 4)
    assert seen.num_tokens == 20


# Blocks of transformers


def test_layers_are_found(mixtral, layer):
    model, _ = mixtral
    assert [type(one).__name__ for one in layers_of(model)] == ["MixtralSparseMoeBlock"] * 2
    assert layers_of(layer) == [layer]
    assert layers_of(nn.Sequential(nn.Linear(2, 2), layer)) == [layer]


def test_loads_of_mixtral(mixtral):
    model, batch = mixtral
    seen = watched(model, [lambda: model(**batch).loss.backward()] * 2)
    model.zero_grad()
    assert (seen.num_layers, seen.num_experts, seen.top_k, seen.hidden, seen.ffn) == (2, 8, 2, 128, 512)
    tokens = batch["input_ids"].numel()
    assert seen.num_tokens == tokens
    assert seen.loads.sum(axis=1).tolist() == [2 * tokens] * 2
    assert seen.loads[0].tolist() == seen.loads[1].tolist()
    assert seen.forward_ns > 0
    assert seen.popularity.argmax() == 0  # as planted
    assert seen.popularity[0] > 2 / 8


def test_loads_are_what_the_router_says(mixtral):
    model, batch = mixtral
    seen = watched(model, [lambda: model(**batch)])
    with torch.no_grad():
        logits = model(**batch, output_router_logits=True).router_logits
    counts = [torch.bincount(one.topk(2, dim=-1).indices.flatten(), minlength=8) for one in logits]
    worst = max(counts, key=lambda one: one.max())
    assert seen.loads[0].tolist() == worst.tolist()


def test_sizes_of_gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = GptOssForCausalLM(config)
    seen = watched(model, [lambda: model(torch.ones(2, 5, dtype=torch.int64))])
    assert (seen.num_layers, seen.num_experts, seen.top_k, seen.num_tokens) == (1, 4, 2, 10)
    assert (seen.hidden, seen.ffn) == (32, 48)


# Blocks of one's own


class Router(nn.Linear):
    def forward(self, x):
        weights, index = super().forward(x).softmax(-1).topk(2)
        return weights, index


class Block(nn.Module):
    def __init__(self, hidden, ffn, router=Router, bias=False):
        super().__init__()
        self.router = router(hidden, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(hidden, ffn, bias=bias), nn.ReLU(), nn.Linear(ffn, hidden, bias=bias))
            for _ in range(4)
        )

    def forward(self, x):
        self.router(x)
        return sum(expert(x) for expert in self.experts)


def test_a_list_of_experts():
    block = Block(32, 8)
    seen = watched(nn.Sequential(block), [lambda: block(torch.randn(9, 32))] * 2)
    assert (seen.num_layers, seen.num_experts, seen.top_k, seen.num_tokens) == (1, 4, 2, 9)
    assert (seen.hidden, seen.ffn) == (32, 8)
    assert seen.loads.sum(axis=1).tolist() == [18, 18]


@pytest.mark.parametrize("bias", [False, True])
def test_a_list_of_experts_that_are_wider_inside(bias):
    block = Block(8, 32, bias=bias)
    seen = watched(block, [lambda: block(torch.randn(9, 8))])
    assert (seen.hidden, seen.ffn) == (8, 32)


def test_a_router_that_does_not_show_its_choice():
    block = Block(8, 32, router=nn.Linear)
    assert watched(block, [lambda: block(torch.randn(9, 8))]) is None
    assert hooks_of(block) == 0


# Nothing else


@pytest.mark.parametrize("model", [
    nn.Linear(3, 3), nn.Sequential(nn.ReLU()), ek.models.text(layers=1, hidden=32), nn.ModuleDict({"gate": nn.ReLU()}),
], ids=["linear", "sequential", "text", "a gate without experts"])  # fmt: skip
def test_no_experts(model):
    ran = []
    assert layers_of(model) == []
    assert watched(model, [lambda: ran.append(1)]) is None
    assert ran == []


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_removed(mixtral, layer, fails):
    for model, run in ((mixtral[0], lambda: mixtral[0](**mixtral[1])), (layer, lambda: layer(torch.ones(3, 16)))):
        before = hooks_of(model)
        during = []

        def step(model=model, run=run, during=during):
            during.append(hooks_of(model))
            run()
            if fails:
                raise KeyError("the step's own")

        if fails:
            with pytest.raises(KeyError):
                watched(model, [step])
        else:
            watched(model, [step])
        assert during[0] > before
        assert hooks_of(model) == before
