"""One training step of any model: its loss, what stays in memory, and the model given back as it was."""

from collections import UserDict
from typing import NamedTuple

import pytest
import torch
from activation_models import assert_same, state_of
from torch import nn
from transformers import BatchEncoding

from effkit.restoring import unchanged
from effkit.training import forward, own_loss, residents, size_bytes, still


class Sum(nn.Module):
    def forward(self, left, right=None):
        return left if right is None else left + 2 * right


class Output(NamedTuple):
    loss: object


ONE, TWO = torch.ones(3), torch.full((3,), 5.0)


@pytest.mark.parametrize(
    "batch",
    [
        {"left": ONE, "right": TWO},
        UserDict(right=TWO, left=ONE),
        BatchEncoding({"left": ONE, "right": TWO}),
        (ONE, TWO),
        [ONE, TWO],
    ],
)
def test_a_mapping_is_keywords_and_a_sequence_is_arguments(batch):
    assert torch.equal(forward(Sum(), batch), torch.full((3,), 11.0))


def test_a_tensor_is_the_one_argument():
    assert forward(Sum(), ONE) is ONE


def test_the_loss_is_the_models_own():
    scalar = torch.tensor(3.0)
    assert own_loss(scalar) is scalar
    assert own_loss(Output(scalar)) is scalar


@pytest.mark.parametrize(
    ("output", "name"), [(ONE, "Tensor"), (Output(None), "Output"), (Output(3.0), "Output"), ({}, "dict")]
)
def test_an_output_without_a_loss_is_refused_in_one_sentence(output, name):
    with pytest.raises(ValueError, match=f"the output, a {name}, has no loss: give the batch its labels, or loss="):
        own_loss(output)


@pytest.mark.parametrize(
    "make", [None, torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.5, momentum=0.9, weight_decay=0.1)]
)
def test_a_still_optimizer_does_its_work_and_learns_nothing(make):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    update = still(model.parameters(), make)
    for _ in range(3):
        model(torch.randn(5, 4)).square().mean().backward()
        update.step()
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert len(update.state) == 2


def test_a_still_optimizer_is_adamw_unless_another_is_made():
    assert type(still(nn.Linear(2, 2).parameters())) is torch.optim.AdamW
    assert type(still(nn.Linear(2, 2).parameters(), torch.optim.Adam)) is torch.optim.Adam


def test_every_group_of_an_optimizer_is_still():
    def make(parameters):
        first, second = parameters
        return torch.optim.SGD([{"params": [first], "lr": 1.0}, {"params": [second], "lr": 2.0}], lr=0.1)

    assert [group["lr"] for group in still(nn.Linear(2, 2).parameters(), make).param_groups] == [0.0, 0.0]


# What stays in memory


def stepped(model, batch, **options):
    update = still(model.parameters(), **options)
    forward(model, batch).square().mean().backward()
    update.step()
    return update


def test_residents_are_counted_to_the_byte():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5))
    batch = torch.randn(4, 6)
    found = residents(model, stepped(model, batch), batch)
    parameters = sum(p.nbytes for p in model.parameters())
    assert {name: size_bytes(tensors) for name, tensors in found.items()} == {
        "parameter": parameters,
        "buffer": sum(b.nbytes for b in model.buffers()),
        "optimizer state": 2 * parameters + 4 * len(list(model.parameters())),  # a step count each
        "input": batch.nbytes,
    }


def test_tied_weights_and_shared_storages_stand_once():
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False))
    model[1].weight = model[0].weight
    batch = torch.randn(4, 6)
    model.register_buffer("view", batch[:2])
    found = residents(model, still(model.parameters()), (batch, batch[1:]))
    assert size_bytes(found["parameter"]) == 6 * 6 * 4
    assert size_bytes(found["buffer"]) == batch.nbytes
    assert found["input"] == []


def test_a_view_of_a_batch_holds_its_whole_storage():
    model, whole = nn.Linear(6, 5), torch.randn(100, 6)
    assert size_bytes(residents(model, still(model.parameters()), {"input": whole[:4]})["input"]) == whole.nbytes


def test_what_is_no_tensor_takes_no_bytes():
    model = nn.Linear(6, 5)
    assert residents(model, still(model.parameters()), {"input": torch.ones(2, 6), "flag": True, "n": 3})["input"]


# Given back


@pytest.fixture
def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Dropout(0.5)).train()
    made[1].eval()
    made[0].weight.grad = torch.full_like(made[0].weight, 7.0)
    return made


def disturb(model):
    model.train()
    model[2].eval()
    update = still(model.parameters())
    model(torch.randn(8, 6) + 3).square().mean().backward()
    update.step()


def test_the_model_is_given_back_as_it_was(model):
    before, gradient = state_of(model), model[0].weight.grad
    with unchanged(model):
        assert all(parameter.grad is None for parameter in model.parameters())
        disturb(model)
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert_same(state_of(model), before)
    assert model[0].weight.grad is gradient
    assert model[0].bias.grad is None


def test_it_is_given_back_when_the_step_raises(model):
    before = state_of(model)

    def interrupted():
        with unchanged(model):
            disturb(model)
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        interrupted()
    assert_same(state_of(model), before)
