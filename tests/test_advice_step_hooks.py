"""listening(): what a step asks for, clears, casts and computes twice, counted by hand; and nothing stays patched."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext, suppress
from unittest import mock

import pytest
import torch
from torch.nn.modules import module as hooks
from torch.optim import optimizer as optimizers
from torch.utils.checkpoint import checkpoint

import effkit as ek
from effkit.advice.step_hooks import ASKS, RECOMPUTED, listening, own_code

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = torch.ones(6, 4)


def stack():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def stepping(model, update=None, **clear):
    update = update or torch.optim.AdamW(model.parameters())

    def step(forward=model):
        update.zero_grad(**clear)
        loss = forward(BATCH).square().mean()
        loss.backward()
        update.step()
        return loss

    return step


def patched():
    """Everything that listening() puts its ears to."""
    return {
        "asks": [name for name in ASKS if name in vars(torch.Tensor)],
        "backward": torch.autograd.backward,
        "zero_grad": torch.optim.Optimizer.zero_grad,
        "hooks": [len(one) for one in (hooks._global_forward_pre_hooks, hooks._global_forward_hooks,
                                       hooks._global_forward_hooks_always_called,
                                       optimizers._global_optimizer_pre_hooks)],
    }  # fmt: skip


# Numbers


def test_each_way_to_ask_is_counted():
    values = torch.arange(3.0)
    with listening(stack()) as heard:
        values[0].item()
        float(values[1])
        values.tolist()
        for value in values:
            value.item()
    assert heard.num_asked == 6
    assert sorted(heard.asked.values()) == [1, 1, 1, 3]


def test_the_answers_are_true():
    with listening(stack()):
        assert torch.tensor(2.5).item() == float(torch.tensor(2.5)) == 2.5
        assert torch.tensor([1, 2]).tolist() == [1, 2]


def test_an_optimizers_own_questions_are_not_counted():
    """AdamW reads its step counter with item()."""
    model = stack()
    step = stepping(model)
    step()
    asked = Counter()
    native = torch.Tensor.item

    def noting(self):
        asked["item"] += 1
        return native(self)

    with mock.patch.object(torch.Tensor, "item", noting):
        step()
    assert asked["item"] > 0
    with listening(model) as heard:
        step()
    assert heard.asked == {}


def test_place_and_line_are_named():
    def log(loss):
        return loss.item()

    line = log.__code__.co_firstlineno + 1
    with listening(stack()) as heard:
        log(torch.tensor(1.0))
        log(torch.tensor(2.0))
    assert heard.asked == {f"test_advice_step_hooks.py, log(), line {line}": 2}


@pytest.mark.parametrize("filename", ["<string>", "/tmp/ipykernel_17/123.py"])
def test_a_cell_of_a_notebook_has_no_file_to_name(filename):
    code = compile("def ask(value):\n    return value.item()\n", filename, "exec")
    space = {}
    exec(code, space)
    with listening(stack()) as heard:
        space["ask"](torch.tensor(1.0))
    assert heard.asked == {"ask(), line 2": 1}


def test_libraries_are_not_the_users_code():
    assert own_code("/home/me/train.py")
    assert own_code("<ipython-input>")
    assert not own_code(torch.__file__)
    assert not own_code("/usr/lib/python3/dist-packages/x.py")


# Gradients, casts, phases


@pytest.mark.parametrize(
    ("clear", "let_go", "zeroed"),
    [({}, True, False), ({"set_to_none": True}, True, False), ({"set_to_none": False}, False, True)],
)
def test_the_way_in_which_gradients_are_cleared(clear, let_go, zeroed):
    model = stack()
    stepping(model, **clear)()
    with listening(model) as heard:
        stepping(model, **clear)()
    assert (heard.let_go, heard.zeroed) == (let_go, zeroed)


def test_clearing_does_what_it_did():
    model = stack()
    update = torch.optim.SGD(model.parameters())
    model(BATCH).sum().backward()
    with listening(model):
        update.zero_grad(False)
        assert all(not p.grad.any() for p in model.parameters())
        update.zero_grad()
        assert all(p.grad is None for p in model.parameters())


def test_gradients_that_nobody_clears():
    model = stack()
    model(BATCH).sum().backward()
    with listening(model) as heard:
        model(BATCH).sum().backward()
    assert heard.let_go is False
    assert not heard.zeroed


def test_no_backward_at_all():
    model = stack()
    with listening(model) as heard:
        model(BATCH)
    assert heard.let_go is None


@pytest.mark.parametrize("none", [True, False])
def test_the_models_own_way_to_clear(none):
    model = stack()
    model(BATCH).sum().backward()
    with listening(model) as heard:
        model.zero_grad(set_to_none=none)
        model(BATCH).sum().backward()
    assert (heard.let_go, heard.zeroed) == (none, not none)


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast(enabled):
    model = stack()
    with listening(model) as heard, torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        model(BATCH)
    assert heard.autocast is enabled


def test_phases_in_their_order():
    model, entered = stack(), []
    update = torch.optim.SGD(model.parameters())
    with listening(model, entered.append) as heard:
        for _ in range(2):
            model(BATCH).sum().backward()
        update.step()
    assert heard.phases == entered == ["backward", "backward", "optimizer"]
    assert heard.forwards == 2


def test_a_step_that_does_not_call_the_model_itself():
    model = stack()
    with listening(model) as heard:
        stepping(model)(forward=lambda x: model[2](model[1](model[0](x))))
    assert heard.forwards == 0
    assert heard.phases == ["backward", "optimizer"]


# Recomputation


@pytest.mark.parametrize("reentrant", [True, False])
def test_modules_that_are_computed_twice(reentrant):
    model = stack()
    step = stepping(model)
    given = BATCH.clone().requires_grad_()
    with listening(model) as heard:
        for number in (1, 2):
            step(lambda _: checkpoint(model, given, use_reentrant=reentrant))
            assert heard.num_recomputed == 4 * number  # the Sequential and its three
            assert heard.forwards == 2 * number


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_is_marked_once_for_all_that_it_holds(reentrant):
    model = stack()
    step = stepping(model)
    given = BATCH.clone().requires_grad_()
    with listening(model):
        seen = ek.capture(lambda: step(lambda _: checkpoint(model, given, use_reentrant=reentrant)), warmup=1, steps=2)
    marks = seen.events[seen.events["name"] == RECOMPUTED]
    assert len(marks) == 2
    inside = seen.events[seen.events["name"] == "aten::tanh"]
    ends = marks["start_ns"] + marks["dur_ns"]
    covered = [((marks["start_ns"] <= at) & (at < ends)).any() for at in inside["start_ns"]]
    assert covered == [False, True] * 2  # forward, and again in backward


def test_nothing_is_computed_twice_without_checkpoints():
    model = stack()
    with listening(model) as heard:
        stepping(model)()
    assert heard.num_recomputed == 0


# Afterwards


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_patched(fails):
    model, before = stack(), patched()
    step = stepping(model)

    def forward(x):
        if fails:
            raise KeyError("the step's own")
        return model(x)

    with pytest.raises(KeyError) if fails else nullcontext(), listening(model):
        assert patched() != before
        step(forward)
    assert patched() == before


def test_backward_that_fails_is_over():
    model = stack()
    with listening(model) as heard:
        with suppress(RuntimeError):
            torch.ones(3).sum().backward()
        model(BATCH)
    assert heard.phases == ["backward"]
    assert heard.num_recomputed == 0


def test_a_listened_step_learns_the_same():
    plain, listened = stack(), stack()
    first, second = stepping(plain), stepping(listened)
    losses = [first().item() for _ in range(3)]
    with listening(listened):
        assert [second().item() for _ in range(3)] == losses
