"""The hybrid decoder gives the same logits however its tokens come in, and its state heads are the recurrence."""

import pytest
import torch

from effkit import decoder
from lessons import hybrid_heads
from lessons.hybrid_heads import cache_bytes, contexts, hybrid_cache_bytes

SIZE = {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 50, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=[0, 1, 2, 4])
def hybrid(request):
    return hybrid_heads.build(state_heads=request.param, **SIZE).eval()


@torch.no_grad()
def fed(model, tokens, pieces):
    """Logits of tokens that come in pieces of these lengths, and the cache at the end."""
    cache, found = None, []
    for piece in tokens.split(pieces, dim=1):
        logits, cache = model.advance(piece, cache)
        found.append(logits)
    return torch.cat(found, dim=1), cache


@pytest.mark.parametrize("pieces", [[1] * 150, [100] + [1] * 50, [3, 80, 67]])
def test_logits_do_not_depend_on_how_tokens_come_in(hybrid, pieces):
    tokens = hybrid.random_batch(2, 150)["input_ids"]
    logits, _ = fed(hybrid, tokens, pieces)
    with torch.no_grad():
        together = hybrid(tokens).logits
    torch.testing.assert_close(logits, together, rtol=1e-4, atol=1e-5)
    assert together.std() > 0.1


def test_the_cache_of_the_parallel_form_is_that_of_the_steps(hybrid):
    tokens = hybrid.random_batch(2, 70)["input_ids"]
    for one, other in zip(fed(hybrid, tokens, [70])[1], fed(hybrid, tokens, [1] * 70)[1], strict=True):
        torch.testing.assert_close(tuple(one), tuple(other), rtol=1e-4, atol=1e-5)


def test_a_state_head_is_the_recurrence_written_out():
    model = hybrid_heads.build(state_heads=4, **SIZE).eval()
    mixer = model.layers[0].mixer
    x = torch.randn(2, 90, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        mixer.gate.weight.mul_(5)  # gates that differ from token to token
        found, past = mixer(x, model._cache(2, 0)[0])
        q, k, v = (part.view(2, 90, 4, 8) for part in mixer.qkv(x).chunk(3, dim=-1))
        gate = mixer.gate(x).sigmoid()
        assert gate.std() > 0.05
        state, outputs = torch.zeros(2, 4, 8, 8), []
        for t in range(90):
            state = gate[:, t, :, None, None] * state + torch.einsum("bhi,bhj->bhij", k[:, t], v[:, t])
            outputs.append(torch.einsum("bhi,bhij->bhj", q[:, t], state) / 8**0.5)
        by_hand = mixer.out(torch.stack(outputs, dim=1).flatten(2))
    torch.testing.assert_close(found, by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(past.state, state, rtol=1e-4, atol=1e-5)


def test_no_token_sees_a_later_one(hybrid):
    tokens = hybrid.random_batch(1, 100)["input_ids"]
    changed = tokens.clone()
    changed[0, 70] = (tokens[0, 70] + 1) % 50
    with torch.no_grad():
        before, after = hybrid(tokens).logits, hybrid(changed).logits
    torch.testing.assert_close(before[:, :70], after[:, :70])
    assert (before[:, 71:] - after[:, 71:]).abs().amax(dim=-1).min() > 1e-6, "every later token sees it"


def test_greedy_decoding_takes_the_likeliest_token_and_leaves_the_cache_alone(hybrid):
    prompt = hybrid.random_batch(2, 9)["input_ids"]
    logits, cache = fed(hybrid, prompt, [9])
    written, token = [], logits[:, -1].argmax(dim=-1)
    before = [part.clone() for past in cache for part in past]
    after = cache
    for _ in range(5):
        written.append(token)
        token, after = hybrid.step(token, after)
    assert token.shape == (2,)
    assert not any(part.requires_grad for past in after for part in past), "no graph grows with the text"
    assert all(torch.equal(a, b) for a, b in zip(before, [part for past in cache for part in past], strict=True))
    with torch.no_grad():
        together = hybrid(torch.cat([prompt, torch.stack(written, dim=1)], dim=1)).logits
    assert torch.equal(together[:, 8:-1].argmax(dim=-1), torch.stack(written, dim=1))
    assert torch.equal(together[:, -1].argmax(dim=-1), token)


def test_a_cache_grows_by_attention_heads_alone(hybrid):
    token = torch.zeros(3, dtype=torch.long)
    _, first = hybrid.step(token)
    _, second = hybrid.step(token, first)
    attention = SIZE["heads"] - hybrid.state_heads
    assert cache_bytes(second) - cache_bytes(first) == 2 * 3 * attention * 2 * 8 * 4
    assert cache_bytes(first) == 2 * 3 * (attention * 2 * 8 + hybrid.state_heads * 64) * 4


def test_a_random_cache_is_one_that_a_step_takes(hybrid):
    cache = hybrid.random_cache(2, 30)
    _, real = fed(hybrid, hybrid.random_batch(2, 30)["input_ids"], [30])
    assert [[part.shape for part in past] for past in cache] == [[part.shape for part in past] for past in real]
    token, after = hybrid.step(torch.zeros(2, dtype=torch.long), cache)
    assert token.shape == (2,)
    assert after[0].keys.shape[2] == (31 if hybrid.state_heads < 4 else 0)
    again = hybrid.random_cache(2, 30)
    assert all(torch.equal(a, b) for one, two in zip(cache, again, strict=True) for a, b in zip(one, two, strict=True))


def test_the_loss_is_of_the_next_token_and_nan_without_labels(hybrid):
    batch = hybrid.random_batch(2, 10)
    with torch.no_grad():
        loss, logits = hybrid(**batch)
        assert hybrid(batch["input_ids"]).loss.isnan()
    chances = logits.log_softmax(dim=-1)
    by_hand = [-chances[row, cell, batch["labels"][row, cell + 1]] for row in range(2) for cell in range(9)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_it_learns_with_gradients_that_are_finite_over_many_chunks():
    model = hybrid_heads.build(state_heads=2, **SIZE)
    model(**model.random_batch(1, 300)).loss.backward()
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"state_heads": 5}, r"state_heads is from 0 to heads \(4\); given: 5"),
        ({"state_heads": -1}, "state_heads is from 0 to heads"),
        ({"hidden": 30}, "hidden is a multiple of heads; given: 30 and 4"),
        ({"layers": 0}, "layers is at least 1; given: 0"),
    ],
)
def test_impossible_sizes_are_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        hybrid_heads.build(**{**SIZE, **wrong})


def test_a_hybrid_models_step():
    model = hybrid_heads.build(layers=2, hidden=32, heads=4, state_heads=2)
    account = decoder.measure(model.step, torch.tensor([1, 2]), num_steps=6, batch=2)
    assert abs(account.residual) < 0.05 * account.total, "rows and total are of one generation"
    assert (decoder.positions(account)["time_ns"] > 0).all()


# What a step costs as the context grows


@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("state_heads", [0, 1, 4])
def test_the_closed_form_is_the_cache_of_a_generation(state_heads, dtype, value_bytes):
    model = hybrid_heads.build(state_heads=state_heads, dtype=dtype, **SIZE)
    token, cache = torch.zeros(3, dtype=torch.long), None
    for length in range(1, 6):
        token, cache = model.step(token, cache)
        assert cache_bytes(cache) == hybrid_cache_bytes(2, 4, state_heads, 8, 3, length, value_bytes)


def test_a_state_is_as_large_as_the_keys_and_values_of_half_as_many_tokens_as_a_head_is_wide():
    for length, sign in ((15, -1), (16, 0), (17, 1)):
        attention, state = (hybrid_cache_bytes(3, 4, n, 32, batch=2, length=length) for n in (0, 4))
        assert (attention > state) - (attention < state) == sign


def test_the_table_has_every_setting_and_the_bytes_of_the_closed_form():
    found = contexts((0, 8, 32), (0, 4), batch=2, repeats=1, **SIZE)
    assert found.index.names == ["state_heads", "length"]
    assert found.index.tolist() == [(n, length) for n in (0, 4) for length in (0, 8, 32)]
    assert list(found.columns) == ["token_ns", "cache_bytes"]
    assert (found["token_ns"] > 0).all()
    for (n, length), row in found.iterrows():
        assert row["cache_bytes"] == hybrid_cache_bytes(2, 4, n, 8, 2, length)


def test_time_grows_with_the_context_unless_all_heads_have_a_state():
    size = {**SIZE, "hidden": 128}
    times = contexts((16, 8192), (0, 4), repeats=9, **size)["token_ns"]
    attention, state = (times[n, 8192] / times[n, 16] for n in (0, 4))
    assert attention > 2, "concatenates and reads 16 MiB"
    assert state < 1.8


def test_it_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    contexts((4,), (2,), repeats=1, **SIZE)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"lengths": (4, -1)}, "lengths are at least 0; given: -1"),
        ({"state_heads": (5,)}, r"state_heads is from 0 to heads \(4\); given: 5"),
        ({"repeats": 0}, "repeats is at least 1; given: 0"),
        ({"batch": 0}, "batch_size is at least 1; given: 0"),
    ],
)
def test_impossible_contexts_are_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        contexts(**{"lengths": (4,), **SIZE, **wrong})


def test_the_closed_form_refuses_more_state_heads_than_heads():
    with pytest.raises(ValueError, match="state_heads is from 0 to heads"):
        hybrid_cache_bytes(1, 4, 5, 8, 1, 1)
