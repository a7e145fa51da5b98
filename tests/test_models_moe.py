"""The layer equals one that asks every expert token by token, in all its forms; here on one rank."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from effkit import models
from effkit.models import lsh
from effkit.moe import routing
from effkit.moe.setting import Setting

H, E, K, N = 6, 4, 2, 23
SMALL = {"hidden": H, "ffn": 5, "num_experts": E, "top_k": K, "device": "cpu", "dtype": torch.float64}


def build(**changes):
    return models.expert_parallel(**{**SMALL, **changes})


def inputs(num_tokens=N, hidden=H, seed=0, dtype=torch.float64):
    draw = torch.Generator().manual_seed(seed)
    x, scores, grad = (torch.randn(num_tokens, n, generator=draw, dtype=dtype) for n in (hidden, E, hidden))
    return x.requires_grad_(), scores, grad


def expert(layer, e, row):
    inner = row @ layer.inner[str(e)]
    return (inner * (1 + torch.erf(inner / math.sqrt(2))) / 2) @ layer.outer[str(e)]


def kept_copies(layer, chosen):
    """(token, choice) by expert: first choices of all tokens come before second ones."""
    most = math.inf
    if layer.capacity_factor:
        most = math.ceil(layer.capacity_factor * layer.top_k * len(chosen) / layer.num_experts)
    kept = {e: [] for e in range(layer.num_experts)}
    for choice in range(layer.top_k):
        for token, experts in enumerate(chosen):
            if len(kept[experts[choice]]) < most:
                kept[experts[choice]].append((token, choice))
    return kept


def reference(layer, x, scores=None):
    """What the layer says it does, in loops, differentiated by autograd."""
    logits = x @ layer.gate.weight.T
    chosen = (logits if scores is None else scores).argsort(dim=1, descending=True)[:, : layer.top_k].tolist()
    answers = [torch.zeros(x.shape[1], dtype=x.dtype) for _ in x]
    for e, copies in kept_copies(layer, chosen).items():
        rows = {copy: x[copy[0]] for copy in copies}
        if layer.compress == "lsh":
            bucket = lsh.buckets(x.detach(), lsh.directions(x.shape[1], layer.num_hashes)).tolist()
            groups = {}
            for copy in copies:
                groups.setdefault(bucket[copy[0]], []).append(copy)
            rows = {copy: torch.stack([x[t] for t, _ in group]).mean(0) for group in groups.values() for copy in group}
        for (token, choice), row in rows.items():
            answer = expert(layer, e, row)
            if layer.compress == "lsh" and layer.compensate:
                answer = answer + x[token] - row
            weights = torch.stack([logits[token, other] for other in chosen[token]]).softmax(0)
            answers[token] = answers[token] + weights[choice] * answer
    return torch.stack(answers)


def gradients(y, layer, x, grad):
    return torch.autograd.grad(y, [x, *layer.parameters()], grad)


def equal_to_reference(layer, with_scores=True):
    x, scores, grad = inputs()
    scores = scores if with_scores else None
    y, wanted = layer(x, scores), reference(layer, x, scores)
    torch.testing.assert_close(y, wanted, rtol=1e-10, atol=1e-12)
    for found, exact in zip(gradients(y, layer, x, grad), gradients(wanted, layer, x, grad), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("with_scores", [True, False])
def test_defaults_equal_a_loop_over_tokens_and_experts(with_scores):
    equal_to_reference(build(), with_scores)


@pytest.mark.parametrize("forward", [1, 2, 3, 8])
@pytest.mark.parametrize("backward", [1, 2, 3, 8])
def test_every_cut_equals_the_loop(forward, backward):
    equal_to_reference(build(num_chunks=forward, num_chunks_backward=backward))


@pytest.mark.parametrize("capacity_factor", [0.3, 0.75, 1.0, 9.0])
@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("chunks", [1, 3])
def test_full_experts_drop_second_choices_first(capacity_factor, pad, chunks):
    layer = build(capacity_factor=capacity_factor, pad=pad, num_chunks=chunks)
    equal_to_reference(layer)
    most = math.ceil(capacity_factor * K * N / E)
    assert int(layer.kept_counts.max()) <= most
    assert layer.num_dropped == N * K - int(layer.kept_counts.sum())
    assert (layer.num_dropped > 0) == (capacity_factor <= 1)
    if pad:
        assert layer.sent_counts.tolist() == [most] * E


def test_first_choices_are_dropped_only_where_nothing_else_can_be():
    """All want expert 0 first and expert 1 second: each takes the first tokens, no token's second goes before."""
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(N, 1)
    layer = build(capacity_factor=1.0)
    x, _, grad = inputs()
    y = layer(x, scores)
    most = math.ceil(K * N / E)
    assert layer.kept_counts.tolist() == [most, most, 0, 0]
    assert y[most:].abs().max() == 0, "a token that was dropped by all its experts is left to the residual stream"
    assert gradients(y, layer, x, grad)[0][most:].abs().max() == 0


@pytest.mark.parametrize("owner", [[-1, 0, 0, 0], [0, -1, 0, -1], [-1] * E])
@pytest.mark.parametrize("chunks", [1, 3])
def test_replicas_change_nothing_on_one_rank(owner, chunks):
    equal_to_reference(build(owner=owner, num_chunks=chunks))


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("changes", [{}, {"num_chunks": 3, "num_chunks_backward": 2}, {"capacity_factor": 0.75}])
def test_compression_equals_the_loop_over_buckets(compensate, changes):
    layer = build(compress="lsh", num_hashes=1, compensate=compensate, **changes)
    equal_to_reference(layer)
    assert 0 < int(layer.sent_counts.sum()) < int(layer.kept_counts.sum())


@pytest.mark.parametrize("changes", [{"num_chunks": 2}, {"compress": "lsh", "num_hashes": 1}, {"capacity_factor": 0.7}])
def test_gradients_are_those_of_finite_differences(changes):
    layer = build(**changes)
    x, scores, _ = inputs(7)
    # a step of finite differences moves no token to another bucket or expert
    assert torch.autograd.gradcheck(lambda x, *_: layer(x, scores), [x, *layer.parameters()], eps=1e-6, atol=1e-6)


def test_cutting_changes_nothing_in_float32():
    whole = None
    x, scores, grad = inputs(500, 32, dtype=torch.float32)
    for chunks in ((1, 1), (2, 2), (3, 8), (8, 1), (600, 600)):
        layer = build(hidden=32, ffn=64, dtype=torch.float32, num_chunks=chunks[0], num_chunks_backward=chunks[1])
        y = layer(x, scores)
        found = [y.detach(), *gradients(y, layer, x, grad)]
        whole = whole or found
        for one, other in zip(found, whole, strict=True):
            assert (one - other).norm() <= 1e-6 * other.norm()


@pytest.mark.parametrize(
    "changes",
    [{}, {"capacity_factor": 1.0}, {"capacity_factor": 1.25, "pad": True}, {"top_k": 3, "skew": 1.5},
     {"compress": "lsh", "num_clusters": 16, "num_hashes": 4}, {"compress": "lsh", "num_hashes": 2},
     {"compress": "lsh", "num_clusters": 8, "num_hashes": 3, "capacity_factor": 0.8, "num_chunks": 4},
     {"num_modalities": 2, "num_replicas": 2}],
)  # fmt: skip
@pytest.mark.parametrize("step", [0, 3])
def test_counts_are_those_that_the_analysis_predicts(changes, step):
    setting = Setting(num_tokens=200, hidden=32, ffn=16, num_experts=8).change(**changes)
    traffic = routing.traffic(setting, 1, step)
    layer = models.expert_parallel(
        hidden=32, ffn=16, num_experts=8, top_k=setting.top_k, capacity_factor=setting.capacity_factor, pad=setting.pad,
        num_chunks=setting.num_chunks, compress=setting.compress, num_hashes=setting.num_hashes, device="cpu",
        owner=routing.owners(setting, 1).tolist(),
    )  # fmt: skip
    layer(torch.from_numpy(routing.tokens(setting, 0, step)), torch.from_numpy(routing.scores(setting, 0, step)))
    assert layer.kept_counts.tolist() == traffic.kept[0].tolist()
    assert layer.sent_counts.tolist() == traffic.rows[0].tolist()
    assert layer.num_dropped == traffic.dropped[0]


@settings(deadline=None, max_examples=60)
@given(
    num_tokens=st.integers(0, 40), num_experts=st.integers(1, 6), top_k=st.integers(1, 3),
    capacity_factor=st.sampled_from([0.0, 0.4, 1.0, 2.0]), chunks=st.integers(1, 5),
    compress=st.sampled_from(["none", "lsh"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_every_copy_is_kept_or_dropped_and_every_bucket_sent(
    num_tokens, num_experts, top_k, capacity_factor, chunks, compress, seed
):
    top_k = min(top_k, num_experts)
    layer = build(num_experts=num_experts, top_k=top_k, capacity_factor=capacity_factor, compress=compress,
                  num_hashes=1, num_chunks=chunks, seed=seed)  # fmt: skip
    x = inputs(num_tokens, seed=seed)[0]
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert int(layer.kept_counts.sum()) + layer.num_dropped == num_tokens * top_k
    assert layer.num_dropped == 0 or capacity_factor > 0
    kept, sent = layer.kept_counts, layer.sent_counts
    assert torch.equal(kept > 0, sent > 0)
    assert (sent <= kept).all()
    assert compress == "lsh" or torch.equal(kept, sent)


def step(layer, x):
    layer(x).square().sum().backward()
    return [name for name, _ in layer.marks.phases]


def test_profilers_see_the_phases_and_each_ends_with_the_step():
    layer = build(compress="lsh", num_hashes=2)
    names = {"gate", "permute", "compress", "dispatch", "experts", "combine", "unpermute"}
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        seen = step(layer, inputs()[0])
        torch.ones(4).cumprod(0)
    assert set(seen) == names | {""}
    assert seen[-1] == "", "the last phase ends with the backward pass"
    events = profiler.events()
    assert {event.name for event in events} >= names
    later = next(event for event in events if event.name == "aten::cumprod")
    assert all(event.time_range.end <= later.time_range.start for event in events if event.name in names)
    forward = [name for name in seen[: len(seen) // 2] if name]
    order = [forward.index(name) for name in ("gate", "permute", "compress", "dispatch", "experts", "combine")]
    assert order == sorted(order)


def test_marks_are_of_the_last_step_however_many_there_were():
    layer = build()
    first = step(layer, inputs()[0])
    assert all(step(layer, inputs()[0]) == first for _ in range(3))


def test_under_autocast_it_computes_in_the_dtype_of_its_weights():
    layer = build(dtype=torch.float32, compress="lsh", num_hashes=2)
    x, _, _ = inputs(dtype=torch.float32)
    plain = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain)
        low = torch.nn.functional.linear(x, torch.eye(H))
        assert low.dtype == torch.bfloat16
        y = layer(low)
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_half_precision_trains():
    x = inputs(dtype=torch.bfloat16)[0]
    y = build(dtype=torch.bfloat16, compress="lsh", num_hashes=2, num_chunks=2)(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == torch.bfloat16


def test_equal_seeds_are_equal_layers_and_no_seed_has_an_expert_of_another():
    def weights(seed):
        return [build(seed=seed).inner[str(e)] for e in range(E)]

    assert all(torch.equal(a, b) for a, b in zip(weights(3), weights(3), strict=True))
    several = [weight for seed in range(3) for weight in weights(seed)]
    assert all(not torch.equal(a, b) for i, a in enumerate(several) for b in several[:i])
    # an expert is the same in whatever company
    assert torch.equal(build(num_experts=8).inner["2"], build(owner=[-1, 0, -1, 0]).inner["2"])


def test_it_is_part_of_a_model_that_learns():
    layer = build(dtype=torch.float32)
    x = layer.random_batch(64)["x"]
    assert torch.equal(x, layer.random_batch(64)["x"])
    assert not torch.equal(x, layer.random_batch(64, seed=1)["x"])
    model = torch.nn.Sequential(torch.nn.LayerNorm(H), layer, torch.nn.Linear(H, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x)[:, 0] - x[:, 0] * x[:, 1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad.any() for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"hidden": 0}, "hidden is at least 1; given: 0"),
        ({"top_k": 5}, "top_k is at most num_experts, 4; given: 5"),
        ({"capacity_factor": -1.0}, "capacity_factor is at least 0; given: -1.0"),
        ({"compress": "zip"}, "compress is one of none, lsh; given: 'zip'"),
        ({"compress": "lsh", "num_hashes": 13}, "num_hashes is at most 12; given: 13"),
        ({"compress": "lsh", "pad": True, "capacity_factor": 1.0}, "choose one"),
        ({"message_dtype": "float16"}, "message_dtype is one of same, bfloat16, float8; given: 'float16'"),
        ({"message_dtype": "float8"}, "hidden is a multiple of 128; given: 6"),
        ({"owner": [0, 0, 1, 0]}, "owner names a rank, 0 to 0, or -1 for each of the 4 experts"),
        ({"owner": [0, 0]}, "owner names a rank"),
    ],
)
def test_impossible_layers_are_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        build(**wrong)


@pytest.mark.parametrize("shape", [(2, 3, H), (5, H + 1), (H,)])
def test_tokens_of_another_shape_are_refused_in_a_sentence(shape):
    with pytest.raises(ValueError, match="x is tokens by hidden"):
        build()(torch.zeros(shape))
