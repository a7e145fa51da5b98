"""Masks, two of four, sparse-wide layers and continual learning against counts by hand."""

import math

import pytest
import torch

from lessons import corpora
from lessons.precision import continual, pruning, small_language, sparse_layers

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"layers": 1, "hidden": 16, "ffn": 32, "heads": 2}


def test_width_factors_as_published():
    assert [round(sparse_layers.width_factor(s), 2) for s in (0, 0.5, 0.75, 0.9)] == [1, 1.41, 2, 3.16]
    with pytest.raises(ValueError, match=r"a share of 1\.0 zeros"):
        sparse_layers.width_factor(1.0)


def test_masks_keep_exactly_their_share_in_blocks_alone():
    model = small_language.untrained(**SMALL)
    masks = sparse_layers.static_masks(model, 0.75)
    assert set(masks) == set(small_language.matrices(model))
    assert "lm_head" not in masks
    assert all(int(mask.sum()) * 4 == mask.numel() for mask in masks.values())
    again = sparse_layers.static_masks(model, 0.75)
    assert all(torch.equal(mask, again[name]) for name, mask in masks.items())


def test_masked_weights_stay_zero_through_training():
    model, masks = sparse_layers.sparse_language(0, 0.75)
    text = corpora.encode(corpora.english())
    before = small_language.held_out_loss(model, text)
    sparse_layers.train_masked(model, masks, text, 8, 8e-3)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert (weight[~mask] == 0).all()
        assert (weight[mask] != 0).float().mean() > 0.99
    assert small_language.held_out_loss(model, text) < before


@pytest.mark.parametrize("sparsity", [0.5, 0.75, 0.9])
def test_sparse_wide_keeps_the_flops_and_stores_more(sparsity):
    sizes = [64, 64, 64, 8]
    _, dense = sparse_layers.perceptron(sizes)
    network, wide = sparse_layers.perceptron(sizes, sparsity)
    kept = sparse_layers.flops_per_example(wide)
    assert sparse_layers.flops_per_example(dense) == 2 * (64 * 64 + 64 * 64 + 64 * 8)
    assert kept == pytest.approx(sparse_layers.flops_per_example(dense), rel=1e-3)
    middle = wide["2"]
    assert middle.numel() / int(middle.sum()) == pytest.approx(1 / (1 - sparsity), rel=0.02)
    assert all((network[int(name)].weight != 0).sum() <= mask.sum() for name, mask in wide.items())
    assert sparse_layers.flops_per_example(wide, stored=True) > kept


def test_compressed_rows_are_the_same_matrix(recwarn):
    weight = torch.tensor([[0.0, 2, 0], [1, 0, 3]])
    compressed = sparse_layers.compressed_rows(weight)
    assert compressed.values().tolist() == [2, 1, 3]
    assert torch.equal(compressed @ torch.eye(3), weight)
    assert not recwarn.list


def test_fit_learns_and_holds_its_masks():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 8, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()
    network, masks = sparse_layers.perceptron([8, 32, 32, 2], 0.5)
    sparse_layers.fit(network, masks, x, y, num_epochs=40)
    assert (network(x).argmax(-1) == y).float().mean() > 0.9
    assert all((network[int(name)].weight[~mask] == 0).all() for name, mask in masks.items())


def test_two_and_a_half_times_less_as_published():
    gpt3_xl = {"layers": 24, "hidden": 2048, "vocabulary": 50_257, "context": 2048}
    dense, sparse = (sparse_layers.flops_per_token(**gpt3_xl, sparsity_frac=s).closed() for s in (0.0, 0.75))
    assert dense.total / sparse.total == pytest.approx(2.49, abs=0.005)
    assert dense.frame["value"].iloc[0] == 24 * 24 * 2048**2
    assert (dense.frame["value"].iloc[1:] == sparse.frame["value"].iloc[1:]).all()


def test_two_of_each_four_are_kept_by_magnitude():
    weight = torch.tensor([[1.0, -3, 2, 0.5, 0, 0, 0, 4]])
    kept = pruning.two_of_four(weight)
    assert kept[0, :4].tolist() == [False, True, True, False]
    assert kept.view(-1, 4).sum(1).tolist() == [2, 2]
    assert kept[0, 7]
    with pytest.raises(ValueError, match="rows have 6 weights"):
        pruning.two_of_four(torch.ones(2, 6))


def test_the_tail_is_what_pruning_takes():
    model = small_language.untrained(**SMALL)
    before = {name: layer.weight.detach().clone() for name, layer in small_language.matrices(model).items()}
    share = pruning.tail_share(model)
    sparse_layers.apply_masks(model, pruning.masks(model))
    left = sum(float(layer.weight.detach().square().sum()) for layer in small_language.matrices(model).values())
    assert share == pytest.approx(1 - left / sum(float(weight.square().sum()) for weight in before.values()), rel=1e-5)
    assert pruning.tail_share(model) == 0


def test_decay_ends_in_the_exact_pattern_and_keeps_the_norms():
    model = small_language.untrained(**SMALL)
    layers = small_language.matrices(model)
    norms = {name: layer.weight.detach().norm(dim=1) for name, layer in layers.items()}
    decay = pruning.Decay(model, num_steps=20, strength=4.0)
    shares = []
    for step in range(20):
        decay(step)
        shares.append(pruning.tail_share(model))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.05
    assert shares[-1] == 0
    for name, layer in layers.items():
        assert ((layer.weight != 0).view(-1, 4).sum(1) <= 2).all()
        torch.testing.assert_close(layer.weight.detach().norm(dim=1), norms[name], rtol=0.02, atol=0)
    with pytest.raises(ValueError, match="num_steps 0"):
        pruning.Decay(model, 0, 4.0)


def test_ways_to_two_of_four_leave_the_model_alone():
    model = small_language.untrained(**SMALL)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ways = pruning.ways_to_two_of_four(model, corpora.encode(corpora.english()), 6, lr=4e-3, strength=8.0)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert [pruning.tail_share(one) == 0 for one in ways.values()] == [False, True, True, True]
    first = "model.layers.0.mlp.up_proj"
    pattern = pruning.two_of_four(before[f"{first}.weight"])
    held, one_shot = (ways[name].get_submodule(first).weight for name in ("one shot, trained on", "one shot"))
    assert (held[~pattern] == 0).all()
    assert not torch.equal(held, one_shot)


def test_factors_of_a_saving_multiply():
    assert continual.Saving().times_less == 1
    assert continual.Saving(0.1, 0.1).times_less == pytest.approx(10)
    assert continual.Saving(0.25, 0.2, 0.5).times_less == pytest.approx(1 / 0.75 * 3 / 0.7)
    with pytest.raises(ValueError, match="no more gradients than weights"):
        continual.Saving(0.1, 0.2)


def test_the_ledger_of_dense_learning_is_three_products_per_weight():
    learnt = continual.learn(continual.Saving(), num_epochs=1)
    rows = learnt.work.closed().frame["value"]
    weights = [64 * 128, 128 * 128, 128 * 8]
    read = continual.PER_TASK * continual.NUM_TASKS + 32 * (continual.PER_TASK // 32) * (continual.NUM_TASKS - 1)
    assert rows["forward"] == rows["gradients of weights"] == 2 * read * sum(weights)
    assert rows["backward to activations"] == 2 * read * sum(weights[1:])
    assert rows["choosing the masks"] == 0


def test_less_is_read_and_learnt_under_a_saving():
    saving = continual.Saving(0.25, 0.2, 0.5)
    learnt, again = (continual.learn(saving, num_epochs=2) for _ in range(2))
    assert learnt.accuracy_frac == again.accuracy_frac > 1.5 / (2 * continual.NUM_TASKS)
    rows = learnt.work.frame["value"]
    assert rows["gradients of weights"] / rows["forward"] == pytest.approx(0.2 / 0.25, rel=0.01)
    assert rows["choosing the masks"] > 0
    dense = continual.learn(continual.Saving(), num_epochs=2).work.frame["value"]
    assert math.isclose(rows["forward"] / dense["forward"], 0.25 * 0.75, rel_tol=0.02)


def test_fewer_gradients_alone_are_a_saving_too():
    rows = continual.learn(continual.Saving(1.0, 0.5), num_epochs=1).work.frame["value"]
    assert rows["gradients of weights"] * 2 == rows["forward"]


def test_at_once_is_the_tasks_in_one():
    x, y, test_x, test_y = continual.at_once(1)
    assert x.shape == test_x.shape == (continual.NUM_TASKS * continual.PER_TASK, continual.CHANNELS)
    assert sorted(y.unique().tolist()) == sorted(test_y.unique().tolist()) == list(range(8))
    first = continual.tasks(1)[0][0]
    assert torch.equal(torch.cat([x[: continual.PER_TASK], test_x[: continual.PER_TASK]]), first)


def test_tasks_are_reproducible_and_have_two_classes_each():
    one, two = continual.tasks(1), continual.tasks(1)
    assert all(torch.equal(a[0], b[0]) for a, b in zip(one, two, strict=True))
    assert [sorted(y.unique().tolist()) for _, y in one] == [[0, 1], [2, 3], [4, 5], [6, 7]]
