"""unchanged(): steps are run inside, and everything that they changed is put back, however they end."""

from __future__ import annotations

import copy
import random
import sys
import threading
import types
from contextlib import suppress

import numpy as np
import pytest
import torch

from effkit.restoring import Reached, unchanged

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
    with suppress(KeyError), unchanged(model, step):
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
            with unchanged(model, step):
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
    with unchanged(model, print):
        assert all(parameter.grad is None for parameter in model.parameters())
        stepping(model, torch.optim.SGD(model.parameters()))()
    assert all(parameter.grad is one for parameter, one in zip(model.parameters(), before, strict=True))
    assert all(map(torch.equal, before, values))


def test_parameters_stay_the_objects_that_the_optimizer_knows():
    model = stack()
    update = torch.optim.AdamW(model.parameters())
    before = [(id(one), one.data_ptr()) for one in model.parameters()]
    with unchanged(model, print):
        stepping(model, update)()
    assert [(id(one), one.data_ptr()) for one in model.parameters()] == before
    assert [id(one) for one in update.param_groups[0]["params"]] == [key for key, _ in before]


def test_optimizers_that_nothing_leads_to_are_seen_when_they_step():
    model = stack()
    first, second = torch.optim.AdamW(model[0].parameters()), torch.optim.SGD(model[3].parameters(), momentum=0.9)
    idle = torch.optim.AdamW(model[1].parameters())
    stepping(model, first)()
    expected = copy.deepcopy(first.state_dict())
    with unchanged(model, print) as given:
        assert given.optimizers == []
        for update in (first, second, first):
            stepping(model, update)()
        assert given.optimizers == [first, second]
    assert same(first.state_dict(), expected)
    assert not second.state
    assert not idle.state


def test_a_schedule_leaves_no_learning_rate_behind():
    model = stack()
    update = torch.optim.SGD(model.parameters(), lr=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(update, 0.1)
    with unchanged(model, schedule):
        stepping(model, update)()
        schedule.step()
        assert update.param_groups[0]["lr"] == pytest.approx(0.05)
    assert update.param_groups[0]["lr"] == 0.5
    assert schedule.last_epoch == 0


def test_optimizers_are_not_listened_to_afterwards():
    from torch.optim import optimizer as optimizers

    before = len(optimizers._global_optimizer_pre_hooks)
    model = stack()
    with unchanged(model, print) as given:
        assert len(optimizers._global_optimizer_pre_hooks) == before + 1
    stepping(model, torch.optim.SGD(model.parameters()))()
    assert given.optimizers == []
    assert len(optimizers._global_optimizer_pre_hooks) == before


def test_one_inside_another():
    model = stack()
    update = torch.optim.AdamW(model.parameters())
    step = stepping(model, update)
    before = state(model, update)
    with unchanged(model, step):
        step()
        middle = state(model, update)
        with unchanged(model, step):
            step()
        after = state(model, update)
        assert same([middle[name] for name in ("torch", "gradients")], [after[name] for name in ("torch", "gradients")])
        assert not same(middle["model"], after["model"]), "the outer one gives weights back"
    assert same(before, state(model, update))


def test_tied_parameters_of_half_precision():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)).bfloat16()
    model[1].weight = model[0].weight
    update = torch.optim.SGD(model.parameters(), lr=0.5)
    before = copy.deepcopy(model.state_dict())
    with unchanged(model, print):
        model(BATCH.bfloat16()).square().sum().backward()
        update.step()
        assert not same(before, model.state_dict())
    assert same(before, model.state_dict())
    assert model[1].weight is model[0].weight


def test_parameters_that_only_the_optimizer_knows():
    """A loss with parameters of its own: in the optimizer, not in the model."""
    model, weight = stack(), torch.nn.Parameter(torch.ones(4))
    update = torch.optim.SGD([*model.parameters(), weight], lr=0.5)
    with unchanged(model, print):
        (model(BATCH).square() * weight).mean().backward()
        update.step()
        assert not torch.equal(weight, torch.ones(4))
    assert torch.equal(weight, torch.ones(4))


# Everything that a step reaches


class Loop:
    """What people's loops hold: an average of the weights, a schedule, a scaler, a count, what was seen."""

    __slots__ = ("__dict__", "count")

    def __init__(self):
        torch.manual_seed(0)
        self.model = stack()
        self.update = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.update, 0.05, total_steps=8)
        self.average = copy.deepcopy(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        self.seen, self.losses, self.last = set(), [], None
        self.table, self.moments = {}, np.zeros(3)
        self.draw, self.count = np.random.default_rng(0), 0

    def step(self, batch):
        self.update.zero_grad()
        loss = self.model(batch + float(self.draw.random())).square().mean()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.update)
        self.scaler.update()
        self.schedule.step()
        with torch.no_grad():
            for mean, now in zip(self.average.parameters(), self.model.parameters(), strict=True):
                mean.lerp_(now, 0.1)
        self.count += 1
        self.seen.add(self.count)
        self.losses.append(loss.item())
        self.table[self.count], self.last = loss.detach(), loss.detach()
        self.moments += 1

    def state(self):
        return copy.deepcopy([
            self.model.state_dict(), self.update.state_dict(), self.schedule.state_dict(), self.average.state_dict(),
            self.scaler.state_dict(), self.seen, self.losses, self.last, self.table, self.moments,
            self.draw.bit_generator.state, self.count,
        ])  # fmt: skip


@pytest.mark.parametrize("stepped", [0, 2])
@pytest.mark.parametrize("fails", [None, KeyError, KeyboardInterrupt])
def test_all_that_a_loop_holds_comes_out_as_it_went_in(stepped, fails):
    loop = Loop()
    for _ in range(stepped):
        loop.step(BATCH)
    before = loop.state()
    with suppress(KeyError, KeyboardInterrupt), unchanged(loop.model, loop.step) as given:
        for _ in range(6):  # more would be beyond the schedule's end
            loop.step(BATCH)
        if fails:
            raise fails
    assert given.unseen == []
    after = loop.state()
    assert [i for i, (one, other) in enumerate(zip(before, after, strict=True)) if not same(one, other)] == []
    for _ in range(8 - stepped):
        loop.step(BATCH)


COUNTED = [0]
NUMBER = 0


def counting_step():
    global NUMBER
    NUMBER += 1
    COUNTED.append(NUMBER)


def test_globals_that_the_code_names_and_cells_of_closures():
    number, noted = 0, []

    def step():
        nonlocal number
        number += 1
        noted.append(number)
        counting_step()

    with unchanged(stack(), step):
        step()
        step()
        assert (number, noted, NUMBER, COUNTED) == (2, [1, 2], 2, [0, 1, 2])
    assert (number, noted, NUMBER, COUNTED) == (0, [], 0, [0])


def test_states_keep_their_types_and_places():
    """Of bfloat16 parameters, float32 states: torch's load_state_dict would cast them."""
    model = torch.nn.Linear(4, 4).bfloat16()
    update = torch.optim.AdamW(model.parameters())
    model(BATCH.bfloat16()).square().mean().backward()
    update.step()
    for held in update.state.values():
        held["exp_avg"] = held["exp_avg"].float() + 1e-7
    before = {name: (id(value), value.dtype, value.clone()) for name, value in update.state[model.weight].items()}
    with unchanged(model, update):
        model(BATCH.bfloat16()).square().mean().backward()
        for held in update.state.values():
            held["exp_avg"] = held["exp_avg"].bfloat16()
        update.step()
    after = {name: (id(value), value.dtype, value.clone()) for name, value in update.state[model.weight].items()}
    assert [found[:2] for found in after.values()] == [found[:2] for found in before.values()]
    assert all(torch.equal(after[name][2], before[name][2]) for name in before)


def test_reassigned_buffers_frozen_parameters_and_new_groups():
    model = stack()
    update = torch.optim.SGD(model[3].parameters(), lr=0.1)
    mean = model[1].running_mean

    def step():
        model[1].running_mean = model[1].running_mean + 1
        model[0].weight.requires_grad_(False)
        update.add_param_group({"params": list(model[0].parameters()), "lr": 1.0})
        model.extra = torch.nn.Linear(2, 2)
        model[3].weight.data = torch.zeros(1)

    weight = model[3].weight.detach().clone()
    with unchanged(model, step):
        step()
    assert model[1].running_mean is mean
    assert model[0].weight.requires_grad
    assert len(update.param_groups) == 1
    assert not hasattr(model, "extra")
    assert torch.equal(model[3].weight, weight)


def test_values_that_are_no_numbers_any_more():
    model = stack()
    before = copy.deepcopy(model.state_dict())
    with unchanged(model), torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    assert same(before, model.state_dict())


def test_what_cannot_be_put_back_is_said():
    model, rows = stack(), iter([BATCH] * 9)

    def step():
        return model(next(rows))

    with unchanged(model, step) as given:
        step()
    assert given.unseen == ["a list_iterator that the step draws from: what it has drawn stays drawn"]


def test_large_tensors_beside_the_model_are_not_copied():
    reached = Reached(most_bytes=100)
    small, large = torch.zeros(10), torch.zeros(100)
    reached.add([small, large])
    small += 1
    large += 1
    reached.put_back()
    assert (float(small.sum()), float(large.sum())) == (0.0, 100.0)
    assert reached.unseen == ["400 B of tensors beside the model's: what a step writes into them stays"]


def test_containers_keep_their_order_and_their_kind():
    from collections import Counter, OrderedDict, defaultdict, deque

    held = {"ordered": OrderedDict(a=1, b=2), "counted": Counter("aab"), "default": defaultdict(list, x=[1]),
            "queue": deque([1, 2, 3], maxlen=3)}  # fmt: skip
    before = copy.deepcopy(held)
    reached = Reached()
    reached.add(held)
    held["ordered"].move_to_end("a")
    held["counted"]["c"] += 1
    held["default"]["y"].append(2)
    held["default"]["x"].append(2)
    held["queue"].append(4)
    held["new"] = 1
    reached.put_back()
    assert held == before
    assert list(held["ordered"]) == ["a", "b"]
    assert held["queue"].maxlen == 3
    held["ordered"]["c"] = 3
    assert list(held["ordered"]) == ["a", "b", "c"]


def test_what_holds_a_lock_or_a_thread_of_its_own_is_left_and_said(monkeypatch):
    """The client of a tracking service: its own thread works with it meanwhile."""
    library = types.ModuleType("tracking")
    library.__file__ = "/anywhere/site-packages/tracking.py"
    monkeypatch.setitem(sys.modules, "tracking", library)

    class Client:
        def __init__(self):
            self.lock, self.sent = threading.Lock(), []

    Client.__module__ = "tracking"
    model, client = stack(), Client()

    def step():
        client.sent.append(1)

    with unchanged(model, step) as given:
        step()
    assert client.sent == [1]
    assert given.unseen == [
        "a Client of tracking, which holds a lock, a thread or a file: what the step does to it stays"
    ]
