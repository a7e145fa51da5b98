"""What a step leaves in memory: bytes that can be counted by hand, and the name of what holds them."""

from __future__ import annotations

import gc
from collections import deque

import pytest
import torch

from effkit.advice.leaks import Kept, detached_after, growth_bytes, kept, new_graphs

pytestmark = pytest.mark.usefixtures("one_thread", "small_heap")
BATCH = torch.ones(40, 10)
GRAPH_BYTES = 40 * 10 * 4  # what the graph of losing() keeps: the input of square()
history_of_losses: list = []


def stack():
    torch.manual_seed(0)
    return torch.nn.Linear(10, 10)


def losing(keep):
    """A step that hands its loss, with its graph, to ``keep``."""
    model = stack()

    def step(batch):
        keep(model(batch).square().mean())

    return step


def training(first, none, keep=lambda _: None):
    model = stack()
    update = torch.optim.AdamW(model.parameters())

    def step(batch):
        if first:
            update.zero_grad(set_to_none=none)
        loss = model(batch).square().mean()
        loss.backward()
        update.step()
        if not first:
            update.zero_grad(set_to_none=none)
        keep(loss)

    return step


# Growth


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("none", [True, False])
def test_a_clean_step_adds_nothing(first, none):
    step = training(first, none)
    step(BATCH)
    assert growth_bytes(lambda: step(BATCH)) == 0
    assert kept(step, BATCH) == Kept(0)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("num", [1, 250, 100_000])
def test_a_tensor_of_known_size(first, num):
    left = []
    step = training(first, True, lambda _: left.append(torch.zeros(num)))
    assert growth_bytes(lambda: step(BATCH)) == 4 * num


def test_what_is_let_go_is_not_growth():
    last = [None]

    def step():
        last[0] = torch.zeros(5000)

    assert growth_bytes(step) == 0


def test_what_only_a_cycle_holds_is_not_growth():
    def step():
        ring = [torch.zeros(5000)]
        ring.append(ring)

    gc.disable()
    try:
        assert growth_bytes(step) == 0
    finally:
        gc.enable()


# Tensors with a graph


def test_a_list_of_losses():
    losses = []

    def keep(loss):
        losses.append(loss)

    assert kept(losing(keep), BATCH) == Kept(GRAPH_BYTES + 4, 1, 4, ("losses",))


def test_a_global_list():
    gc.unfreeze()  # the dictionary of this file was there before
    found = kept(losing(history_of_losses.append), BATCH)
    gc.freeze()
    history_of_losses.clear()
    assert found == Kept(GRAPH_BYTES + 4, 1, 4, ("history_of_losses",))


@pytest.mark.parametrize("num", [2, 3])
def test_several_tensors_of_a_step(num):
    outputs = []

    def keep(loss):
        outputs.extend(loss * torch.ones(64) for _ in range(num))

    found = kept(losing(keep), BATCH)
    assert (found.num_tensors, found.own_bytes, found.holders) == (num, num * 64 * 4, ("outputs",))


def test_a_dictionary_and_its_key():
    log = {"losses": []}
    assert kept(losing(lambda loss: log["losses"].append(loss)), BATCH).holders == ("losses",)
    rows = []
    assert kept(losing(lambda loss: rows.append({"the loss": loss})), BATCH).holders == ("the loss",)


def test_an_attribute_of_a_module():
    module = torch.nn.Linear(1, 1)
    module.outputs = []
    assert kept(losing(module.outputs.append), BATCH).holders == ("outputs",)


def test_an_attribute_of_a_plain_object():
    class Trainer:
        def __init__(self):
            self.losses = []

    trainer = Trainer()
    assert kept(losing(lambda loss: trainer.losses.append(loss)), BATCH).holders == ("losses",)


def test_other_containers():
    latest = deque(maxlen=1000)
    assert kept(losing(lambda loss: latest.append(loss)), BATCH).holders == ("latest",)
    pairs = []
    assert kept(losing(lambda loss: pairs.append((1, loss))), BATCH).holders == ("a tuple",)


def running_total():
    """The leak that everybody knows: one tensor, whose graph holds those of all steps."""
    total = 0.0

    def keep(loss):
        nonlocal total
        total = total + loss

    return losing(keep)


def test_a_running_total_grows():
    found = kept(running_total(), BATCH)
    assert found.growth_bytes == GRAPH_BYTES
    assert found.holders == ("total",)


def test_a_running_total_is_a_tensor_that_is_left():
    assert kept(running_total(), BATCH).num_tensors == 1


def test_a_running_total_in_an_attribute():
    class Trainer:
        total = 0.0

        def keep(self, loss):
            self.total = self.total + loss

    found = kept(losing(Trainer().keep), BATCH)
    assert found.growth_bytes == GRAPH_BYTES
    assert found.own_bytes <= 4
    assert found.holders == ("total",)


# No false alarm


@pytest.mark.parametrize("keep", [
    lambda loss, log: log.append(loss.item()), lambda loss, log: log.append(float(loss.detach())),
    lambda loss, log: log.append(loss.detach()), lambda loss, log: log.append({"step": len(log), "loss": loss.item()}),
])  # fmt: skip
def test_values_without_a_graph(keep):
    log = []
    found = kept(losing(lambda loss: keep(loss, log)), BATCH)
    assert found.growth_bytes <= 4
    assert (found.num_tensors, found.own_bytes, found.holders) == (0, 0, ())


def test_a_graph_from_before_is_not_the_steps():
    old = [stack()(BATCH).square().mean() for _ in range(5)]
    left = []
    found = kept(lambda _: left.append(torch.zeros(1000)), BATCH)
    assert found == Kept(4000)
    assert len(old) == 5


def test_what_grows_without_a_graph_has_bytes_and_no_tensors():
    left = []
    assert kept(losing(lambda loss: left.append(loss.detach() * torch.ones(1000))), BATCH) == Kept(4000)


# Graphs that come and go


def test_only_new_graphs_are_found():
    before = stack()(BATCH)
    with new_graphs() as found:
        assert found() == []
        one = stack()(BATCH)
        stack()(BATCH)  # dropped at once
        plain = one.detach()
        (only,) = found()
        assert only is one
    assert before.grad_fn is not None
    assert plain.grad_fn is None


def test_detaching_frees_the_graph_and_keeps_the_values():
    losses, values = [], []
    step = losing(losses.append)
    freed = detached_after(step)
    assert growth_bytes(lambda: step(BATCH)) == GRAPH_BYTES + 4
    losses.clear()
    assert growth_bytes(lambda: freed(BATCH)) == 4
    assert all(loss.grad_fn is None for loss in losses)
    values += [loss.item() for loss in losses]
    assert len(set(values)) == 1
    assert values[0] == stack()(BATCH).square().mean().item()
    assert kept(freed, BATCH).num_tensors == 0


def test_detaching_a_running_total_stops_its_growth():
    freed = detached_after(running_total())
    assert growth_bytes(lambda: freed(BATCH)) == 0


def test_detaching_leaves_graphs_from_before():
    old = stack()(BATCH)
    detached_after(losing([].append))(BATCH)
    assert old.grad_fn is not None
    old.sum().backward()


def test_a_view_that_cannot_be_detached_is_left():
    views = []
    detached_after(losing(lambda loss: views.append((loss * torch.ones(4)).unbind()[0])))(BATCH)
    assert len(views) == 1
