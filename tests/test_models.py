"""The live models make batches of exactly the lengths asked for, and packing does not mix documents."""

import inspect

import numpy as np
import pandas as pd
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from effkit import models
from lessons import small_models

TINY = {"hidden": 16, "heads": 2, "vocabulary": 50, "device": "cpu"}
SMALLEST = {
    "convolutional": {"width": 4, "stages": 2, "image": 8, "device": "cpu"},
    "gpt": {"layers": 2, **TINY},
    "recurrent": {"hidden": 16, "vocabulary": 50, "device": "cpu"},
    "speech": {"encoder_layers": 1, "decoder_layers": 1, **TINY},
    "text": {"layers": 2, **TINY},
    "vision": {"layers": 2, "hidden": 16, "heads": 2, "image": 8, "device": "cpu"},
}
OURS = {"convolutional", "recurrent"}  # of the lessons
LAYERS = {"expert_parallel"}  # have no loss; tried in test_models_moe.py
WITH_LENGTH = {"gpt", "recurrent", "speech", "text"}
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


@pytest.mark.parametrize("build", [models.text, models.speech, models.gpt, models.vision])
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


def random_batch(model, name, **settings):
    return model.random_batch(3, **({"length": 40} if name in WITH_LENGTH else {}), **settings)


def test_every_public_model_is_tried_below():
    assert {*SMALLEST, *LAYERS} - OURS == set(models.__all__)


@pytest.mark.parametrize("name", SMALLEST)
def test_a_random_batch_trains_every_parameter(name):
    model = small_models.build(name, **SMALLEST[name])
    assert ("length" in inspect.signature(model.random_batch).parameters) == (name in WITH_LENGTH)
    batch = random_batch(model, name)
    assert all(len(tensor) == 3 for tensor in batch.values())
    assert model.training
    loss = model(**batch).loss
    assert loss.shape == ()
    loss.backward()
    # a key's bias moves all scores of a query alike, and softmax does not see that
    idle = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not [n for n in idle if not n.endswith("bias")]


@pytest.mark.parametrize("name", SMALLEST)
def test_a_loss_falls_when_trained(name):
    model = small_models.build(name, **SMALLEST[name])
    batch = random_batch(model, name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("name", SMALLEST)
def test_equal_seeds_are_equal_weights_and_batches(name):
    first, again, other = (small_models.build(name, **SMALLEST[name], seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    batch = random_batch(first, name)
    assert all(torch.equal(tensor, batch[key]) for key, tensor in random_batch(first, name).items())
    assert any(not torch.equal(tensor, batch[key]) for key, tensor in random_batch(first, name, seed=1).items())


@pytest.mark.parametrize("name", SMALLEST)
def test_a_step_runs_on_fake_tensors(name):
    model = small_models.build(name, **SMALLEST[name])
    batch = random_batch(model, name)
    mode = FakeTensorMode()
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            own.update({key: mode.from_tensor(tensor) for key, tensor in own.items() if tensor is not None})
        if isinstance(module, torch.nn.LSTM):  # keeps a second list of its weights
            module._flat_weights = [getattr(module, key) for key in module._flat_weights_names]
    with mode:
        model(**{key: mode.from_tensor(tensor) for key, tensor in batch.items()}).loss.backward()
    assert {tuple(p.grad.shape) == tuple(p.shape) for p in model.parameters()} == {True}


def test_speech_writes_a_sixteenth_of_its_frames(speech):
    assert speech.random_batch(2, 160)["labels"].shape == (2, 10)
    assert speech.random_batch(2, 16)["labels"].shape == (2, 2)
    assert speech.random_batch(2, 160)["input_features"].shape == (2, 160, 80)


def test_gpt_equals_eager_attention_and_has_no_dropout():
    fused, eager = (models.gpt(layers=2, attention=attention, **TINY) for attention in ("sdpa", "eager"))
    batch = fused.random_batch(2, 20)
    assert fused(**batch).loss.item() == fused(**batch).loss.item()
    torch.testing.assert_close(fused(**batch).loss, eager(**batch).loss)
    dropping = models.gpt(layers=2, dropout=0.5, **TINY)
    assert dropping(**batch).loss.item() != dropping(**batch).loss.item()


def test_the_recurrent_loss_is_of_the_next_token():
    model = small_models.recurrent(**SMALLEST["recurrent"])
    batch = model.random_batch(2, 10)
    loss, logits = model(**batch)
    chances = logits.log_softmax(dim=-1)
    by_hand = [-chances[row, cell, batch["labels"][row, cell + 1]] for row in range(2) for cell in range(9)]
    torch.testing.assert_close(loss, torch.stack(by_hand).mean())


def test_convolutional_stages_halve_the_side_and_double_the_channels():
    model = small_models.convolutional(width=4, stages=3, blocks_per_stage=2, image=16, device="cpu")
    shapes = []
    for block in model.blocks:
        block.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape[1:])))
    model(**model.random_batch(2))
    assert shapes == [(4, 16, 16)] * 2 + [(8, 8, 8)] * 2 + [(16, 4, 4)] * 2


def test_vision_cells_are_patches_and_a_class_token():
    model = models.vision(**{**SMALLEST["vision"], "patch": 2})
    cells = []
    model.vit.layernorm.register_forward_hook(lambda _module, _inputs, output: cells.append(output.shape[1]))
    model(**model.random_batch(2))
    assert cells == [17]


@pytest.mark.parametrize(
    ("name", "wrong", "sentence"),
    [
        ("vision", {"image": 10, "patch": 4}, "image is a multiple of patch; given: 10 and 4"),
        ("vision", {"classes": 1}, "classes is at least 2"),
        ("gpt", {"layers": 0}, "layers is at least 1; given: 0"),
        ("recurrent", {"vocabulary": 0}, "vocabulary is at least 1; given: 0"),
        ("convolutional", {"stages": 0}, "stages is at least 1; given: 0"),
        ("speech", {"decoder_layers": 0}, "decoder_layers is at least 1; given: 0"),
    ],
)
def test_impossible_sizes_are_refused_in_a_sentence(name, wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        small_models.build(name, **{**SMALLEST[name], **wrong})
