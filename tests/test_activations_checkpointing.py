"""Recomputed blocks yield the same gradients to the last bit, and the model comes out as it went in."""

import copy
from contextlib import ExitStack

import pandas as pd
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint as recompute
from transformers import GPT2Config, GPT2LMHeadModel

import effkit as ek
from effkit import activations, models
from effkit.activations.checkpointing import blocks, checkpoint
from effkit.activations.saved_tensor_hooks import tensors_in, watch

LENGTHS = pd.DataFrame({"input_length": [40, 33], "output_length": [4, 5]})


def gpt(use_cache=False):
    sizes = {"vocab_size": 50, "n_positions": 32, "n_embd": 16, "n_layer": 3, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=use_cache))
    model.loss_type = "ForCausalLM"
    tokens = torch.randint(0, 50, (2, 32))
    return model.train(), lambda: model(input_ids=tokens, labels=tokens).loss


def llama():
    model = models.text(layers=3, hidden=16, heads=2, vocabulary=50, device="cpu")
    batch = model.make_batch([[0], [1]], LENGTHS)
    return model, lambda: model(**batch).loss


def speech():
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "hidden": 16, "heads": 2, "vocabulary": 50}
    model = models.speech(**sizes, dropout=0.1, device="cpu")
    batch = model.make_batch([[0], [1]], LENGTHS)
    return model, lambda: model(**batch).loss


def cnn():
    def layer(i, o):
        return nn.Sequential(nn.Conv2d(i, o, 3), nn.BatchNorm2d(o), nn.ReLU(inplace=True), nn.Dropout(0.2))

    model = nn.Sequential(layer(3, 8), layer(8, 8), layer(8, 8), nn.Flatten(), nn.LazyLinear(1))
    x = torch.randn(4, 3, 12, 12)
    model(x)
    return model, lambda: model(x).square().mean()


def plain_cnn():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    x = torch.randn(4, 3, 12, 12)
    return model, lambda: model(x).square().mean()


MODELS = [gpt, llama, speech, cnn, plain_cnn]


def step(model, loss, *, seed=1):
    torch.manual_seed(seed)
    model.zero_grad()
    loss().backward()
    after = torch.rand(1)  # the random numbers go on as they would have
    return [*(p.grad for p in model.parameters()), *(b.clone() for b in model.buffers()), after]


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize(("every", "keep"), [(1, None), (2, None), (1, "matmul")])
def test_gradients_buffers_and_random_numbers_are_the_same_to_the_last_bit(build, every, keep):
    torch.manual_seed(0)
    model, loss = build()
    state = copy.deepcopy(model.state_dict())
    expected = step(model, loss)
    model.load_state_dict(state)
    with checkpoint(model, every, keep=keep):
        found = step(model, loss)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("keep", [None, "matmul"])
def test_under_autocast_a_weight_that_two_blocks_share_is_cast_in_both(keep):
    """In forward autocast would cast it once; backward runs the second block first, and has to cast it there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    gradients = []
    for context in (ExitStack(), checkpoint(model, keep=keep)):
        with context, torch.autocast("cpu", torch.bfloat16):
            loss = model(torch.ones(4, 8)).square().mean()
        model.zero_grad()
        loss.backward()
        gradients.append(model[0].weight.grad.clone())
    # the parts of its gradient are added before they are rounded, or after
    torch.testing.assert_close(*gradients, rtol=0 if keep is None else 2**-7, atol=0 if keep is None else 1e-4)


def test_running_statistics_are_updated_once():
    torch.manual_seed(0)
    model, loss = plain_cnn()
    with checkpoint(model):
        loss().backward()
    assert model[1].num_batches_tracked == 1
    assert all(name in model.state_dict() for name in ("1.running_mean", "1.num_batches_tracked"))


@pytest.mark.parametrize("build", MODELS)
@pytest.mark.parametrize("keep", [None, "matmul"])
def test_a_whole_step_runs_on_fake_tensors(build, keep):
    with FakeTensorMode():
        model, loss = build() if build not in (llama, speech, cnn) else gpt()
        with checkpoint(model, keep=keep):
            loss().backward()
        assert all(parameter.grad is not None for parameter in model.parameters())


def count_forwards(module, counts):
    return module.register_forward_hook(lambda *_: counts.append(1))


@pytest.mark.parametrize(("every", "expected"), [(1, 6), (2, 5), (3, 4)])
def test_every_so_many_blocks_run_twice(every, expected):
    model, loss = gpt()
    counts = []
    with ExitStack() as stack:
        for block in blocks(model):
            stack.callback(count_forwards(block.mlp.act, counts).remove)
        with checkpoint(model, every):
            loss().backward()
    assert len(counts) == expected


def saved(loss):
    storages = {}

    def seen(_, kept):
        storages.update({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors_in(kept)})

    with watch(seen):
        value = loss()
    return sum(storages.values()), value


def test_it_saves_memory_and_keyword_arguments_pass_through_the_hooks():
    model, loss = gpt()
    plain, _ = saved(loss)
    with checkpoint(model):
        less, _ = saved(loss)
    assert less < 0.7 * plain

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, *, other):
            return self.inner(x) + other.square()

    layers, x, seen = nn.ModuleList([Layer(), Layer()]), torch.randn(2, 8), []
    with checkpoint(layers), watch(lambda original, _: seen.append(original.untyped_storage()._cdata)):
        other = torch.randn(2, 8)
        layers[0](x, other=other)
    assert other.untyped_storage()._cdata in seen


class Products(TorchDispatchMode):
    """Counts the products of weights that are really computed."""

    num = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num += func is torch.ops.aten.addmm.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("keep", "fewest", "most"), [(None, 18, 24), ("matmul", 12, 12)])
def test_matrix_products_are_kept_on_request(keep, fewest, most):
    model, loss = gpt()  # with four products in each of three blocks
    with checkpoint(model, keep=keep), Products() as products:
        loss().backward()
    assert fewest <= products.num <= most


@pytest.mark.parametrize("training", [False, True])
def test_evaluation_and_no_grad_pass_straight_through(training):
    model, loss = gpt()
    model.train(training)
    counts = []
    count_forwards(model.transformer.h[0].mlp.act, counts)
    with checkpoint(model):
        if training:
            with torch.no_grad():
                loss()
        else:
            loss().backward()
    assert len(counts) == 1


@pytest.mark.parametrize("raises", [False, True])
def test_forward_is_restored(raises):
    model, _ = gpt()

    def own(*args, **kwargs):
        raise AssertionError

    model.transformer.h[1].forward = own
    before = [dict(block.__dict__) for block in blocks(model)]
    try:
        with checkpoint(model), checkpoint(model, 2):
            assert all("forward" in block.__dict__ for block in blocks(model))
            if raises:
                raise KeyError
    except KeyError:
        pass
    assert [dict(block.__dict__) for block in blocks(model)] == before
    assert model.transformer.h[1].forward is own


def test_running_statistics_come_back_when_recomputing_fails(monkeypatch):
    model, loss = plain_cnn()
    buffers = dict(model[4]._buffers)
    with checkpoint(model):
        value = loss()

    def fail(*_, **__):
        assert model[4]._buffers["running_mean"] is not buffers["running_mean"]
        raise KeyError

    monkeypatch.setattr(nn.functional, "batch_norm", fail)
    with pytest.raises(KeyError):
        value.backward()
    assert all(model[4]._buffers[name] is buffer for name, buffer in buffers.items())


def test_an_empty_cache_is_kept_from_blocks():
    model, loss = gpt()
    expected = step(model, loss)
    model.config.use_cache = True
    with checkpoint(model, 2):
        found = step(model, loss)
    # the block between them puts its keys into the cache, whence they come in another memory order
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(found, expected, strict=True))


def test_a_cache_that_holds_positions_is_refused():
    model, _ = gpt(use_cache=True)
    tokens = torch.randint(0, 50, (1, 4))
    with torch.no_grad():
        cache = model(input_ids=tokens, use_cache=True).past_key_values
    with checkpoint(model), pytest.raises(ValueError, match=r"holds 4 positions .* use_cache=False"):
        model(input_ids=tokens, past_key_values=cache)


def test_blocks_of_models():
    gpt_model, _ = gpt()
    assert blocks(gpt_model) == list(gpt_model.transformer.h)
    speech_model, _ = speech()
    inner = speech_model.model
    assert blocks(speech_model) == [*inner.encoder.layers, *inner.decoder.layers], "and no convolution before them"
    net, _ = plain_cnn()
    assert blocks(net) == [net[0], net[1], net[3], net[4]]
    one, two = nn.Linear(2, 2), nn.Linear(2, 2)
    assert blocks(nn.Sequential(one, two, one)) == [one, two], "used twice, and one block"


def test_a_model_without_blocks_and_wrong_options():
    with pytest.raises(ValueError, match="Linear has no ModuleList or Sequential with two layers"):
        blocks(nn.Linear(2, 2))
    net, _ = plain_cnn()
    for options, said in (({"every": 0}, "every is a whole number from 1 on; given: 0"),
                          ({"keep": "all"}, "keep is one of None, matmul; given: 'all'")):  # fmt: skip
        with pytest.raises(ValueError, match=said), checkpoint(net, **options):
            pass


class Checkpointed(nn.Module):
    """Its stack as a whole is recomputed in backward, or each block by itself."""

    def __init__(self, how, **more):
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(3)))
        self.how, self.more = how, more

    def forward(self, x):
        x = self.first(x)
        for part in [self.blocks] if self.how == "whole" else self.blocks:
            x = recompute(part, x, **self.more)
        return x


def checkpointing_gpt(use_reentrant):
    model, _ = gpt()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    tokens = torch.randint(0, 50, (16, 32))
    return model, {"input_ids": tokens, "labels": tokens}, None


def checkpointing(how, use_reentrant):
    return Checkpointed(how, use_reentrant=use_reentrant), torch.randn(1024, 16), lambda y: y.square().mean()


OWN = {
    "whole": lambda: checkpointing("whole", use_reentrant=False),
    "whole, reentrant": lambda: checkpointing("whole", use_reentrant=True),
    "blocks": lambda: checkpointing("blocks", use_reentrant=False),
    "blocks, reentrant": lambda: checkpointing("blocks", use_reentrant=True),
    "transformers": lambda: checkpointing_gpt(False),
    "transformers, reentrant": lambda: checkpointing_gpt(True),
}


@pytest.mark.filterwarnings("ignore:use_reentrant|None of the inputs")
@pytest.mark.parametrize("build", OWN.values(), ids=OWN)
def test_a_model_that_checkpoints_itself_keeps_its_figures_and_its_gradients(build):
    model, batch, loss = build()
    base = activations.measure(model, batch, loss=loss, repeats=1)
    for levers in ({"checkpoint_every": 1}, {"checkpoint_every": 2, "keep": "matmul"},
                   {"compress": "int8", "checkpoint_every": 1}):  # fmt: skip
        measured = activations.measure(model, batch, loss=loss, base=base, repeats=1, **levers)
        assert activations.predict(base, **levers).total == pytest.approx(measured.total, rel=0.02), levers
        # compressed activations need memory to be restored in, and products that are kept are kept beside what it keeps
        assert len(levers) > 1 or measured.total == pytest.approx(base.total, rel=0.1), "it is recomputed once"
    error = activations.gradient_error(model, batch, lambda: checkpoint(model), loss=loss)
    assert error["relative_error"].max() == 0


@pytest.mark.parametrize("how", ["whole", "transformers"])
def test_checkpointing_is_no_lever_on_a_model_that_checkpoints_already(how):
    model, batch, loss = OWN[how]()
    base = activations.measure(model, batch, loss=loss, repeats=1, time_levers=True)
    settings = activations.front(base, levers=["checkpoint", "autocast"])["setting"]
    assert not settings.str.fullmatch("checkpoint_every=.").any()
    assert settings.str.contains("autocast").any()


def test_advice_on_memory_says_that_the_model_checkpoints_already():
    model, batch, loss = OWN["whole"]()
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch):
        optimizer.zero_grad()
        loss(model(batch)).backward()
        optimizer.step()

    study = ek.study(step, model, [batch] * 3, loss=loss, num_batches=3)
    advice = study.advise("memory", budget_bytes=study.memory.total // 2)
    assert any("the model checkpoints already: " in note for note in advice.notes), advice
