"""Interventions: what they change inside, that gradients and updates stay right, and that nothing is left of them."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch
import torch.utils.checkpoint as checkpointing

import effkit as ek
from effkit.advice.step_hooks import (
    ASKS,
    gradients_to_none,
    in_bfloat16,
    listening,
    nothing_recomputed,
    numbers_not_waited_for,
    without_intervening,
)
from effkit.recording import peak_memory

pytestmark = pytest.mark.usefixtures("one_thread")
ALL = (gradients_to_none, in_bfloat16, nothing_recomputed, numbers_not_waited_for, without_intervening)
BATCH = torch.randn(6, 4, generator=torch.Generator().manual_seed(1))


def stack():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))


def gradients(model, forward):
    model.zero_grad()
    forward(BATCH.clone().requires_grad_()).square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def touched(model):
    """Everything that an intervention puts something else into."""
    return (
        {name: vars(torch.Tensor).get(name) for name in (*ASKS, "unbind", "__iter__")},
        torch.optim.Optimizer.zero_grad, checkpointing.CheckpointFunction,
        checkpointing._checkpoint_without_reentrant_generator, vars(model).get("forward"), model.forward,
    )  # fmt: skip


# Undone


@pytest.mark.parametrize("intervention", ALL)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_left_of_it(intervention, fails):
    model = stack()
    before = touched(model)
    with suppress(KeyError), intervention(model):
        changed = touched(model) != before
        if fails:
            raise KeyError
    assert changed is (intervention is not without_intervening)
    assert touched(model) == before


def test_a_forward_of_the_users_own_comes_back():
    model = stack()
    mine = model.forward = lambda x: x * 2
    with in_bfloat16(model):
        assert torch.equal(model(BATCH), BATCH * 2)
    assert vars(model)["forward"] is mine


def test_one_inside_another():
    model, before = stack(), None
    before = touched(model)
    with gradients_to_none(model), in_bfloat16(model), nothing_recomputed(model), numbers_not_waited_for(model):
        assert model(BATCH).dtype == torch.bfloat16
    assert touched(model) == before


# Gradients let go


@pytest.mark.parametrize("told", [(), (True,), (False,)])
def test_gradients_are_let_go_whatever_zero_grad_is_told(told):
    model = stack()
    update = torch.optim.SGD(model.parameters())
    with gradients_to_none(model):
        model(BATCH).sum().backward()
        update.zero_grad(*told)
        assert all(parameter.grad is None for parameter in model.parameters())
    model(BATCH).sum().backward()
    update.zero_grad(set_to_none=False)
    assert all(not parameter.grad.any() for parameter in model.parameters())


def test_gradients_from_before_are_gone():
    model = stack()
    gradients(model, model)
    with gradients_to_none(model):
        assert all(parameter.grad is None for parameter in model.parameters())


def test_steps_learn_the_same_without_zeros():
    losses = {}
    for intervention in (without_intervening, gradients_to_none):
        model = stack()
        update = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses[intervention] = []
        for _ in range(4):
            with intervention(model):
                update.zero_grad(set_to_none=False)
                loss = model(BATCH).square().mean()
                loss.backward()
                update.step()
            losses[intervention].append(loss.item())
    assert losses[gradients_to_none] == losses[without_intervening]
    assert losses[gradients_to_none][-1] < losses[gradients_to_none][0]


# Nothing recomputed


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_keep_and_gradients_are_equal(reentrant):
    model = stack()

    def forward(x):
        return checkpointing.checkpoint(model, x, use_reentrant=reentrant)

    expected = gradients(model, forward)
    with listening(model) as plain:
        gradients(model, forward)
    with listening(model) as kept, nothing_recomputed(model):
        found = gradients(model, forward)
    assert plain.num_recomputed == 4
    assert kept.num_recomputed == 0
    assert all(map(torch.equal, found, expected))
    assert all(map(torch.equal, gradients(model, model), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_sequential_and_several_outputs(reentrant):
    model = stack()

    def two(x):
        return model(x), x * 2

    def forward(x):
        first, second = checkpointing.checkpoint(two, x, use_reentrant=reentrant)
        return checkpointing.checkpoint_sequential(model, 2, first + second, use_reentrant=reentrant)

    expected = gradients(model, forward)
    with nothing_recomputed(model):
        assert all(map(torch.equal, gradients(model, forward), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_model_of_transformers_recomputes_nothing(reentrant):
    model = ek.models.text(layers=2, hidden=32)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    batch = model.random_batch(2, 8)

    def run():
        model.zero_grad()
        with listening(model) as heard:
            model(**batch).loss.backward()
        return heard.num_recomputed, [parameter.grad.clone() for parameter in model.parameters()]

    num, expected = run()
    with nothing_recomputed(model):
        none, found = run()
    assert num > 2
    assert none == 0
    assert all(map(torch.equal, found, expected))


def test_keeping_takes_the_memory_that_checkpoints_save():
    """Each tanh keeps its output: of four blocks of eight, a checkpoint keeps the inputs and one block's at a time."""
    model = torch.nn.Sequential(*[torch.nn.Sequential(*[torch.nn.Tanh() for _ in range(8)]) for _ in range(4)])
    batch = torch.ones(64, 256, requires_grad=True)

    def step():
        x = batch
        for block in model:
            x = checkpointing.checkpoint(block, x, use_reentrant=False)
        x.sum().backward()
        batch.grad = None

    less, _ = peak_memory(step)
    with nothing_recomputed(model):
        more, _ = peak_memory(step)
    assert less < (4 + 8 + 4) * batch.nbytes
    assert more >= 4 * 8 * batch.nbytes


# bfloat16


def test_forward_runs_in_bfloat16_and_nothing_else_does():
    model, dtypes = stack(), []
    hook = model[1].register_forward_hook(lambda _, given, output: dtypes.append((given[0].dtype, output.dtype)))
    with in_bfloat16(model):
        output = model(BATCH)
        assert (BATCH @ BATCH.T).dtype == torch.float32
        output.float().sum().backward()
    hook.remove()
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    assert output.dtype == torch.bfloat16
    assert model(BATCH).dtype == torch.float32
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.float32}


# Numbers


def test_the_users_code_gets_zeros():
    with numbers_not_waited_for(stack()):
        answers = [
            torch.tensor(2.5).item(),
            float(torch.tensor(2.5)),
            torch.tensor(7).item(),
            torch.tensor(2.5).tolist(),
        ]
    assert answers == [0.0, 0.0, 0, 0.0]
    assert [type(one) for one in answers] == [float, float, int, float]
    assert torch.tensor(2.5).item() == 2.5


def test_the_users_code_gets_lists_of_zeros():
    tensors = torch.ones(2, 3), torch.ones(2, dtype=torch.int64), torch.tensor([True])
    with numbers_not_waited_for(stack()):
        answers = [one.tolist() for one in tensors]
    assert answers == [[[0.0] * 3] * 2, [0, 0], [False]]


def test_a_single_integer_stays_an_integer():
    with numbers_not_waited_for(stack()):
        answer = torch.tensor(3).tolist()
    assert isinstance(answer, int)


def test_elements_one_by_one():
    values = torch.arange(1.0, 6.0)
    with numbers_not_waited_for(stack()):
        assert [value.item() for value in values] == [0.0] * 5
        assert [value.shape for value in values.unbind()] == [torch.Size([])] * 5
        assert sum(float(value) for value in values) == 0
    assert [value.item() for value in values] == [1, 2, 3, 4, 5]


def test_what_is_differentiated_or_has_more_dimensions_is_true():
    weights = torch.arange(1.0, 4.0, requires_grad=True)
    with numbers_not_waited_for(stack()):
        rows = list(torch.eye(2))
        first, _, third = weights
        columns = torch.arange(6.0).reshape(2, 3).unbind(1)
        assert list(torch.ones(0)) == []
    assert torch.equal(torch.stack(rows), torch.eye(2))
    assert torch.equal(torch.stack(columns), torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))
    (first * third).backward()
    assert weights.grad.tolist() == [3.0, 0.0, 1.0]


def test_libraries_get_true_numbers():
    """AdamW asks for its step number, and a schedule and clipping rest on true numbers as well."""
    found = []
    for intervention in (without_intervening, numbers_not_waited_for):
        model = stack()
        update = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(3):
            with intervention(model):
                update.zero_grad()
                loss = model(BATCH).square().mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                loss.item()
                update.step()
        found.append([parameter.detach().clone() for parameter in model.parameters()])
    assert all(map(torch.equal, *found))
    assert not torch.equal(found[0][0], stack()[0].weight)


def test_a_library_is_told_by_where_its_code_lies():
    code = compile("def ask(value):\n    return value.item(), float(value), value.tolist()\n",
                   "/opt/site-packages/library.py", "exec")  # fmt: skip
    space = {}
    exec(code, space)
    with numbers_not_waited_for(stack()):
        assert space["ask"](torch.tensor(2.5)) == (2.5, 2.5, 2.5)
