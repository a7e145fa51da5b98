"""Bad input to the activation lab gets one sentence: what was given, what was expected, what to do."""

from dataclasses import replace

import pytest
import torch
from activation_models import SMALL
from torch import nn

from effkit import activations, models

torch.set_num_threads(1)
VERBS = [activations.measure, activations.forecast]


@pytest.fixture(scope="module")
def gpt():
    return models.gpt(layers=2, **SMALL)


@pytest.fixture(scope="module")
def batch(gpt):
    return gpt.random_batch(4, 32)


@pytest.fixture(scope="module")
def base(gpt, batch):
    return activations.measure(gpt, batch, repeats=1)


def linear():
    return nn.Linear(6, 5)


def one_sentence(told) -> str:
    text = str(told.value)
    assert "\n" not in text
    assert len(text) < 300
    return text


def test_a_budget_below_the_parameters_holds_no_step(gpt, batch):
    with pytest.raises(
        ValueError, match=r"a budget of 97\.7 KiB holds no step of this model: a batch of 1 needs "
    ) as told:
        activations.largest_batch(gpt, batch, 100_000)
    resident = 3 * sum(p.nbytes for p in gpt.parameters()) / 1024
    assert f"{resident:.0f}"[:3] in one_sentence(told), "what stays is named"
    assert "for parameters and what stays with them" in str(told.value)


@pytest.mark.parametrize("verb", VERBS)
def test_a_loss_that_is_a_vector_is_refused(verb):
    with pytest.raises(ValueError, match=r"the loss is one number, a tensor of one element; given: \(4,\)") as told:
        verb(linear(), torch.ones(4, 6), loss=lambda y: y.sum(dim=1))
    one_sentence(told)


def test_a_loss_that_is_no_tensor_is_refused():
    with pytest.raises(ValueError, match="the loss is one number, a tensor of one element; given: float"):
        activations.measure(linear(), torch.ones(4, 6), loss=lambda y: 3.0)


@pytest.mark.parametrize("verb", VERBS)
def test_a_loss_without_a_gradient_is_refused(verb):
    with pytest.raises(ValueError, match="the loss needs no gradient: a parameter must require one, and the model"):
        verb(linear(), torch.ones(4, 6), loss=lambda y: y.detach().sum())


def test_no_grad_is_refused():
    with torch.no_grad(), pytest.raises(ValueError, match=r"the loss needs no gradient: .* not run under no_grad"):
        activations.measure(linear(), torch.ones(4, 6), loss=torch.sum)


def test_inference_mode_is_refused():
    with torch.inference_mode(), pytest.raises(ValueError, match=r"leave torch\.inference_mode\(\) first"):
        activations.measure(linear(), torch.ones(4, 6), loss=torch.sum)
    with torch.inference_mode():
        model = linear()
    with pytest.raises(ValueError, match="a training step cannot run under inference mode"):
        activations.measure(model, torch.ones(4, 6), loss=torch.sum)


@pytest.mark.parametrize("model", [nn.ReLU(), linear().requires_grad_(False)], ids=["none", "frozen"])
def test_nothing_to_train_is_refused(model):
    with pytest.raises(ValueError, match="has no parameter that requires a gradient: there is nothing to train"):
        activations.measure(model, torch.ones(4, 6), loss=torch.sum)


@pytest.mark.parametrize(
    "call",
    [lambda gpt, batch, base: activations.measure(gpt, batch, batchsize=3),
     lambda gpt, batch, base: activations.forecast(gpt, batch, batchsize=3),
     lambda gpt, batch, base: activations.predict(base, batchsize=3)],
)  # fmt: skip
def test_an_unknown_knob_is_refused(gpt, batch, base, call):
    with pytest.raises(ValueError, match="no such knob: batchsize; the knobs are batch_size, length, keep_frac, check"):
        call(gpt, batch, base)


@pytest.mark.parametrize(
    ("setting", "sentence"),
    [
        ({"micro_batches": 5}, "a batch of 4 cannot be cut into 5 micro-batches: use fewer"),
        ({"batch_size": 0}, "batch_size is a whole number from 1 on; given: 0"),
        ({"batch_size": 2.5}, r"batch_size is a whole number from 1 on; given: 2\.5"),
        ({"length": -3}, "length is a whole number from 1 on; given: -3"),
        ({"keep_frac": 0.0}, r"keep_frac is a share in \(0, 1\]; given: 0\.0"),
        ({"compress": "int3"}, "compress is one of none, int8, fp8_e4m3, fp8_e5m2; given: 'int3'"),
        ({"autocast": "half"}, "autocast is one of none, bfloat16; given: 'half'"),
    ],
)
def test_a_setting_that_cannot_be_is_refused(gpt, batch, base, setting, sentence):
    with pytest.raises(ValueError, match=sentence):
        activations.measure(gpt, batch, repeats=1, **setting)
    with pytest.raises(ValueError, match=sentence):
        activations.predict(base, **setting)


@pytest.mark.parametrize("name", ["length", "keep_frac"])
def test_a_model_without_a_sequence_has_no_use_for_its_knobs(name):
    model = models.vision(layers=1, hidden=32, heads=2, image=16, device="cpu")
    with pytest.raises(ValueError, match=f"no other length of this model's batches can be replayed: leave out {name}"):
        activations.forecast(model, model.random_batch(2), **{name: 1})


@pytest.mark.parametrize("verb", VERBS)
def test_an_optimizer_of_ones_own_and_low_bit_states_exclude_each_other(gpt, batch, verb):
    with pytest.raises(ValueError, match="optimizer_states='int8' brings its own AdamW: leave out optimizer="):
        verb(gpt, batch, optimizer=torch.optim.SGD, optimizer_states="int8")


@pytest.mark.parametrize("verb", VERBS)
def test_a_batch_without_tensors_is_refused(gpt, verb):
    with pytest.raises(ValueError, match="a batch holds tensors: a mapping of keyword arguments, a tuple of"):
        verb(gpt, {"text": "hello"})


@pytest.mark.parametrize("verb", VERBS)
def test_a_batch_without_labels_is_refused(gpt, batch, verb):
    with pytest.raises(ValueError, match="has no loss: give the batch its labels, or loss="):
        verb(gpt, {"input_ids": batch["input_ids"]})


def test_no_repeats_and_no_such_device_are_refused(gpt, batch):
    with pytest.raises(ValueError, match="repeats is a whole number from 1 on; given: 0"):
        activations.measure(gpt, batch, repeats=0)
    with pytest.raises(ValueError, match=r"device is cpu, cuda, the name of an NVIDIA GPU .* own; given: 'tpu'"):
        activations.forecast(gpt, batch, device="tpu")


def test_blocks_that_there_are_not_cannot_be_recomputed():
    with pytest.raises(ValueError, match="Linear has no ModuleList or Sequential with two layers of one class"):
        activations.measure(linear(), torch.ones(4, 6), loss=torch.sum, checkpoint_every=1)


def test_an_account_that_was_not_measured_predicts_nothing(base):
    with pytest.raises(ValueError, match=r"carries no calibration; activations\.measure\(\) makes one that does"):
        activations.predict(replace(base, calibration=None))


def test_saved_activations_are_told_in_two_ways_only(base):
    with pytest.raises(ValueError, match="saved activations are told by module or by operator; given: 'layer'"):
        activations.saved(base, "layer")


class Failing(nn.Module):
    """Batches of more than ``most`` rows raise this, in the midst of a forward pass that has changed the model."""

    def __init__(self, error, most=8):
        super().__init__()
        self.first, self.norm, self.error, self.most = nn.Linear(6, 6), nn.BatchNorm1d(6), error, most
        self.seen = 0

    def forward(self, x):
        x, self.seen = self.norm(self.first(x)), len(x)
        if len(x) > self.most:
            raise self.error
        return x


@pytest.mark.parametrize("error", [RuntimeError("no"), IndexError("no"), KeyError("no"), AttributeError("no")])
def test_a_replay_that_fails_says_where_and_why_and_leaves_the_base_as_it_was(error):
    model = Failing(error)
    base = activations.measure(model, torch.randn(4, 6), loss=torch.sum, repeats=1)
    before = activations.predict(base, batch_size=3).total
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"measured, not forecast: at module Failing, because .*Error: '?no"
        ) as told:
            activations.predict(base, batch_size=9)
        one_sentence(told)
        assert activations.predict(base, batch_size=3).total == before
        assert activations.predict(base, autocast="bfloat16").total > 0


def test_a_replay_that_fails_in_an_optimizer_leaves_the_base_as_it_was(gpt, batch):
    class Failing(torch.optim.SGD):
        fails = False

        def step(self, closure=None):
            super().step(closure)
            if self.fails:
                raise KeyError(9477)

    base = activations.measure(gpt, batch, optimizer=Failing, repeats=1)
    Failing.fails = True
    with pytest.raises(ValueError, match="at the loss, backward or optimizer, because KeyError: 9477"):
        activations.predict(base, checkpoint_every=1)
    Failing.fails = False
    assert activations.predict(base, checkpoint_every=1).total < base.total


def test_a_replay_writes_into_no_batch_of_a_user():
    tokens = torch.randint(0, 5, (4, 6))
    before = tokens.clone()

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(6, 8)

        def forward(self, ids):
            ids[:, 0] = 5
            return self.embed(ids)

    activations.forecast(Writing(), tokens, loss=torch.sum)
    assert torch.equal(tokens, before)
