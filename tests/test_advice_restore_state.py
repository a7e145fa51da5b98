"""restored(): steps are run inside, and everything that they learned is undone."""

from __future__ import annotations

import copy
import random
from contextlib import suppress

import numpy as np
import pytest
import torch

from effkit.advice.restore_state import restored

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
OPTIMIZERS = {
    "adamw": lambda given: torch.optim.AdamW(given, lr=0.05),
    "amsgrad": lambda given: torch.optim.Adam(given, lr=0.05, amsgrad=True),
    "momentum": lambda given: torch.optim.SGD(given, lr=0.05, momentum=0.9),
    "plain": lambda given: torch.optim.SGD(given, lr=0.05),
}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


def stack():
    """With buffers that learn, and with dropout."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 4)
    )


def stepping(model, update, clear_first=True):
    def step():
        if clear_first:
            update.zero_grad()
        loss = model(BATCH + random.random() + float(np.random.rand())).square().mean()  # noqa: NPY002
        loss.backward()
        update.step()
        if not clear_first:
            update.zero_grad(set_to_none=False)
        return loss.item()

    return step


def state(model, update):
    """Values, which do not change with what they were copied from."""
    return copy.deepcopy({
        "model": model.state_dict(), "gradients": [parameter.grad for parameter in model.parameters()],
        "modes": [module.training for module in model.modules()], "optimizer": update.state_dict(),
        "torch": torch.get_rng_state(), "numpy": np.random.get_state(), "random": random.getstate(),  # noqa: NPY002
    })  # fmt: skip


def same(one, other):
    if isinstance(one, torch.Tensor | np.ndarray):
        return type(one) is type(other) and bool((one == other).all())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@each_optimizer
@pytest.mark.parametrize("stepped", [0, 3])
@pytest.mark.parametrize("fails", [False, True])
def test_all_comes_out_as_it_went_in(make, stepped, fails):
    model = stack()
    update = make(model.parameters())
    step = stepping(model, update)
    for _ in range(stepped):
        step()
    before = state(model, update)
    with suppress(KeyError), restored(model):
        for _ in range(3):
            step()
        model.eval()
        changed = state(model, update)
        if fails:
            raise KeyError
    after = state(model, update)
    assert [name for name in before if not same(before[name], after[name])] == []
    unlearned = {name for name in before if same(before[name], changed[name])}
    assert unlearned <= ({"optimizer"} if make is OPTIMIZERS["plain"] else set())  # else this test says nothing


@each_optimizer
@pytest.mark.parametrize("clear_first", [True, False])
@pytest.mark.parametrize("stepped", [0, 2])
def test_a_training_that_goes_on_is_the_one_without(make, clear_first, stepped):
    def losses(studied):
        model = stack()
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002
        step = stepping(model, make(model.parameters()), clear_first)
        found = [step() for _ in range(stepped)]
        if studied:
            with restored(model):
                for _ in range(4):
                    step()
        return found + [step() for _ in range(4)]

    without = losses(False)
    assert losses(True) == without
    assert len(set(without)) == len(without)


def test_gradients_are_the_very_tensors():
    model = stack()
    model(BATCH).sum().backward()
    before = [parameter.grad for parameter in model.parameters()]
    values = [one.clone() for one in before]
    with restored(model):
        assert all(parameter.grad is None for parameter in model.parameters())
        stepping(model, torch.optim.SGD(model.parameters()))()
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, before, values))


def test_parameters_stay_the_objects_that_the_optimizer_knows():
    model = stack()
    update = torch.optim.AdamW(model.parameters())
    before = [(id(one), one.data_ptr()) for one in model.parameters()]
    with restored(model):
        stepping(model, update)()
    assert [(id(one), one.data_ptr()) for one in model.parameters()] == before
    assert [id(one) for one in update.param_groups[0]["params"]] == [key for key, _ in before]


def test_several_optimizers_are_seen_with_the_states_that_they_had():
    model = stack()
    first, second = torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[3].parameters(), momentum=0.9)
    idle = torch.optim.AdamW(model[1].parameters())
    stepping(model, first)()
    expected = copy.deepcopy(first.state_dict())
    with restored(model) as seen:
        assert seen == {}
        for update in (first, second, first):
            stepping(model, update)()
        assert list(seen) == [first, second]
        assert same(seen[first], expected)
        assert seen[second]["state"] == {}
    assert same(first.state_dict(), expected)
    assert not second.state
    assert not idle.state


def test_a_schedule_leaves_no_learning_rate_behind():
    model = stack()
    update = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(update, 0.1)
    with restored(model):
        stepping(model, update)()
        schedule.step()
        assert update.param_groups[0]["lr"] == pytest.approx(0.05)
    assert update.param_groups[0]["lr"] == 0.5


def test_optimizers_are_not_listened_to_afterwards():
    from torch.optim import optimizer as optimizers

    before = len(optimizers._global_optimizer_pre_hooks)
    model = stack()
    with restored(model) as seen:
        assert len(optimizers._global_optimizer_pre_hooks) == before + 1
    stepping(model, torch.optim.SGD(model.parameters()))()
    assert seen == {}
    assert len(optimizers._global_optimizer_pre_hooks) == before


def test_one_inside_another():
    model = stack()
    update = torch.optim.AdamW(model.parameters())
    step = stepping(model, update)
    before = state(model, update)
    with restored(model):
        step()
        middle = state(model, update)
        with restored(model):
            step()
        assert same(middle, state(model, update))
    assert same(before, state(model, update))


def test_tied_parameters_of_half_precision():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    model[1].weight = model[0].weight
    update = torch.optim.SGD(model.parameters(), lr=0.5)
    before = copy.deepcopy(model.state_dict())
    with restored(model):
        model(BATCH.bfloat16()).square().sum().backward()
        update.step()
        assert not same(before, model.state_dict())
    assert same(before, model.state_dict())
    assert model[1].weight is model[0].weight


def test_parameters_that_only_the_optimizer_knows():
    """A loss with parameters of its own: in the optimizer, not in the model."""
    model, weight = stack(), torch.nn.Parameter(torch.ones(4))
    update = torch.optim.SGD([*model.parameters(), weight], lr=0.5)
    with restored(model):
        (model(BATCH).square() * weight).mean().backward()
        update.step()
        assert not torch.equal(weight, torch.ones(4))
    assert torch.equal(weight, torch.ones(4))
