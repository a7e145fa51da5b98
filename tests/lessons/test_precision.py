"""Formats, kurtosis and rotary positions against what is known by hand or by torch itself."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from effkit.activations import gradient_error
from lessons import corpora
from lessons.precision import formats, outliers, rotary, small_language

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model():
    return small_language.untrained(layers=1, hidden=16, ffn=32, heads=2)


@pytest.fixture(scope="module")
def batch():
    piece = corpora.windows(corpora.encode(corpora.english()), 4, 16)
    return {"input_ids": piece, "labels": piece}


def test_integers_are_rounded_to_the_nearest_step_of_the_largest():
    x = torch.tensor([-7.0, 0.4, 0.6, 3.5001])
    assert formats.cast(x, "int4").tolist() == pytest.approx([-7, 0, 1, 4])
    assert formats.cast(torch.zeros(3), "int8").tolist() == [0, 0, 0]


@pytest.mark.parametrize(("name", "half_step"), [("bfloat16", 2**-8), ("fp8_e4m3", 2**-4), ("fp8_e5m2", 2**-3)])
def test_floats_err_by_at_most_half_a_step_of_their_mantissa(name, half_step):
    x = torch.linspace(0.5, 1.0, 1001)
    error = ((formats.cast(x, name) - x) / x).abs().max()
    assert half_step / 3 < error <= half_step


def test_bytes_count_codes_and_a_scale():
    x = torch.zeros(6, 5)
    assert [formats.size_bytes(x, name) for name in formats.FORMATS] == [120, 60, 34, 34, 34, 19]


def test_a_model_computes_with_cast_weights_and_has_its_own_again(model, batch):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    layer = small_language.matrices(model)["model.layers.0.mlp.up_proj"]
    with formats.low_precision(model, "int4", ["weights"]):
        assert len(layer.weight.unique()) <= 15
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not layer._forward_pre_hooks
    assert not layer._forward_hooks


def test_each_role_moves_the_gradient_and_float32_does_not(model, batch):
    def error(name, roles):
        table = gradient_error(model, batch, lambda: formats.low_precision(model, name, roles))
        return table.set_index("parameter").loc["all", "relative_error"]

    assert error("float32", formats.ROLES) < 1e-6
    for role in formats.ROLES:
        assert 0 < error("bfloat16", [role]) < error("fp8_e4m3", [role]) < error("fp8_e5m2", [role])


def test_casting_gradients_leaves_the_loss_alone(model, batch):
    with formats.low_precision(model, "int4", ["gradients"]):
        cast = model(**batch).loss
    assert torch.equal(cast, model(**batch).loss)


def test_formats_and_roles_are_named_in_errors(model):
    with pytest.raises(ValueError, match="'int3', expected one of float32"):
        formats.cast(torch.ones(2), "int3")
    with pytest.raises(ValueError, match="given: moods"), formats.low_precision(model, "int8", ["moods"]):
        pass


def test_kurtosis_of_known_distributions():
    generator = torch.Generator().manual_seed(0)
    assert outliers.excess_kurtosis(torch.tensor([1.0, -1, 1, -1])) == pytest.approx(-2)
    assert abs(outliers.excess_kurtosis(torch.randn(200_000, generator=generator))) < 0.05
    one_far_out = torch.zeros(1000)
    one_far_out[3] = 1e4
    assert outliers.excess_kurtosis(one_far_out) == pytest.approx(1000, rel=0.01)
    with pytest.raises(ValueError, match="have 3 values"):
        outliers.excess_kurtosis(torch.ones(2, 3))


def test_channel_kurtosis_finds_the_channel_that_was_planted(model, batch):
    before = outliers.channel_kurtosis(model, batch)["model.layers.0.self_attn.q_proj"]
    norm = model.model.layers[0].input_layernorm
    with torch.no_grad():
        norm.weight[2] = 1e3
    after = outliers.channel_kurtosis(model, batch)
    with torch.no_grad():
        norm.weight[2] = 1.0
    assert before < 3 < 9 < after["model.layers.0.self_attn.q_proj"]
    assert set(after) == set(small_language.matrices(model))


def test_readings_are_of_the_held_out_text(model):
    text = corpora.encode(corpora.english())
    found = outliers.readings(model, text)
    assert found["loss"] == small_language.held_out_loss(model, text)
    assert found["4 bits add"] != 0
    assert found["kurtosis, down reads"] > found["kurtosis, block reads"]


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(model):
    one, two = outliers.muon(model)
    shared = [{id(p) for group in update.param_groups for p in group["params"]} for update in (one, two)]
    assert shared[0] == {id(layer.weight) for layer in small_language.matrices(model).values()}
    assert shared[0] | shared[1] == {id(p) for p in model.parameters()}
    assert not shared[0] & shared[1]


def test_muon_adds_the_products_of_five_newton_schulz_steps():
    text = corpora.encode(corpora.english())
    plain, with_muon = (small_language.step_flops(text, make) for make in (small_language.adamw, outliers.muon))
    by_hand = sum(
        5 * (2 * 2 * least**2 * most + 2 * least**3)
        for layer in small_language.matrices(small_language.untrained()).values()
        for least, most in [sorted(layer.weight.shape)]
    )
    assert with_muon - plain == by_hand


def test_training_reads_the_same_pieces_for_one_seed_and_learns():
    text = corpora.encode(corpora.english())
    losses = []
    for _ in range(2):
        model = small_language.untrained(3, layers=1, hidden=16, ffn=32, heads=2)
        before = small_language.held_out_loss(model, text)
        small_language.train(model, text, 12, small_language.adamw(model, 1e-2), seed=5)
        losses.append(small_language.held_out_loss(model, text))
    assert losses[0] == losses[1] < before - 0.3
    with pytest.raises(ValueError, match="num_steps is 0"):
        small_language.train(model, text, 0, [])


def test_rotation_turns_pairs_and_keeps_their_length():
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64)
    turned = rotary.rotated(x, torch.tensor([2.0], dtype=torch.float64))
    slow = torch.tensor(2.0 * 10_000**-0.5)
    # channels 0 and 2 turn by 2, channels 1 and 3 by 2 / 100
    expected = [torch.cos(torch.tensor(2.0)), -torch.sin(slow), torch.sin(torch.tensor(2.0)), torch.cos(slow)]
    assert turned[0].tolist() == pytest.approx([float(value) for value in expected], abs=1e-6)
    with pytest.raises(ValueError, match="3 channels"):
        rotary.rotated(torch.ones(1, 3), torch.ones(1))


def test_only_rounding_breaks_relative_positions():
    table = rotary.shift_errors([0, 7, 255, 4096])
    assert table["float64"].max() < 1e-9
    assert (table.loc[0] == 0).all()
    assert table["float32"].max() < 1e-2 < 0.1 < table.loc[4096, "bfloat16 positions too"]
    assert (table.loc[7:, "bfloat16 rotation"] > 10 * table.loc[7:, "float32"]).all()
    assert table.loc[4096, "to a fixed anchor"] > 0.5  # that distance does change


def test_pairs_are_the_cells_of_the_mask():
    lengths = [3, 1, 4]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    causal = torch.ones(8, 8, dtype=torch.bool).tril()
    same = owner[:, None] == owner[None]
    assert rotary.attended_pairs(lengths, within=False) == int(causal.sum())
    assert rotary.attended_pairs(lengths) == int((causal & same).sum())
    led = (same | (torch.arange(8) == 0)) & causal
    assert rotary.attended_pairs(lengths, anchor=True) == int(led.sum())


def test_anchored_attention_is_attention_under_its_mask():
    lengths = [3, 1, 4]
    q, k, v = torch.randn(3, 1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    mask = ((owner[:, None] == owner[None]) | (torch.arange(8) == 0)) & torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(
        rotary.anchored_attention(q, k, v, lengths), scaled_dot_product_attention(q, k, v, attn_mask=mask)
    )
    with pytest.raises(ValueError, match="have 7 tokens and the row 8"):
        rotary.anchored_attention(q, k, v, [3, 4])


def test_lengths_fill_the_context():
    lengths = rotary.document_lengths(5000, median=100)
    assert sum(lengths) == 5000
    assert min(lengths) >= 1
    assert lengths == rotary.document_lengths(5000, median=100)
    assert 50 < torch.tensor(lengths).float().median() < 200
    with pytest.raises(ValueError, match="expected all above 0"):
        rotary.document_lengths(0)


def test_a_steps_work_is_what_torch_counts():
    model = small_language.untrained(layers=2, hidden=32, ffn=64, heads=2)
    piece = torch.zeros(1, 16, dtype=torch.long)
    with torch.utils.flop_counter.FlopCounterMode(display=False) as counter:
        model(input_ids=piece, labels=piece).loss.backward()
    whole = rotary.step_flops(layers=2, hidden=32, ffn=64, vocabulary=128, num_tokens=16, num_pairs=16 * 16).closed()
    products = counter.get_flop_counts()["Global"]
    in_attention = sum(flops for op, flops in products.items() if "scaled_dot_product" in str(op))
    assert counter.get_total_flops() - in_attention == whole.total - whole.frame.loc["attention", "value"]
