"""Merging conserves what it averages, takes the most alike first, and leaves the model as it was."""

import pytest
import torch

from effkit import models
from lessons.token_merging import closed_form_frac, kept_ratios, merge_tokens, merged

TINY = {"layers": 3, "hidden": 16, "heads": 2, "image": 16, "patch": 2, "device": "cpu"}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def vision():
    return models.vision(**TINY).eval()


def tokens(num: int, batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, num, 8, generator=torch.Generator().manual_seed(num))


def lengths_of(model) -> list[int]:
    """Tokens that come into each layer from one forward on."""
    seen = []
    handles = [
        one.register_forward_hook(lambda _m, args, _o: seen.append(args[0].shape[1])) for one in model.vit.layers
    ]
    with torch.no_grad():
        model(**model.random_batch(2))
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("protect", [False, True])
@pytest.mark.parametrize("num", [2, 3, 7, 16])
def test_any_number_can_be_kept_and_the_weighted_sum_stays(num, protect):
    x = tokens(num)
    size = torch.randint(1, 5, x.shape[:2], generator=torch.Generator().manual_seed(0)).float()
    for keep in range(1 + protect, num + 1):
        found, sizes = merge_tokens(x, keep, size, protect_first=protect)
        assert found.shape == (3, keep, 8)
        assert sizes.shape == (3, keep)
        torch.testing.assert_close((found * sizes[..., None]).sum(dim=1), (x * size[..., None]).sum(dim=1))
        assert torch.equal(sizes.sum(dim=1), size.sum(dim=1))


def test_all_kept_is_nothing_changed():
    x = tokens(9)
    found, size = merge_tokens(x, 9)
    assert torch.equal(found, x)
    assert torch.equal(size, torch.ones(3, 9))


def test_equal_directions_merge_first_and_weigh_by_size():
    x = torch.eye(8)[None].clone()
    x[0, 5] = 3 * x[0, 2]  # the same direction, at an even and at an odd place
    size = torch.ones(1, 8)
    size[0, 2] = 2.0
    found, sizes = merge_tokens(x, 7, size)
    assert sizes.tolist() == [[1, 1, 1, 1, 3, 1, 1]]
    torch.testing.assert_close(found[0, 4], (2 * x[0, 2] + x[0, 5]) / 3)
    assert torch.equal(found[0, [0, 1, 2, 3, 5, 6]], x[0, [0, 1, 3, 4, 6, 7]]), "the others in their order"


def test_each_row_of_a_batch_merges_by_itself():
    x = tokens(16)
    together, sizes = merge_tokens(x, 6)
    for row in range(3):
        alone, size = merge_tokens(x[row : row + 1], 6)
        torch.testing.assert_close(together[row], alone[0])
        assert torch.equal(sizes[row], size[0])


def test_one_round_is_the_definition_written_out():
    (x,) = tokens(11, batch=1)
    alike = torch.nn.functional.cosine_similarity(x[::2, None], x[None, 1::2], dim=-1)
    chosen = sorted(range(6), key=lambda i: -alike[i].max())[:3]
    groups = {2 * j + 1: [2 * j + 1] for j in range(5)} | {2 * i: [2 * i] for i in range(6) if i not in chosen}
    for i in chosen:
        groups[2 * int(alike[i].argmax()) + 1].append(2 * i)
    expected = torch.stack([x[groups[place]].mean(dim=0) for place in sorted(groups)])
    torch.testing.assert_close(merge_tokens(x[None], 8)[0][0], expected)


def test_a_protected_token_stays_alone_even_among_equals():
    x = torch.ones(2, 9, 4)
    x[:, 0] = 2.0
    for keep in range(2, 10):
        found, size = merge_tokens(x, keep, protect_first=True)
        assert (found[:, 0] == 2).all()
        assert (found[:, 1:] == 1).all()
        assert (size[:, 0] == 1).all()
    assert merge_tokens(x, 1)[1].tolist() == [[9], [9]]


def test_gradients_flow_through_averages():
    x = tokens(8).requires_grad_()
    merge_tokens(x, 1)[0].sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1 / 8))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"keep": 0}, "keep is from 1 to the 6 tokens there are; given: 0"),
        ({"keep": 7}, "keep is from 1 to the 6 tokens there are; given: 7"),
        ({"keep": 1, "protect_first": True}, "keep is from 2 to the 6"),
        ({"keep": 3, "size": torch.ones(3, 5)}, r"one number per token, \(3, 6\); given: \(3, 5\)"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_sentence(given, sentence):
    with pytest.raises(ValueError, match=sentence):
        merge_tokens(tokens(6), **given)


def test_a_model_merges_before_its_layer_and_is_restored(vision):
    batch = vision.random_batch(2)
    with torch.no_grad():
        before = vision(**batch).logits
        with merged(vision, 0.5, 1):
            assert lengths_of(vision) == [65, 33, 33]
            assert (vision(**batch).logits - before).abs().max() > 1e-5
        assert lengths_of(vision) == [65, 65, 65]
        assert torch.equal(vision(**batch).logits, before)
        with merged(vision, 1.0, 1):
            assert torch.equal(vision(**batch).logits, before)
        with merged(vision, 0.01, 2):
            assert lengths_of(vision) == [65, 65, 2]
        with merged(vision, 0.5, 0, protect_first=False):
            assert lengths_of(vision) == [32, 32, 32]


def test_a_model_is_restored_after_an_exception(vision):
    with pytest.raises(ZeroDivisionError), merged(vision, 0.5, 0, proportional=True):
        _ = 1 / 0
    assert lengths_of(vision) == [65, 65, 65]


def test_equal_tokens_merge_without_a_change_where_attention_is_proportional():
    model = models.vision(**TINY).eval()
    pixels = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))
    # patches come in equal pairs, side by side, so that one of each is at an even and one at an odd place
    pixels = pixels.unflatten(3, (4, 2)).repeat_interleave(2, dim=3).flatten(3)
    with torch.no_grad():
        model.vit.embeddings.position_embeddings.zero_()
        for parameter in model.vit.layers.parameters():
            parameter.mul_(3)  # so that attention is far from even
        whole = model(pixel_values=pixels).logits
        with merged(model, 0.5, 0, proportional=True):
            proportional = model(pixel_values=pixels).logits
        with merged(model, 0.5, 0):
            plain = model(pixel_values=pixels).logits
        with merged(model, 0.75, 0):
            uneven = model(pixel_values=pixels).logits
        with merged(model, 0.75, 0, proportional=True):
            uneven_proportional = model(pixel_values=pixels).logits
    torch.testing.assert_close(proportional, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(uneven_proportional, whole, rtol=1e-4, atol=1e-5)
    assert (plain - whole).abs().max() > 1e-5, "the class token weighs too much"
    assert (uneven - whole).abs().max() > 1e-5


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ((0.5, 3), "layer is from 0 to 2; given: 3"),
        ((0.5, -1), "layer is from 0 to 2; given: -1"),
        ((0.0, 1), "keep_frac is above 0 and at most 1; given: 0.0"),
        ((1.5, 1), "keep_frac is above 0 and at most 1; given: 1.5"),
    ],
)
def test_settings_that_no_model_has_are_refused_in_a_sentence(vision, given, sentence):
    with pytest.raises(ValueError, match=sentence), merged(vision, *given):
        pass


def test_models_that_cannot_merge_say_so():
    with pytest.raises(ValueError, match="found no list of layers in Linear"), merged(torch.nn.Linear(2, 2), 0.5):
        pass
    speech = models.speech(encoder_layers=1, decoder_layers=1, hidden=16, heads=2, vocabulary=50, device="cpu")
    batch = speech.random_batch(2, 40)
    batch["attention_mask"] = torch.tensor([[1] * 40, [1] * 20 + [0] * 20])
    with pytest.raises(ValueError, match="no attention mask is given"), merged(speech, 0.5):
        speech(**batch)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("layer", [0, 1])
def test_saved_bytes_follow_the_closed_form(attention, layer):
    found = kept_ratios((1.0, 0.5, 0.25), layer=layer, attention=attention, batch=2, repeats=1,
                        **{**TINY, "hidden": 64, "image": 32})  # fmt: skip
    assert found.index.name == "keep_frac"
    assert found.index.tolist() == [1.0, 0.5, 0.25]
    assert list(found.columns) == ["step_ns", "saved_bytes", "saved_frac", "closed_form_frac"]
    assert (found["step_ns"] > 0).all()
    assert found.loc[1.0, "saved_frac"] == found.loc[1.0, "closed_form_frac"] == 1
    assert found["saved_frac"].to_numpy() == pytest.approx(found["closed_form_frac"].to_numpy(), abs=0.015)
    assert found["saved_bytes"].is_monotonic_decreasing


def test_bytes_are_relative_to_all_tokens_also_where_those_are_not_asked_for():
    both, alone = (kept_ratios(ratios, repeats=1, batch=1, **TINY) for ratios in ((1.0, 0.5), (0.5,)))
    assert alone.loc[0.5, "saved_frac"] == both.loc[0.5, "saved_frac"] < 0.8


def test_fewer_tokens_take_less_time():
    times = kept_ratios((1.0, 0.25), layer=0, repeats=3, batch=2, layers=2, hidden=64)["step_ns"]
    assert times[0.25] < 0.75 * times[1.0]


def test_the_closed_form_of_stored_scores_falls_with_the_square():
    frac = closed_form_frac(0.5, 0, 12, 10_001, 1, 1000, attention="eager")
    assert frac == pytest.approx(0.25, rel=1e-3)
    assert closed_form_frac(0.5, 0, 12, 10_001, 1, 1000) == pytest.approx(0.5, rel=1e-3)
    with pytest.raises(ValueError, match="attention is eager or sdpa; given: 'flash'"):
        closed_form_frac(0.5, 0, 12, 197, 192, 3, attention="flash")
