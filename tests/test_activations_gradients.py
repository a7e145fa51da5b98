"""gradient_error() measures what a lever does to the gradient, and leaves the model as it was."""

import copy

import pytest
import torch
from torch import nn

from effkit.activations.compressing import compressed
from effkit.activations.gradients import gradient_error
from effkit.activations.saved_tensor_hooks import Place, stage


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layers = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, 1)
        self.layers, self.unused = nn.Sequential(*layers), nn.Linear(2, 2)

    def forward(self, x, scale=1.0):
        return scale * self.layers(x)


def loss(output):
    return output.square().mean()


@pytest.fixture
def net():
    return Net().train()


@pytest.fixture
def batches():
    return list(torch.randn(4, 32, 8))


def doubled():
    """What is saved comes back twice as large."""
    return stage(Place.COMPRESS, lambda original, kept: (kept,), lambda kept: 2 * kept[0])


def test_a_lossless_lever_has_no_error(net, batches):
    table = gradient_error(net, batches[0], lambda: stage(Place.WATCH, lambda _, kept: kept, lambda k: k), loss=loss)
    named = [name for name, _ in net.named_parameters() if "unused" not in name]
    assert table["parameter"].tolist() == [*named, "all"]
    assert (table["relative_error"] == 0).all()
    assert table["cosine"].iloc[-1] == pytest.approx(1)
    assert table["noise_cosine"].isna().all()
    assert table["num_elements"].iloc[-1] == table["num_elements"].iloc[:-1].sum() == 8 * 16 + 16 + 32 + 16 + 1


def test_a_known_error_is_found():
    linear, x = nn.Linear(4, 1, bias=False), torch.randn(3, 4)
    table = gradient_error(linear, x, doubled, loss=lambda output: output.sum())
    assert table["relative_error"].tolist() == pytest.approx([1, 1])
    assert table["cosine"].tolist() == pytest.approx([1, 1])


def test_noise_is_the_mean_over_other_batches():
    linear, x = nn.Linear(2, 1, bias=False), torch.tensor([[1.0, 0.0]])
    others = [torch.tensor([[0.0, 1.0]]), torch.tensor([[2.0, 0.0]])]
    last = gradient_error(linear, x, doubled, loss=lambda output: output.sum(), batches=others).iloc[-1]
    assert last["noise_relative_error"] == pytest.approx((2**0.5 + 1) / 2)
    assert last["noise_cosine"] == pytest.approx(0.5)


def test_compression_errs_less_than_batches_differ(net, batches):
    table = gradient_error(net, batches[0], lambda: compressed(min_elements=1), loss=loss, batches=batches[1:])
    last = table.iloc[-1]
    assert 0 < last["relative_error"] < 0.1 * last["noise_relative_error"]
    assert last["noise_cosine"] < last["cosine"] <= 1


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_comes_out_as_it_went_in(net, batches, fails):
    loss(net(batches[1])).backward()
    state = copy.deepcopy(net.state_dict())
    grads = [None if p.grad is None else (p.grad, p.grad.clone()) for p in net.parameters()]
    random = torch.get_rng_state()

    def broken(output):
        raise KeyError

    if fails:
        with pytest.raises(KeyError):
            gradient_error(net, batches[0], compressed, loss=broken)
    else:
        gradient_error(net, batches[0], compressed, loss=loss, batches=batches[1:])
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    for parameter, before in zip(net.parameters(), grads, strict=True):
        assert (parameter.grad is None) == (before is None)
        assert before is None or (parameter.grad is before[0] and torch.equal(*before))


def test_batches_are_given_as_the_model_takes_them(net, batches):
    x = batches[0]
    tables = [
        gradient_error(net, batch, lambda: compressed(min_elements=1), loss=loss)
        for batch in (x, (x, 1.0), [x], {"x": x, "scale": 1.0})
    ]
    assert all(table.equals(tables[0]) for table in tables)


def test_a_model_that_is_not_trained():
    with pytest.raises(ValueError, match="no parameter of Linear requires one"):
        gradient_error(nn.Linear(2, 2).requires_grad_(False), torch.ones(1, 2), compressed, loss=loss)
