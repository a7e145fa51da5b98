"""The closed form of a hybrid's cache is exact, and a step without attention heads does not see the length."""

import pytest
import torch

from effkit import models
from effkit.decoder.states import contexts, hybrid_cache_bytes
from effkit.models.parallel_heads import cache_bytes

SIZE = {"layers": 2, "hidden": 32, "heads": 4, "vocabulary": 50, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("dtype", "value_bytes"), [(torch.float32, 4), (torch.bfloat16, 2)])
@pytest.mark.parametrize("state_heads", [0, 1, 4])
def test_the_closed_form_is_the_cache_of_a_generation(state_heads, dtype, value_bytes):
    model = models.hybrid(state_heads=state_heads, dtype=dtype, **SIZE)
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
def test_impossible_settings_are_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        contexts(**{"lengths": (4,), **SIZE, **wrong})


def test_the_closed_form_refuses_more_state_heads_than_heads():
    with pytest.raises(ValueError, match="state_heads is from 0 to heads"):
        hybrid_cache_bytes(1, 4, 5, 8, 1, 1)
