"""Steps spread over ranks: forecast on one process, and run on real gloo ranks."""

import psutil
import pytest
import torch
import torch.distributed as dist
from sharding_receipts import predicted_and_measured
from torch import nn

import effkit as ek
from effkit.activations import Sharding
from effkit.activations.on_ranks import SENT_BYTES
from effkit.ranks.launching import Ranks
from lessons import small_models

# model, sizes of its batch, and how its step is spread
STEPS = {
    "fsdp2": ("gpt", (2, 32), {"shard": "fsdp2"}),
    "fsdp2, accumulated": ("gpt", (4, 32), {"shard": "fsdp2", "micro_batches": 2}),
    "zero2, checkpointed": ("gpt", (2, 32), {"shard": "zero2", "checkpoint_every": 1}),
    "fsdp2 around the whole": ("vision", (2,), {"wrap": "model"}),
    "fsdp2 in bfloat16": ("gpt", (2, 32), {"param_dtype": "bfloat16"}),
    "ddp with buffers, accumulated": ("convolutional", (4,), {"shard": "ddp", "micro_batches": 2}),
    "zero1": ("recurrent", (4, 16), {"shard": "zero1"}),
    "tensor parallel": ("text", (2, 32), {"tensor_parallel": 2}),
}


def model_of(name):
    sizes = {"hidden": 64, "layers": 2, "heads": 4} if name in ("gpt", "text") else {}
    return small_models.build(name, device="cpu", **sizes)


@pytest.fixture(scope="module")
def two_ranks():
    with Ranks(2, "effkit.activations.on_ranks") as ranks:
        yield ranks


@pytest.mark.parametrize("case", STEPS)
def test_a_forecast_of_a_rank_is_what_real_ranks_take(two_ranks, case):
    name, sizes, how = STEPS[case]
    model = model_of(name)
    batch = model.random_batch(*sizes)
    predicted, measured = predicted_and_measured(model, batch, two_ranks, **how)
    assert measured.residual == 0
    assert predicted.total == pytest.approx(measured.total, rel=0.005)
    assert dict(predicted.companion(SENT_BYTES).frame["value"]) == dict(measured.companion(SENT_BYTES).frame["value"])
    for row in ("parameter", "buffer", "optimizer state"):
        held = [account.frame["value"].get(row, 0) for account in (predicted, measured)]
        assert held[0] == pytest.approx(held[1], rel=0.001)  # zero1 gives another rank a norm's states more


def test_replicas_gather_among_fewer_ranks_hold_more_and_average_the_rest():
    model = model_of("gpt")
    batch = model.random_batch(2, 32)
    with Ranks(4, "effkit.activations.on_ranks") as ranks:
        predicted, measured = predicted_and_measured(model, batch, ranks, num_replicas=2)
    assert measured.residual == 0
    assert predicted.total == pytest.approx(measured.total, rel=0.005)
    sent = predicted.companion(SENT_BYTES).frame["value"]
    assert dict(sent) == dict(measured.companion(SENT_BYTES).frame["value"])
    whole = ek.activations.forecast(model, batch, world_size=4)
    assert predicted.frame["value"]["parameter"] == pytest.approx(2 * whole.frame["value"]["parameter"], rel=0.05)
    assert sent["all-reduce"] == pytest.approx(sent["reduce-scatter"] / 2, rel=0.05)  # of shards


def test_measure_starts_ranks_sends_them_what_a_notebook_defines_and_leaves_none_behind():
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    told, others = [], set(psutil.Process().children(recursive=True))
    measured = ek.activations.measure(
        model, torch.randn(4, 32), loss=lambda output: output.square().mean(), world_size=2, repeats=1,
        progress=lambda done, total: told.append((done, total)),
    )  # fmt: skip
    assert measured.residual == 0
    assert measured.setting["world_size"] == 2
    assert list(measured.companion("Peak memory by rank").frame.index) == ["rank 0", "rank 1"]
    assert measured.companion("Time of one step").total > 0
    assert told
    assert told[-1][1] == 2
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert set(psutil.Process().children(recursive=True)) <= others


def test_what_cannot_be_sent_is_said_before_a_rank_is_started():
    model = nn.Linear(4, 4)
    model.lock = __import__("threading").Lock()
    with pytest.raises(ValueError, match=r"ranks are processes of their own, .* cannot be"):
        ek.activations.measure(model, torch.randn(2, 4), loss=lambda output: output.mean(), world_size=2)


def test_more_ranks_than_a_machine_starts_are_forecast_not_measured():
    with pytest.raises(ValueError, match=r"at most 8 ranks; given: 16\. Ask forecast\(\)"):
        ek.activations.measure(nn.Linear(4, 4), torch.ones(2, 4), loss=torch.sum, world_size=16)


def test_a_rank_of_64_holds_a_64th_and_no_process_group_is_left():
    model = model_of("gpt")
    batch = model.random_batch(2, 32)
    one, many = (ek.activations.forecast(model, batch, world_size=size).frame["value"] for size in (1, 64))
    for row in ("parameter", "optimizer state"):
        assert many[row] == pytest.approx(one[row] / 64, rel=0.1)  # shards of 2 layers of 64 are rounded up
    assert not dist.is_initialized()
    with pytest.raises(ValueError, match="cannot be cut"):
        ek.activations.forecast(model, batch, world_size=2, micro_batches=3)
    assert not dist.is_initialized()


def test_zero_3_shards_more_than_zero_2_and_that_more_than_zero_1():
    model = ek.models.gpt(device="cpu", hidden=64, layers=4, heads=4, vocabulary=64, max_input_cells=16)
    batch = model.random_batch(1, 8)
    totals = [ek.activations.forecast(model, batch, world_size=8, shard=shard).total
              for shard in ("zero3", "zero2", "zero1", "ddp")]  # fmt: skip
    assert totals == sorted(totals)
    assert len(set(totals)) == 4


@pytest.mark.parametrize(("how", "said"), [
    ({"world_size": 4, "tensor_parallel": 3}, "tensor_parallel divides world_size; given: 3 and 4"),
    ({"world_size": 2, "shard": "fsdp1"}, "shard is one of fsdp2, ddp, zero1, zero2, zero3; given: 'fsdp1'"),
    ({"world_size": 2, "wrap": "layer"}, "wrap is one of blocks, model"),
    ({"param_dtype": "bfloat16"}, "param_dtype is that in which ranks gather parameters: give a larger world_size"),
    ({"world_size": 2, "shard": "ddp", "param_dtype": "bfloat16"}, "ddp gathers no parameters: leave out param_dtype"),
    ({"world_size": 4, "num_replicas": 3}, "num_replicas divides the ranks; given: 3 and 4"),
    ({"world_size": 0}, "world_size is a whole number from 1 on"),
    ({"world_size": 2, "tensor_parallel": 2}, "has no tp_plan .* give plan="),
])  # fmt: skip
def test_worlds_that_cannot_be_are_refused(how, said):
    model = model_of("gpt")
    with pytest.raises(ValueError, match=said):
        ek.activations.forecast(model, model.random_batch(2, 8), **how)
    assert not dist.is_initialized()


def test_advice_on_memory_proposes_ranks_and_measures_them():
    model = model_of("gpt")
    batch = model.random_batch(2, 32)
    update = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(batch):
        update.zero_grad()
        model(**batch).loss.backward()
        update.step()

    study = ek.study(step=step, model=model, loader=[batch] * 4)
    with pytest.raises(ValueError, match="it goes with goal='memory'"):
        study.advise(num_ranks=2)
    advice = study.advise("memory", num_ranks=2)
    levers = [lever for lever in advice if lever.kind == "sharding"]
    sent = [lever.predicted.companion(SENT_BYTES).total for lever in levers]
    assert "zero2" in levers[0].name or "zero3" in levers[-1].name
    assert sent == sorted(sent)
    receipt = levers[-1].measure()
    assert abs(receipt.error) < 0.005


def test_a_rank_is_told_to_forecast_elsewhere():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = model_of("gpt")
        with pytest.raises(ValueError, match="in a process that is no rank itself"):
            ek.activations.forecast(model, model.random_batch(2, 8), world_size=2)
        with pytest.raises(ValueError, match="the setting is of 2 ranks; this process group has 1"):
            ek.activations.spread(model, Sharding(world_size=2))
    finally:
        dist.destroy_process_group()


def test_a_model_in_shards_is_measured_on_its_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        from torch.distributed.fsdp import fully_shard

        model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.ReLU()) for _ in range(3)))
        for part in (*model, model):
            fully_shard(part, mesh=dist.device_mesh.init_device_mesh("cpu", (1,)))
        weights = [parameter.to_local().clone() for parameter in model.parameters()]
        measured = ek.activations.measure(model, torch.randn(4, 32), loss=lambda output: output.square().mean())
        assert measured.residual == 0
        assert measured.frame["value"]["parameter"] == sum(weight.nbytes for weight in weights)
        assert all(torch.equal(w, p.to_local()) for w, p in zip(weights, model.parameters(), strict=True))
    finally:
        dist.destroy_process_group()
