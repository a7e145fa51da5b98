"""The live models make batches of exactly the lengths asked for, and packing does not mix documents."""

import numpy as np
import pandas as pd
import pytest
import torch

from effkit import models

TINY = {"hidden": 16, "heads": 2, "vocabulary": 50, "device": "cpu"}
LENGTHS = pd.DataFrame({"input_length": [50, 33, 71, 16], "output_length": [4, 5, 6, 3]})


def rows(*documents: list[int]) -> list[np.ndarray]:
    return [np.array(document) for document in documents]


@pytest.fixture(scope="module")
def text():
    return models.text(layers=2, **TINY)


@pytest.fixture(scope="module")
def speech():
    return models.speech(encoder_layers=1, decoder_layers=1, **TINY)


def test_they_are_built_from_configuration_ready_to_train(text, speech):
    for model in (text, speech):
        assert model.training
        assert next(model.parameters()).dtype == torch.float32
        assert sum(parameter.numel() for parameter in model.parameters()) < 200_000
    assert text.config.num_hidden_layers == 2
    assert text.config.intermediate_size == 64
    assert models.text(layers=1, kv_heads=1, **TINY).config.num_key_value_heads == 1


@pytest.mark.parametrize("build", [models.text, models.speech])
def test_equal_seeds_are_equal_models(build):
    first, again, other = (build(**TINY, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("build", [models.text, models.speech])
def test_heads_divide_hidden(build):
    with pytest.raises(ValueError, match="hidden is a multiple of heads; given: 10 and 4"):
        build(hidden=10, heads=4)


def test_a_speech_batch_has_the_shapes_and_masks_of_its_lengths(speech):
    batch = speech.make_batch(rows([0], [2], [1]), LENGTHS)
    assert batch["input_features"].shape == (3, 71, 80)
    assert batch["attention_mask"].sum(dim=1).tolist() == [50, 71, 33]
    assert batch["labels"].shape == (3, 6)
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == [4, 6, 5]
    assert batch["input_features"][0, 50:].abs().sum() == 0, "padding holds nothing"
    assert (batch["labels"][0, 4:] == -100).all()


def test_speech_refuses_packed_rows(speech):
    with pytest.raises(ValueError, match="one example per row"):
        speech.make_batch(rows([0, 1], [2]), LENGTHS)


def test_a_text_batch_has_the_shapes_and_masks_of_its_lengths(text):
    batch = text.make_batch(rows([0], [2], [1]), LENGTHS)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(batch, (3, 71))
    assert batch["attention_mask"].sum(dim=1).tolist() == [50, 71, 33]
    assert batch["position_ids"][0, :50].tolist() == list(range(50))
    # the first token of a document is predicted from nothing
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == [49, 70, 32]


def test_a_packed_batch_keeps_its_documents_in_blocks(text):
    batch = text.make_batch(rows([3, 1], [0]), LENGTHS)
    mask = batch["attention_mask"]
    assert mask.shape == (2, 1, 50, 50)
    assert batch["position_ids"][0].tolist() == [*range(16), *range(33), 0]
    assert not mask[0, 0, 16:49, :16].any(), "the second document does not see the first"
    assert not mask[0, 0, :16, 16:].any()
    assert torch.equal(mask[0, 0, 16:49, 16:49], torch.ones(33, 33).tril().bool())
    assert (batch["labels"] >= 0).sum(dim=1).tolist() == [15 + 32, 49]


@pytest.mark.parametrize("packed", [True, False])
def test_logits_of_a_document_are_those_of_the_document_alone(text, packed):
    places = {3: (0, 0), 1: (0, 16), 0: (1, 0)} if packed else {3: (0, 0), 0: (1, 0)}
    batch = text.make_batch(rows([3, 1], [0]) if packed else rows([3], [0]), LENGTHS)
    text.eval()
    try:
        with torch.no_grad():
            together = text(**batch).logits
            for document, (row, start) in places.items():
                cells = slice(start, start + int(LENGTHS["input_length"][document]))
                alone = text(input_ids=batch["input_ids"][row : row + 1, cells]).logits[0]
                torch.testing.assert_close(together[row, cells], alone, rtol=1e-4, atol=1e-6)
    finally:
        text.train()


@pytest.mark.parametrize("kind", ["text", "speech"])
def test_a_training_step_is_finite_and_repeatable(kind, request):
    model = request.getfixturevalue(kind)
    losses = []
    for _ in range(2):
        loss = model(**model.make_batch(rows([0], [1]), LENGTHS)).loss
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0])
    model.zero_grad(set_to_none=True)


def test_batches_are_equal_when_made_again(text):
    first, again = (text.make_batch(rows([2], [1]), LENGTHS) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["input_ids"], text.make_batch(rows([1], [2]), LENGTHS)["input_ids"])
