"""measure(): every byte of the peak explained, the same each time, and the model given back as it was."""

from collections import UserDict

import pytest
import torch
from activation_models import TINY, assert_same, batch_of, recorded_peak, state_of
from torch import nn
from transformers import BatchEncoding

from effkit import activations
from effkit.activations.levers import KNOBS
from effkit.activations.on_ranks import TIME
from effkit.training import residents, size_bytes, still

torch.set_num_threads(1)
KIB = 1024


@pytest.fixture(scope="module")
def base(gpt, batch):
    return activations.measure(gpt, batch, repeats=1)


def plain():
    """Frozen and tied parameters, and buffers that a step changes."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Dropout(0.5), nn.Linear(24, 24), nn.Linear(24, 2))
    model[3].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    return model


def square(output):
    return output.square().mean()


INPUT = torch.randn(16, 24, generator=torch.Generator().manual_seed(0))


# Every byte


def test_the_rows_are_the_allocators_peak_to_the_byte(base):
    assert base.residual == 0
    assert base.unit == "bytes"
    assert (base.frame["value"] > 0).all()
    assert not base.predicted


def test_the_peak_is_that_of_a_recording_that_follows_nothing(gpt, batch, base):
    assert base.total == recorded_peak(gpt, batch)


@pytest.mark.parametrize("make", [None, torch.optim.Adam, lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)])
def test_parameters_gradients_and_optimizer_state_are_exact(gpt, batch, make):
    found = activations.measure(gpt, batch, optimizer=make, repeats=1)
    rows, parameters = found.frame["value"], sum(p.nbytes for p in gpt.parameters())
    assert rows["parameter"] == parameters
    assert rows["input"] == sum(tensor.nbytes for tensor in batch.values())
    count = len(list(gpt.parameters()))
    sgd = make is not None and make is not torch.optim.Adam
    assert rows["optimizer state"] == (parameters if sgd else 2 * parameters + 4 * count)
    assert found.residual == 0


def test_gradients_are_exact_where_the_optimizer_has_the_peak():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1))
    found = activations.measure(model, torch.randn(2, 64), loss=square, repeats=1).frame["value"]
    assert found["gradient"] == found["parameter"] == sum(p.nbytes for p in model.parameters())
    assert "saved activation" not in found


def test_tied_and_frozen_parameters_and_buffers_are_exact():
    model = plain()
    found = activations.measure(model, INPUT, loss=square, repeats=1)
    unique = set(model.parameters())
    assert len(unique) < sum(1 for module in model.modules() for _ in module.parameters(recurse=False))
    learning = [p for p in unique if p.requires_grad]
    rows = found.frame["value"]
    assert rows["parameter"] == sum(p.nbytes for p in unique)
    assert rows["buffer"] == sum(b.nbytes for b in model.buffers())
    assert rows["optimizer state"] == sum(2 * p.nbytes + 4 for p in learning)
    assert rows.get("gradient", 0) <= sum(p.nbytes for p in learning)
    assert found.residual == 0


def test_what_hooks_are_told_is_what_the_allocator_holds_when_backward_begins(gpt, batch, base):
    saved = base.companion("Saved activations by operator")
    assert abs(saved.residual) <= 4 * KIB
    assert saved.total > 100 * KIB
    by_module = activations.saved(base)
    assert by_module.total == saved.total
    assert by_module.frame["value"].sum() == saved.frame["value"].sum()
    assert "transformer.h.*.mlp.act" in by_module.frame.index, "layers of one kind stand together"


@pytest.mark.parametrize("name", ["text", "convolutional", "recurrent", "spiking through time"])
def test_retained_bytes_of_other_architectures_close_too(name):
    model = TINY[name].build()
    here = activations.measure(model, batch_of(model, *TINY[name].sizes[0]), repeats=1)
    saved = here.companion("Saved activations by operator")
    assert abs(saved.residual) <= 4 * KIB, saved


def test_the_time_is_told_by_phase(base):
    time = base.companion(TIME)
    assert list(time.frame.index) == ["forward", "backward", "optimizer"]
    assert time.residual == 0
    assert (time.frame["value"] > 0).all()


def test_the_setting_has_every_knob(base):
    assert base.setting["batch_size"] == 4
    assert base.setting["length"] == 64
    assert set(base.setting) == {"batch_size", "length", "keep_frac", *KNOBS}


def test_a_size_and_levers_can_be_asked_for(gpt, batch, base):
    other = activations.measure(gpt, batch, base=base, repeats=1, batch_size=2, length=40, checkpoint_every=1)
    alone = activations.measure(gpt, gpt.random_batch(2, 40), repeats=1, checkpoint_every=1)
    assert other.total == alone.total
    assert other.frame["value"].to_dict() == alone.frame["value"].to_dict()
    assert (other.setting["batch_size"], other.setting["length"], other.setting["checkpoint_every"]) == (2, 40, 1)
    assert other.calibration.forecaster is base.calibration.forecaster


def test_a_base_keeps_its_levers(gpt, batch):
    base = activations.measure(gpt, batch, repeats=1, micro_batches=2)
    again = activations.measure(gpt, batch, base=base, repeats=1)
    assert (again.setting, again.total) == (base.setting, base.total)


def test_tokens_that_are_dropped_are_cells_of_a_shorter_batch(gpt, batch, base):
    kept = activations.measure(gpt, batch, base=base, repeats=1, keep_frac=0.5)
    assert kept.total == activations.measure(gpt, batch, base=base, repeats=1, length=32).total
    assert kept.setting["length"] == 64


# The same each time


def test_measured_twice_is_measured_the_same(gpt, batch, base):
    again = activations.measure(gpt, batch, repeats=2)
    assert again.total == base.total
    assert again.frame["value"].to_dict() == base.frame["value"].to_dict()
    assert again.companion("Saved activations by operator").total == base.companions[1].total


def test_garbage_is_not_taken_for_the_steps_own(gpt, batch, base):
    cycle = [torch.ones(50_000)]
    cycle.append(cycle)
    del cycle
    assert activations.measure(gpt, batch, repeats=1).total == base.total


@pytest.mark.parametrize("kind", [dict, UserDict, BatchEncoding])
def test_any_mapping_is_a_batch(gpt, batch, base, kind):
    assert activations.measure(gpt, kind(batch), repeats=1).frame["value"].to_dict() == base.frame["value"].to_dict()


def test_a_tensor_and_a_tuple_are_a_batch():
    model = plain()
    alone = activations.measure(model, INPUT, loss=square, repeats=1)
    assert activations.measure(model, (INPUT,), loss=square, repeats=1).total == alone.total
    assert activations.measure(model, [INPUT], loss=square, repeats=1).total == alone.total
    assert alone.setting["batch_size"] == 16
    assert "length" not in alone.setting


def test_a_loss_of_ones_own_is_part_of_the_step(gpt, batch, base):
    def logits_squared(output):
        return output.logits.square().mean()

    found = activations.measure(gpt, batch, loss=logits_squared, repeats=1)
    assert found.residual == 0
    assert found.total == recorded_peak(gpt, batch, loss=logits_squared)
    assert found.total != base.total


def test_batches_of_ones_own_are_used_at_every_size(gpt):
    asked = []

    def make(rows, cells):
        asked.append((rows, cells))
        return gpt.random_batch(rows, cells)

    found = activations.measure(gpt, gpt.random_batch(2, 16), make_batch=make, repeats=1, batch_size=3, length=24)
    assert (3, 24) in asked
    assert found.total == recorded_peak(gpt, gpt.random_batch(3, 24))


# Given back


@pytest.mark.parametrize(
    "levers",
    [{"time_levers": True}, {"checkpoint_every": 1, "compress": "int8", "micro_batches": 3, "offload_frac": 0.5}],
)
def test_the_model_is_given_back_as_it_was(levers):
    model = plain()
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    model[2].eval()
    before = state_of(model)
    activations.measure(model, INPUT, loss=square, repeats=1, **levers)
    assert_same(state_of(model), before)


@pytest.mark.parametrize("at", [1, 2, 3, 5])
def test_it_is_given_back_when_the_loss_raises_in_the_middle(at):
    model, calls = plain(), []

    def loss(output):
        calls.append(1)
        if len(calls) == at:
            raise RuntimeError("in the middle")
        return square(output)

    before = state_of(model)
    with pytest.raises(RuntimeError, match="in the middle"):
        activations.measure(model, INPUT, loss=loss, repeats=2, checkpoint_every=1, micro_batches=2)
    assert_same(state_of(model), before)
    assert activations.measure(model, INPUT, loss=square, repeats=1).residual == 0, "and can be measured again"


@pytest.mark.parametrize("at", [0, 1, 2, 3])
def test_it_is_given_back_when_progress_raises(at):
    model, told = plain(), []

    def progress(done, total):
        told.append((done, total))
        if len(told) == at + 1:
            raise KeyboardInterrupt

    before = state_of(model)
    with pytest.raises(KeyboardInterrupt):
        activations.measure(model, INPUT, loss=square, repeats=3, progress=progress)
    assert_same(state_of(model), before)


def test_progress_never_says_that_all_is_done_while_a_run_is_to_come(gpt, batch):
    told = []
    activations.measure(gpt, batch, repeats=2, progress=lambda *done: told.append(done))
    done, total = zip(*told, strict=True)
    assert len(set(total)) == 1
    assert list(done) == sorted(done)
    assert done[0] == 0
    assert done[-1] < total[-1]


def test_what_is_resident_is_as_effkit_training_counts_it(gpt, batch, base):
    update = still(gpt.parameters())
    held = {name: size_bytes(tensors) for name, tensors in residents(gpt, update, batch).items()}
    rows = base.frame["value"]
    assert rows["parameter"] == held["parameter"]
    assert rows["input"] == held["input"]
    assert rows.get("buffer", 0) == held["buffer"]
