"""Sub-networks of a decoder's first layers: what they cost, and one model trained for all of them or for one."""

import pytest
import torch
from test_decoder_early_exit import speech, t5, text

from lessons import nested_exits

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(("make", "depth"), [(text, 0), (text, 5), (speech, 3)])
def test_depths_that_are_not_there(make, depth):
    with pytest.raises(ValueError, match=f"depth is {depth}, .* the decoder layers of this"):
        nested_exits.exits(make(), [depth])


def test_exits_count_the_bytes_that_a_depth_uses():
    model = text()
    table = nested_exits.exits(model, batch=2, input_length=10, num_steps=4, repeats=1)
    assert table.index.tolist() == [1, 2, 3, 4]
    # keys and values of 10 + 4 - 1 tokens (the last is never read), 32 wide, 4 bytes each, two rows
    assert table["cache_bytes"].tolist() == [depth * 2 * 2 * 13 * 32 * 4 for depth in (1, 2, 3, 4)]
    layer_bytes = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    assert table["weight_bytes"].diff().dropna().unique().tolist() == [layer_bytes]
    assert table["weight_bytes"][4] == sum(parameter.nbytes for parameter in model.parameters())
    assert table["agreement_frac"][4] == 1
    assert table["agreement_frac"].between(0, 1).all()
    assert table["agreement_frac"][1] < 1
    assert (table["token_ns"] > 0).all()
    assert not model.training


def test_exits_of_encoder_decoders():
    model = speech()
    model.train()
    table = nested_exits.exits(model, [1, 2], input_length=32, num_steps=5, repeats=1)
    # of each layer: 5 tokens (the first starts it, the last is never read), and 32 / 4 cells that the encoder made
    assert table["cache_bytes"].tolist() == [depth * 2 * (5 + 8) * 32 * 4 for depth in (1, 2)]
    assert table["agreement_frac"][2] == 1
    assert model.training
    assert nested_exits.exits(t5(), [1, 3], input_length=8, num_steps=3, repeats=1)["agreement_frac"][3] == 1


def test_fewer_layers_take_less_time():
    table = nested_exits.exits(text(layers=12), [1, 12], input_length=8, num_steps=10, repeats=3)
    assert table["token_ns"][1] * 2 < table["token_ns"][12]  # about 8 in fact


def test_nested_training_makes_all_depths_usable():
    table = nested_exits.train_nested(num_steps=60)
    assert table.index.tolist() == [1, 2, 3, 4]
    cut = table.loc[:3]
    assert (cut["nested_loss"] < 0.95 * cut["full_only_loss"]).all()
    assert table["full_only_loss"].is_monotonic_decreasing
    whole = table["full_only_loss"][4]
    assert table["full_only_loss"][1] > 1.3 * whole
    assert table["nested_loss"][1] < 1.3 * whole
    assert table["full_only_loss"][4] < table.attrs["guessing_loss"] / 2  # it did learn


def test_nested_training_repeats_and_trains_the_given_model():
    tables = []
    for _ in range(2):
        model = text()
        before = model.lm_head.weight.clone()
        tables.append(nested_exits.train_nested(model, [1, 4], num_steps=3, seed=1))
        assert not torch.equal(model.lm_head.weight, before)
    assert tables[0].equals(tables[1])
    assert tables[0].index.tolist() == [1, 4]
    with pytest.raises(ValueError, match="expected a decoder-only language model"):
        nested_exits.train_nested(speech())


def test_models_without_input_are_refused():
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    config = WhisperConfig(d_model=32, encoder_layers=1, decoder_layers=1, vocab_size=60, pad_token_id=0, **sizes)
    with pytest.raises(ValueError, match="takes input_features, expected tokens"):
        nested_exits.exits(WhisperForConditionalGeneration(config))
    with pytest.raises(ValueError, match="expected at least 1 each"):
        nested_exits.exits(text(), num_steps=0)
