"""study(), the door: what it refuses, what it says of small planted trainings, and that they go on as if unstudied."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from planted import loader, training
from torch import nn
from torch.utils.data import DataLoader

import effkit as ek
from effkit.advice.overviews import NO_CEILINGS, ceilings

pytestmark = pytest.mark.usefixtures("one_thread")
COLUMNS = ["reached", "ceiling", "reached_frac", "ceiling_text", "definition"]
LENGTHS = [5, 30, 12, 7, 22, 9, 16, 28]


def stack():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.1), nn.Linear(16, 8))


def stepping(model, forward=None):
    update = torch.optim.AdamW(model.parameters(), lr=0.01)

    def step(x):
        update.zero_grad()
        loss = (forward or model)(x).square().mean()
        loss.backward()
        update.step()
        return loss.item()

    step.update = update
    return step


def studied(model, step=None, batches=None, **more):
    batches = [torch.ones(4, 8)] * 3 if batches is None else batches
    return ek.study(step=step or stepping(model), model=model, loader=batches, num_batches=2, **more)


@pytest.fixture(scope="module")
def texts():
    """A small training with padding; what its model and optimizer were before, and the study."""
    model = ek.models.text(layers=1, hidden=32)
    update = torch.optim.AdamW(model.parameters(), lr=0.01)
    given = training(model, loader(LENGTHS, batch_size=4), optimizer=update)
    given["step"](next(iter(given["loader"])))
    before = copy.deepcopy((model.state_dict(), update.state_dict(), [one.grad for one in model.parameters()]))
    study = ek.study(**given, num_batches=2)
    return SimpleNamespace(study=study, view=study.overview(), model=model, update=update, before=before)


# What it refuses


@pytest.mark.parametrize(("given", "names"), [
    ({}, "none of them"), ({"model": stack()}, "none of them"), ({"loader": []}, "none of them"),
    ({"step": print, "generate": {}}, "step and generate"),
    ({"step": print, "trace": "a"}, "step and trace or snapshot"),
    ({"step": print, "generate": {}, "snapshot": "b"}, "step and generate and trace or snapshot"),
])  # fmt: skip
def test_one_door_of_three(given, names):
    with pytest.raises(TypeError, match=rf"study\(\) takes one of: step= .*generate= .*trace= .*given: {names}$"):
        ek.study(**given)


@pytest.mark.parametrize("door", ["step", "generate"])
def test_the_model_is_missing(door):
    with pytest.raises(TypeError, match=rf"study\({door}=\.\.\.\) takes model= as well: the module that is run"):
        ek.study(**{door: print})


@pytest.mark.parametrize("step", [3, "step", []])
def test_a_step_is_called(step):
    with pytest.raises(TypeError, match=r"step is a function step\(batch\), or step\(\) without a loader; given: "):
        ek.study(step=step, model=stack())


@pytest.mark.parametrize("batches", [[], iter([]), loader([3] * 4, batch_sampler=[])])
def test_an_empty_loader(batches):
    model = stack()
    with pytest.raises(ValueError, match="the loader is empty: there is no batch to study"):
        ek.study(step=stepping(model), model=model, loader=batches)


def test_a_step_that_fails_leaves_the_model_as_it_was():
    model = stack()
    inner, before = stepping(model), copy.deepcopy(model.state_dict())

    def step(x):
        inner(x)
        raise KeyError("the step's own")

    with pytest.raises(KeyError, match="the step's own"):
        studied(model, step)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not inner.update.state


def test_a_model_that_is_none():
    with pytest.raises(TypeError, match="model"):
        ek.study(step=print, model="a model", loader=[1])


def test_a_number_of_batches():
    with pytest.raises(ValueError, match="num_batches"):
        ek.study(step=print, model=stack(), loader=[1, 2], num_batches=-1)


# Ceilings, on a made-up device


def test_ceilings_of_a_device():
    device = SimpleNamespace(
        rate_flops_per_s={"float32": 1e12, "bfloat16": 4e12}, launch_overhead_ns=2000, memory_bytes=10_000
    )
    given = {"step_ns": 3e6, "forward_flops": 10**9, "num_operators": 600, "peak_bytes": 2500}
    frame = ceilings(device, half=False, real_frac=0.5, **given)
    assert list(frame) == COLUMNS
    assert frame["reached_frac"].to_dict() == pytest.approx({
        "model FLOPs utilisation": 1.0, "the same without padding": 0.5, "launch floor": 0.4, "memory": 0.25,
    })  # fmt: skip
    half = ceilings(device, half=True, real_frac=None, **(given | {"peak_bytes": None}))
    assert half["reached_frac"].to_dict() == pytest.approx({"model FLOPs utilisation": 0.25, "launch floor": 0.4})
    assert "4,000 GFLOP/s measured in bfloat16" in half["ceiling_text"].tolist()
    assert list(NO_CEILINGS) == COLUMNS


# A small planted training


def test_its_ledgers_close(texts):
    assert texts.view.memory.residual == 0
    assert texts.view.time.closed(0.05).unit == "ns"
    assert (texts.view.time.frame["value"] > 0).all()
    assert {"waiting for data", "optimizer"} <= set(texts.view.time.frame.index)
    assert texts.view.time.setting == {"num_steps": 2, "num_examples": 8}


def test_its_memory_holds_what_can_be_counted(texts):
    rows = texts.view.memory.frame["value"]
    parameters = sum(one.nbytes for one in texts.model.parameters())
    num_parameters = len(list(texts.model.parameters()))
    assert rows["parameter"] == parameters
    assert rows["optimizer state"] == 2 * parameters + 4 * num_parameters  # two moments and a step counter
    assert rows["input"] == sum(one.nbytes for one in texts.study.largest.values())


def test_its_ceilings(texts):
    frame = texts.view.ceilings
    assert list(frame) == COLUMNS
    assert list(frame.index) == ["model FLOPs utilisation", "the same without padding", "launch floor", "memory"]
    assert (frame["reached_frac"] > 0).all()
    real = texts.study.epoch.companion("Input cells of one epoch").share["real"]
    by_name = frame["reached"]
    assert by_name["the same without padding"] / by_name["model FLOPs utilisation"] == pytest.approx(real)


def test_what_is_found(texts):
    cells = sum(batch["input_ids"].numel() for batch in texts.study.batches)
    assert texts.view.found == ("Text: 1 attention", f"{1 - sum(LENGTHS) / cells:.0%} of the input cells are padding")
    assert texts.view.unseen == ()
    assert all(name in repr(texts.view) for name in texts.view.ceilings.index)
    assert isinstance(texts.study.compare(texts.study), pd.DataFrame)


def test_model_and_optimizer_are_as_before(texts):
    model, update, gradients = texts.before
    assert all(torch.equal(value, model[name]) for name, value in texts.model.state_dict().items())
    now = texts.update.state_dict()
    assert now["param_groups"] == update["param_groups"]
    assert all(
        torch.equal(value, update["state"][i][name]) for i, one in now["state"].items() for name, value in one.items()
    )
    assert all(map(torch.equal, [one.grad for one in texts.model.parameters()], gradients))
    assert texts.study.optimizers == (texts.update,)


def test_a_training_that_goes_on_is_the_one_without():
    def losses(look):
        model = stack()
        step = stepping(model)
        found = [step(torch.ones(4, 8)) for _ in range(2)]
        if look:
            studied(model, step).overview()
        return found + [step(torch.ones(4, 8)) for _ in range(4)]

    assert losses(True) == losses(False)


def test_a_step_without_backward_has_an_overview():
    model = stack()
    assert studied(model, lambda x: model(x).sum()).overview().memory.residual == 0


def test_a_model_that_clears_its_gradients():
    """Those from before are counted beside those that the step makes: what is let go of in between is not seen."""
    model = stack()
    update = torch.optim.SGD(model.parameters())

    def clearing(x):
        model.zero_grad()
        model(x).square().mean().backward()
        update.step()

    assert studied(model, clearing).memory.residual == 0


# What is not visible


def test_without_a_loader():
    model = stack()
    step, batch = stepping(model), torch.ones(4, 8)
    study = ek.study(step=lambda: step(batch), model=model)
    assert study.unseen == ["padding and the input pipeline: step() draws its own batches; give loader=, step(batch)"]
    assert study.waiting_ns == 0
    assert study.account.closed(0.05).setting["num_examples"] is None
    assert study.overview().memory.residual == 0


class Compiled(nn.Module):
    """As torch.compile() wraps a module."""

    def __init__(self):
        super().__init__()
        self._orig_mod = nn.Linear(8, 8)

    def forward(self, x):
        return self._orig_mod(x)


@pytest.mark.parametrize(("make", "batches", "sentence"), [
    (stack, [torch.ones(4, 8)] * 3, "the loader is a list, not a DataLoader: its batches cannot be put together anew"),
    (stack, DataLoader(torch.ones(12, 8), 4, collate_fn=torch.stack), "padding is not visible in this batch"),
    (lambda: nn.Sequential(Compiled()), None, "what is inside compiled modules: their operators are fused"),
])  # fmt: skip
def test_what_is_not_visible(make, batches, sentence):
    unseen = studied(make(), batches=batches).unseen
    assert [one for one in unseen if one.startswith(sentence)] == unseen[-1:]
    assert len(unseen) == 1 + (batches is None)


def test_a_forward_that_goes_round_the_model():
    model = stack()
    around, through = (studied(model, stepping(model, way)).unseen for way in (lambda x: model[2](model[0](x)), model))
    assert any(one.startswith("the model's own forward: the step does not call it") for one in around)
    assert not any("own forward" in one for one in through)


@pytest.mark.parametrize(("num_ranks", "said"), [(1, True), (2, False)])
def test_experts_on_one_rank(num_ranks, said):
    model = nn.Sequential(ek.models.expert_parallel(hidden=8, ffn=8, num_experts=2, top_k=1))
    study = studied(model, num_ranks=num_ranks)
    assert any("uneven experts" in one and "num_ranks=" in one for one in study.unseen) is said
    if said:
        share = study.experts.popularity
        assert f"expert {share.argmax()} of 2 gets {share.max():.0%} of the tokens" in study.overview().found


def test_what_stays_in_memory_is_said():
    model, left = stack(), []
    step = stepping(model)
    found = studied(model, lambda x: (step(x), left.append(torch.zeros(1024)))).overview().found
    assert "4.0 KiB stay in memory after every step" in found
    assert not any("stay in memory" in one for one in studied(model).overview().found)


def test_a_device_that_a_step_outruns_is_measured_anew(monkeypatch):
    here, asked = ek.Device.here(), []

    def stored(cls, *, refresh=False):
        asked.append(refresh)
        return here if refresh else replace(here, rate_flops_per_s=dict.fromkeys(here.rate_flops_per_s, 1.0))

    monkeypatch.setattr(ek.Device, "here", classmethod(stored))
    reached = studied(stack()).overview().ceilings["reached_frac"]["model FLOPs utilisation"]
    assert 0 < reached <= 1
    assert True in asked
