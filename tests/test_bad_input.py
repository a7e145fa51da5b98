"""Bad input to any door: one sentence in the reader's words, from the door itself, and nothing half-changed."""

from __future__ import annotations

import copy
import traceback
from contextlib import nullcontext
from functools import cache
from types import SimpleNamespace

import accelerators
import decoder_world
import moe_world
import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_module

import effkit as ek
from effkit import activations, decoder, models, moe, padding
from effkit.account import Account
from effkit.decoder.setting import Setting

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
LENGTHS = pd.DataFrame({"input_length": [9, 1, 8, 2, 5, 5, 4, 4]})
COUNT = Account.of("Steps", "steps", {"steps": 3}, total=3, source="a counter")
NAN, FOUR = float("nan"), np.int64(4)


class Net(nn.Module):
    def __init__(self, out=1):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out = nn.BatchNorm1d(4), nn.Linear(4, out)

    def forward(self, x):
        return self.out(self.norm(x))


class Tagger(nn.Module):
    """Makes its own batches, padded to the longest row."""

    def __init__(self, num_words=10):
        super().__init__()
        self.words, self.out = nn.Embedding(num_words, 8), nn.Linear(8, 1)

    def forward(self, input_ids, attention_mask):
        return (self.out(self.words(input_ids)).squeeze(-1) * attention_mask).square().mean()

    def make_batch(self, rows, lengths):
        sizes = [int(lengths["input_length"].to_numpy()[row].sum()) for row in rows]
        mask = torch.tensor([[cell < size for cell in range(max(sizes))] for size in sizes])
        return {"input_ids": mask.long(), "attention_mask": mask}


def square(output):
    return output.square().mean()


def two(output, target):
    return (output - target).square().mean()


@cache
def net(out=1):
    return Net(out)


@cache
def without_values():
    return Net().to("meta")


@cache
def sharded(by="FSDP2"):
    """On one rank: a module is wrapped the same way on a thousand."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        return fully_shard(Net(), mesh=mesh) if by == "FSDP2" else distribute_module(Net(), mesh)
    finally:
        dist.destroy_process_group()


@cache
def update():
    return torch.optim.AdamW(net().parameters())


@cache
def tagger(num_words=10):
    return Tagger(num_words)


@cache
def text(layers=8):
    return models.text(layers=layers, hidden=64)


def step(batch=BATCH):
    update().zero_grad()
    square(net()(batch)).backward()
    update().step()


@cache
def of_activations():
    return activations.measure(net(), BATCH, loss=square, repeats=1)


@cache
def of_padding():
    return padding.measure(padding.plan(LENGTHS, batch_size=2), tagger(), repeats=1)


@cache
def of_decoder():
    return decoder_world.measured(text(), Setting(8, width=64, batch=2, num_steps=30, input_length=48, kv_heads=4))[0]


@cache
def of_moe():
    return moe_world.measured()


@cache
def studied():
    return ek.study(step=step, model=net(), loader=[BATCH] * 4, num_batches=2)


def measure(**more):
    activations.measure(**{"model": net(), "batch": BATCH, "loss": square, "repeats": 1, **more})


def forecast(**more):
    activations.forecast(**{"model": net(), "batch_like": BATCH, "loss": square, **more})


def largest(budget_bytes, **more):
    activations.largest_batch(net(), BATCH, budget_bytes, loss=square, **more)


def epoch(**more):
    plan = more.pop("plan", None)
    padding.measure(
        **{"plan": padding.plan(LENGTHS, batch_size=2) if plan is None else plan, "model": tagger(), **more}
    )


def entered(context):
    with context:
        pass


def checkpointed(model, every=1, **more):
    entered(activations.checkpoint(model, every, **more))


def low_bit(**more):
    activations.LowBitAdamW(net().parameters(), **more)


def study(**more):
    ek.study(**{"step": step, "model": net(), "loader": [BATCH] * 4, **more})


SHARDS = r"Net is in shards \(FSDP, DTensor\): .* effkit\.advice\.record"
MODULE = "model is a torch module, .*; given: "
# what is given -> how the sentence begins that answers it (a pattern)
BAD = {
    # activations
    "measure: a class as model": (lambda: measure(model=Net), f"{MODULE}the class Net"),
    "measure: a function as model": (lambda: measure(model=step), f"{MODULE}the function step"),
    "measure: None as model": (lambda: measure(model=None), f"{MODULE}NoneType"),
    "measure: a path as model": (lambda: measure(model="model.pt"), f"{MODULE}'model.pt'"),
    "measure: a state dict as model": (lambda: measure(model=net().state_dict()), f"{MODULE}OrderedDict"),
    "measure: a meta model": (lambda: measure(model=without_values()), "on the meta device"),
    "measure: by FSDP1": (lambda: measure(model=type("FullyShardedDataParallel", (Net,), {})()), "is in shards"),
    "forecast: shards inside": (lambda: forecast(model=nn.Sequential(sharded(), nn.ReLU())), "is in shards"),
    "forecast: by FSDP2": (lambda: forecast(model=sharded()), SHARDS),
    "forecast: DTensors": (lambda: forecast(model=sharded("DTensor")), SHARDS),
    "largest_batch: by FSDP2": (
        lambda: activations.largest_batch(sharded(), BATCH, 10_000, loss=square), SHARDS),
    "gradient_error: by FSDP2": (lambda: activations.gradient_error(sharded(), BATCH, nullcontext), SHARDS),
    "padding.measure: by FSDP2": (lambda: epoch(model=sharded()), SHARDS),
    "study: by FSDP2": (lambda: study(model=sharded()), SHARDS),
    "study: DTensors": (lambda: study(model=sharded("DTensor")), SHARDS),
    "measure: a model that trains nothing": (lambda: measure(model=nn.ReLU()), "no parameter that requires"),
    "measure: a batch without tensors": (lambda: measure(batch={"x": [1, 2]}), "a batch holds tensors"),
    "measure: None as batch": (lambda: measure(batch=None), "a batch holds tensors"),
    "measure: a number for a batch": (lambda: measure(batch=torch.tensor(3.0)), "share their first dimension"),
    "measure: an empty batch": (lambda: measure(batch=BATCH[:0]), "at least one row"),
    "measure: unequal rows": (lambda: measure(batch=(BATCH, BATCH[:3])), "share their first dimension"),
    "measure: a word as loss": (lambda: measure(loss="mse"), "loss is a function.*'mse'"),
    "measure: a criterion's class": (lambda: measure(loss=nn.MSELoss), "loss is a function.*class MSELoss"),
    "measure: a criterion": (lambda: measure(loss=nn.CrossEntropyLoss()), "loss is a function.*CrossEntropyLoss"),
    "measure: a loss of two": (lambda: measure(loss=two), "loss is a function.*two"),
    "measure: a functional loss": (lambda: measure(loss=nn.functional.cross_entropy), "loss is a function"),
    "measure: a loss in numbers": (lambda: measure(loss=lambda y: 3.0), "the loss is one number"),
    "measure: a word as optimizer": (lambda: measure(optimizer="adamw"), "optimizer is a function.*'adamw'"),
    "measure: an optimizer": (lambda: measure(optimizer=update()), "optimizer is a function.*AdamW"),
    "measure: makes no optimizer": (lambda: measure(optimizer=list), "optimizer is a function.*list"),
    "measure: half as a word": (lambda: measure(offload_frac="half"), "offload_frac is a share"),
    "measure: batch_size=True": (lambda: measure(batch_size=True), "batch_size is a whole number"),
    "measure: half a batch": (lambda: measure(batch_size=2.5), "batch_size is a whole number"),
    "measure: length of what has none": (lambda: measure(length=8), "no other length of this model's batches"),
    "measure: an unknown knob": (lambda: measure(batchsize=8), "no such knob: batchsize"),
    "measure: repeats=0": (lambda: measure(repeats=0), "repeats is a whole number from 1"),
    "measure: repeats as a word": (lambda: measure(repeats="3"), "repeats is a whole number from 1"),
    "measure: a base of another model": (
        lambda: measure(model=net(2), base=of_activations()), "base .* another model"),
    "measure: a base of another lab": (lambda: measure(base=of_padding()), "calibration"),
    "measure: a base that is none": (lambda: measure(base=3), "base is an Account, .*; given: 3"),
    "measure: make_batch that is none": (lambda: measure(make_batch=BATCH, batch_size=4), "make_batch is a function"),
    "predict: no account": (lambda: activations.predict(net()), "base is an Account.*Net"),
    "predict: an account without calibration": (lambda: activations.predict(COUNT), "no calibration"),
    "predict: micro-batches beyond the rows": (
        lambda: activations.predict(of_activations(), micro_batches=9), "cannot be cut"),
    "saved: no account": (lambda: activations.saved(3), "Account.*; given: 3"),
    "forecast: a class as model": (lambda: forecast(model=Net), f"{MODULE}the class Net"),
    "forecast: a module without parameters": (lambda: forecast(model=nn.ReLU()), "no parameter that requires"),
    "forecast: a word as loss": (lambda: forecast(loss="mse"), "loss is a function"),
    "forecast: an optimizer": (lambda: forecast(optimizer=update()), "optimizer is a function"),
    "forecast: on a tpu": (lambda: forecast(device="tpu"), "device is cpu, cuda, the name of an NVIDIA GPU"),
    "largest_batch: a budget as text": (lambda: largest("8GB"), "budget_bytes is .*'8GB'"),
    "largest_batch: a budget of NaN": (lambda: largest(NAN), "budget_bytes is .*nan"),
    "largest_batch: a negative budget": (lambda: largest(-1), "budget_bytes is .*-1"),
    "largest_batch: no end of memory": (lambda: largest(float("inf")), "budget_bytes is .*inf"),
    "front: an unknown lever": (lambda: activations.front(of_activations(), levers=["magic"]), "no such lever: magic"),
    "front: a lever as text": (lambda: activations.front(of_activations(), levers="offload"), "levers is a list"),
    "front: half a rank": (lambda: activations.front(of_activations(), num_ranks=1.5), "num_ranks is a whole number"),
    "front: no account": (lambda: activations.front(3), "base is an Account, .*; given: 3"),
    "front: levers that were not timed": (lambda: activations.front(of_activations()), "time of levers was not"),
    "cheapest: a budget as text": (lambda: activations.cheapest(of_activations(), "8GB"), "budget_bytes is .*'8GB'"),
    "gradient_error: a class as model": (
        lambda: activations.gradient_error(Net, BATCH, nullcontext), f"{MODULE}the class Net"),
    "gradient_error: a criterion": (
        lambda: activations.gradient_error(net(), BATCH, nullcontext, loss=nn.MSELoss()), "loss is a function"),
    "checkpoint: a class as model": (lambda: checkpointed(Net), f"{MODULE}the class Net"),
    "checkpoint: half a block": (lambda: checkpointed(net(), 0.5), "every is a whole number from 1"),
    "checkpoint: every=True": (lambda: checkpointed(net(), True), "every is a whole number from 1"),
    "checkpoint: every as a word": (lambda: checkpointed(net(), "2"), "every is a whole number from 1.*'2'"),
    "checkpoint: keeps all": (lambda: checkpointed(net(), keep=["matmul"]), "keep is one of None, matmul"),
    "compressed: an unknown format": (lambda: entered(activations.compressed(["int8"])), "dtype is one of int8"),
    "compressed: group=True": (lambda: entered(activations.compressed(group=True)), "group is a number of values"),
    "compressed: half a value": (
        lambda: entered(activations.compressed(min_elements=0.5)), "min_elements is a whole number"),
    "offloaded: a share as a word": (lambda: entered(activations.offloaded("half")), "frac is a share.*'half'"),
    "offloaded: a share of NaN": (lambda: entered(activations.offloaded(NAN)), "frac is a share.*nan"),
    "LowBitAdamW: an unknown format": (lambda: low_bit(states=["int8"]), "states is one of float32, int8"),
    "LowBitAdamW: half a group": (lambda: low_bit(group=2.5), "group is a whole number from 1"),
    "LowBitAdamW: group as a word": (lambda: low_bit(group="128"), "group is a whole number from 1.*'128'"),
    "LowBitAdamW: a rate as a word": (lambda: low_bit(lr="1e-3"), "lr is a number.*'1e-3'"),
    "LowBitAdamW: a rate of NaN": (lambda: low_bit(lr=NAN), "lr is a number.*nan"),
    "LowBitAdamW: a negative decay": (lambda: low_bit(weight_decay=-1), "weight_decay is a number.*-1"),
    # padding
    "padding.measure: lengths for a plan": (lambda: epoch(plan=LENGTHS), "plan is a Plan.*DataFrame"),
    "padding.measure: a class as model": (lambda: epoch(model=Net), f"{MODULE}the class Net"),
    "padding.measure: a model that makes no batches": (lambda: epoch(model=net()), "give make_batch="),
    "padding.measure: a word as loss": (lambda: epoch(loss="mse"), "loss is a function"),
    "padding.measure: an optimizer": (lambda: epoch(optimizer=update()), "optimizer is a function"),
    "padding.measure: no batch": (lambda: epoch(num_batches=0), "num_batches is a whole number from"),
    "padding.measure: repeats=True": (lambda: epoch(repeats=True), "repeats is a whole number from 1"),
    "padding.measure: no rank": (lambda: epoch(world_size=0), "world_size is a whole number from 1"),
    "padding.measure: a base of another lab": (lambda: epoch(base=of_activations()), "calibration"),
    "padding.measure: a base of another model": (
        lambda: epoch(model=tagger(9), base=of_padding()), "base .* another model"),
    "padding.predict: no account": (lambda: padding.predict(LENGTHS), "base is an Account.*DataFrame"),
    "padding.predict: batch_size=True": (
        lambda: padding.predict(of_padding(), batch_size=True), "batch_size is a whole number"),
    "padding.predict: a share of a rank": (
        lambda: padding.predict(of_padding(), world_size=1.5), "world_size is a whole number"),
    "plan: batch_size=True": (lambda: padding.plan(LENGTHS, batch_size=True), "batch_size is a whole number"),
    "plan: batch_size as a word": (lambda: padding.plan(LENGTHS, batch_size="4"), "batch_size is a whole number"),
    "plan: batch_size=2.5": (lambda: padding.plan(LENGTHS, batch_size=2.5), "batch_size is a whole number"),
    "plan: cells of NaN": (lambda: padding.plan(LENGTHS, max_input_cells=NAN), "max_input_cells is "),
    "plan: an unknown strategy": (lambda: padding.plan(LENGTHS, "magic", batch_size=2), "unknown strategy 'magic'"),
    "plan: a number for lengths": (lambda: padding.plan(5, batch_size=2), "plan\\(\\) takes a .*frame"),
    "plan: no lengths": (lambda: padding.plan(LENGTHS[:0], batch_size=2), "non-empty frame"),
    "lengths: None": (lambda: padding.lengths(None), "lengths\\(\\) takes"),
    "lengths: a number": (lambda: padding.lengths(5), "lengths\\(\\) takes"),
    "lengths: a NaN among them": (lambda: padding.lengths([3.0, NAN]), "row 1"),
    "watch: loader=5": (lambda: padding.watch(5), "loader yields batches.*5"),
    "watch: no number of batches": (
        lambda: padding.watch([{"input_ids": BATCH}], num_batches=-1), "num_batches is a whole number"),
    # decoder
    "decoder.measure: None": (lambda: decoder.measure(None), "NoneType has no generate"),
    "decoder.measure: a class": (lambda: decoder.measure(Net), "the class Net has no generate"),
    "decoder.measure: what does not generate": (lambda: decoder.measure(net()), "generate"),
    "decoder.measure: no token": (lambda: decoder.measure(text(), num_steps=0), "num_steps is a whole number"),
    "decoder.measure: repeats=1.5": (lambda: decoder.measure(text(), repeats=1.5), "repeats is a whole number"),
    "decoder.measure: an unknown knob": (lambda: decoder.measure(text(), beams=2), "no such knob: beams"),
    "decoder.measure: a base of another lab": (
        lambda: decoder.measure(text(), base=of_activations()), "calibration"),
    "decoder.measure: a base of another model": (
        lambda: decoder.measure(text(4), base=of_decoder()), "base .* another model"),
    "decoder.predict: no account": (lambda: decoder.predict("base"), "base is an Account, .*; given: 'base'"),
    "decoder.predict: an unknown type": (lambda: decoder.predict(of_decoder(), dtype="int3"), "dtype is one of"),
    "decoder.predict: NaN": (lambda: decoder.predict(of_decoder(), num_steps=NAN), "num_steps is a whole number"),
    # moe
    "moe.measure: a model for a setting": (lambda: moe.measure(net()), "setting is a .*Setting.*Net"),
    "moe.measure: one rank": (lambda: moe.measure(num_ranks=1), "num_ranks"),
    "moe.measure: ranks as a word": (lambda: moe.measure(num_ranks="two"), "num_ranks"),
    "moe.measure: no round": (lambda: moe.measure(num_rounds=0), "num_rounds"),
    "moe.measure: an unknown lever": (lambda: moe.measure(levers=["magic"]), "magic"),
    "moe.measure: a link of NaN": (lambda: moe.measure(link_bytes_per_s=NAN), "link_bytes_per_s"),
    "moe.measure: a base of another lab": (lambda: moe.measure(base=of_activations()), "calibration"),
    "moe.predict: no account": (lambda: moe.predict(None), "base is an Account.*NoneType"),
    "moe.predict: half a rank": (lambda: moe.predict(of_moe(), num_ranks=2.5), "num_ranks is a whole number"),
    "moe.predict: ranks as a word": (lambda: moe.predict(of_moe(), num_ranks="two"), "num_ranks is a whole number"),
    "moe.predict: a link of NaN": (lambda: moe.predict(of_moe(), link_bytes_per_s=NAN), "link_bytes_per_s is"),
    # study
    "study: nothing": (lambda: ek.study(), "given: none of them"),
    "study: a class as model": (lambda: study(model=Net), f"{MODULE}the class Net"),
    "study: a function as model": (lambda: study(model=step), f"{MODULE}the function step"),
    "study: a meta model": (lambda: study(model=without_values()), "on the meta device"),
    "study: a step that is none": (lambda: study(step=3), "step is a "),
    "study: a step of two": (lambda: study(step=two), "step is a function.*two"),
    "study: loader=5": (lambda: study(loader=5), "loader yields batches.*5"),
    "study: an empty loader": (lambda: study(loader=[]), "the loader is empty"),
    "study: batches as a word": (lambda: study(num_batches="4"), "num_batches is a whole number"),
    "study: half a rank": (lambda: study(num_ranks=1.5), "num_ranks is a whole number"),
    "study: a word as loss": (lambda: study(loss="mse"), "loss is a function"),
    "study: a link of NaN": (lambda: study(link_bytes_per_s=NAN), "link_bytes_per_s is a number"),
    "study: repeats of a training loop": (lambda: study(repeats=3), "repeats"),
    "study: loss of a generation": (lambda: ek.study(generate={}, model=text(), loss=square), "loss"),
    "study: generate=3": (lambda: ek.study(generate=3, model=text()), "generate"),
    "study: a number as trace": (lambda: ek.study(trace=3), "path.*3"),
    "advise: an unknown goal": (lambda: studied().advise("speed"), "goal is one of"),
    "advise: a budget as text": (lambda: studied().advise("memory", budget_bytes="8GB"), "budget_bytes is .*'8GB'"),
    "advise: a budget of NaN": (lambda: studied().advise("memory", budget_bytes=NAN), "budget_bytes is .*nan"),
    "advise: a negative budget": (lambda: studied().advise("memory", budget_bytes=-1), "budget_bytes is .*-1"),
    "advise: half a device": (lambda: studied().advise(num_devices=0.5), "num_devices is a whole number"),
    "record: no function": (lambda: ek.advice.record("traces", 3), "step is a function step.*3"),
    "record: a step of two": (lambda: ek.advice.record("traces", two, [BATCH]), "step is a function step.*two"),
    "record: a step of a batch without a loader": (
        lambda: ek.advice.record("traces", square), "step is a function step.*square"),
    "record: loader=5": (lambda: ek.advice.record("traces", square, 5), "loader yields batches.*5"),
    "record: half a step": (lambda: ek.advice.record("traces", step, num_steps=0.5), "num_steps is a whole number"),
    "record: steps as a word": (lambda: ek.advice.record("traces", step, num_steps="4"), "num_steps is a whole.*'4'"),
    "trainer_callback: batches as a word": (
        lambda: ek.advice.trainer_callback(num_batches="4"), "num_batches is a whole number.*'4'"),
    "trainer_callback: half a rank": (
        lambda: ek.advice.trainer_callback(num_ranks=1.5), "num_ranks is a whole number"),
    "trainer_callback: a criterion": (lambda: ek.advice.trainer_callback(loss=nn.MSELoss()), "loss is a function"),
    "trainer_callback: a link of NaN": (
        lambda: ek.advice.trainer_callback(link_bytes_per_s=NAN), "link_bytes_per_s is a number"),
    "lightning_callback: no batch": (
        lambda: ek.advice.lightning_callback(num_batches=0), "num_batches is a whole number"),
    "compare: no study": (lambda: studied().compare(3), "another study.*int"),
    # capture, load, account, receipt
    "capture: no function": (lambda: ek.capture(3), "step is a function without.*3"),
    "capture: a step of a batch": (lambda: ek.capture(two), "without arguments.*two"),
    "capture: no step": (lambda: ek.capture(step, steps=0), "steps is a whole number"),
    "capture: steps as a word": (lambda: ek.capture(step, steps="3"), "steps is a whole number"),
    "capture: settings that are none": (lambda: ek.capture(step, settings=3), "settings is a mapping"),
    "load: a number": (lambda: ek.load(3), "takes a path.*3"),
    "load: numbers": (lambda: ek.load([3]), "takes a path.*3"),
    "load: an unknown column": (lambda: ek.load("x.json", columns=["magic"]), "no such column: magic"),
    "account: no capture": (lambda: activations.account(3), "takes a Capture"),
    "Account: values that are no numbers": (
        lambda: Account.of("t", "ns", {"a": "b"}, total=1, source="s"), "values are integers"),
    "Account: NaN": (lambda: Account.of("t", "ns", {"a": NAN}, total=1, source="s"), "values are integers"),
    "Receipt: no accounts": (lambda: ek.Receipt(3, 4), "two Accounts.*3"),
    "Receipt: one account": (lambda: ek.Receipt(COUNT, None), "two Accounts.*NoneType"),
    "Receipt: unlike units": (
        lambda: ek.Receipt(COUNT, Account.of("t", "ns", {"a": 1}, total=1, source="s")), "like with like"),
}  # fmt: skip


def kept():
    """What a refusal must leave alone."""
    model = net()
    return copy.deepcopy([
        *(tensor for _, tensor in sorted(model.state_dict().items())), *(p.grad for p in model.parameters()),
        torch.get_rng_state(), model.training, text().training, len(update().state), *net()._forward_hooks,
    ])  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def made():
    net(2)
    text(4)
    tagger(9)
    sharded("DTensor")
    for make in (of_activations, of_padding, of_decoder, of_moe, studied, without_values, sharded):
        make()


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_sentence_and_changes_nothing(name):
    call, expected = BAD[name]
    before = kept()
    with pytest.raises((TypeError, ValueError), match=expected) as told:
        call()
    text = str(told.value)
    assert "\n" not in text
    assert 20 < len(text) < 300
    assert "torch._" not in text
    last = traceback.extract_tb(told.tb)[-1].filename
    assert "/effkit/" in last, f"raised in {last}"
    error = told.value
    assert error.__cause__ is None
    assert error.__context__ is None or error.__suppress_context__
    after = kept()
    assert len(after) == len(before)
    assert all(torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
               for one, other in zip(before, after, strict=True))  # fmt: skip


WHOLE = {
    "measure": lambda: measure(repeats=np.int64(1), batch_size=FOUR, micro_batches=np.int64(2)),
    "predict": lambda: activations.predict(of_activations(), batch_size=FOUR, checkpoint_every=np.int64(0)),
    "forecast": lambda: forecast(batch_size=FOUR, offload_frac=np.float64(0.5)),
    "largest_batch": lambda: largest(np.int64(10_000), micro_batches=np.int64(2)),
    "padding.measure": lambda: epoch(num_batches=FOUR, repeats=np.int64(1), world_size=np.int64(2)),
    "padding.predict": lambda: padding.predict(of_padding(), batch_size=FOUR, max_length=np.int64(8)),
    "plan": lambda: padding.plan(LENGTHS, "bucket", batch_size=FOUR, num_buckets=np.int64(2), seed=FOUR),
    "token_budget": lambda: padding.plan(LENGTHS, "token_budget", max_input_cells=np.int64(16), batch_size=FOUR),
    "pack": lambda: padding.plan(LENGTHS, "pack", max_input_cells=np.int64(16), batch_size=np.int64(2)),
    "watch": lambda: padding.watch([tagger().make_batch([[0]], LENGTHS)], num_batches=FOUR).run(),
    "decoder.predict": lambda: decoder.predict(of_decoder(), num_steps=np.int64(9), batch=FOUR),
    "moe.predict": lambda: moe.predict(of_moe(), num_ranks=FOUR, num_tokens=np.int64(64)),
    "study": lambda: study(num_batches=FOUR, num_ranks=np.int64(1)),
    "advise": lambda: studied().advise(num_steps=FOUR, num_devices=np.int64(2), price_per_hour=np.float64(2)),
    "capture": lambda: ek.capture(step, steps=np.int64(1), warmup=np.int64(0)),
}


@pytest.mark.parametrize("door", WHOLE)
def test_whole_numbers_of_numpy_are_whole_numbers(door):
    WHOLE[door]()


class Elsewhere(Net):
    """A model on a device that this machine does not have."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def parameters(self, recurse=True):
        return iter([SimpleNamespace(device=torch.device(self.kind), is_meta=False, requires_grad=True)])


DOORS = {
    "activations.measure": lambda model: activations.measure(model, BATCH),
    "padding.measure": lambda model: padding.measure(padding.plan(LENGTHS, batch_size=2), model),
    "study": lambda model: ek.study(step=lambda: None, model=model),
}


@pytest.mark.parametrize("door", DOORS)
def test_what_cannot_be_waited_for_is_refused_and_not_timed_as_a_cpu(door):
    with pytest.raises(ValueError, match=r"Elsewhere is on xla, for which torch cannot wait: .*Move it") as told:
        DOORS[door](Elsewhere("xla"))
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("door", DOORS)
def test_where_no_peak_is_counted_none_is_measured(door, monkeypatch):
    accelerators.installed(monkeypatch, "mps")
    with pytest.raises(ValueError, match="Elsewhere is on mps, for which torch counts no peak of memory"):
        DOORS[door](Elsewhere("mps"))


def test_a_generation_that_cannot_be_waited_for_is_refused(monkeypatch):
    model = text()
    monkeypatch.setattr(model, "parameters", Elsewhere("xla").parameters)
    with pytest.raises(ValueError, match="is on xla, for which torch cannot wait"):
        decoder.measure(model, num_steps=2)


def test_what_was_never_followed_is_not_told_as_a_cpus(monkeypatch):
    accelerators.installed(monkeypatch, "xpu")
    with pytest.raises(ValueError, match="Elsewhere is on xpu, where nobody has followed what a step allocates"):
        activations.observe(lambda enter: None, Elsewhere("xpu"), dict)
