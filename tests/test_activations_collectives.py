"""The time that a rank waits for others, of made-up links and steps; and the doors to it."""

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import effkit as ek
from effkit.activations import on_ranks
from effkit.activations.collectives import COLLECTIVES_OF, RanksClock, RanksRun, collective_bytes
from effkit.activations.levers import Levers
from effkit.activations.timeline import Signature, Timeline
from effkit.ranks.links import COLLECTIVES, fit

ALPHA_NS, NS_PER_BYTE, COMPUTING_NS = 100_000, 4, 10_000_000
SIZES = [2**power for power in range(10, 23)]


def link(kind):
    times = [ALPHA_NS + NS_PER_BYTE * size for size in SIZES]
    return fit(pd.DataFrame({"size_bytes": SIZES, "dur_ns": times}), 2, 1, 0.0, kind)


LINKS = {kind: link(kind) for kind in COLLECTIVES}
CLOCK = SimpleNamespace(step_ns=lambda timeline, levers, growth=1.0: COMPUTING_NS * growth,
                        backward_frac=lambda timeline, levers: 0.5)  # fmt: skip


def step(*sent):
    """A step of nothing but collectives: of (operator, values of its whole tensor in single precision)."""
    signatures = tuple(
        Signature(name, ((((size,), (1,), "torch.float32"),) * (1 + COLLECTIVES_OF[name][1]))) for name, size in sent
    )
    num = len(sent)
    empty = pd.DataFrame({"size_bytes": [], "birth": [], "death": [], "category": [], "module": [], "operator": []})
    return Timeline(tuple(name for name, _ in sent), empty, {}, (), np.ones((num, 4), dtype="int64"), signatures,
                    np.zeros(num, dtype=bool), np.zeros(num, dtype="int64"))  # fmt: skip


GATHER, REDUCE = "c10d::_allgather_base_", "c10d::allreduce_"


def takes(num_values):
    return ALPHA_NS + NS_PER_BYTE * num_values * 4 / 2  # a ring's message is one rank's part


def test_what_is_sent_under_fsdp2_is_waited_for():
    clock = RanksClock(CLOCK, LINKS, slower=1.5)
    computing, exposed = clock.step_ns(step((GATHER, 4096), (GATHER, 8192)), Levers(world_size=2))
    assert computing == 1.5 * COMPUTING_NS
    assert exposed == pytest.approx(takes(4096) + takes(8192))


@pytest.mark.parametrize("num_rows", [1, 4])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_clock_is_checked_by_steps_that_it_was_not_fitted_on(num_rows, blocks, monkeypatch):
    """A model without blocks is wrapped as a whole, whatever is asked for."""
    layers = [nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)] if blocks else [nn.Linear(8, 8), nn.ReLU()]
    model, ran = nn.Sequential(*layers), []

    def run(model, steps, *_, **__):
        ran.extend(steps)
        return [[{"phases": [{"forward": COMPUTING_NS}]}] for _ in steps]

    monkeypatch.setattr(on_ranks, "run", run)
    monkeypatch.setattr(on_ranks, "of_one_step", lambda *_, **__: nullcontext())
    monkeypatch.setattr(on_ranks, "start", lambda *_: None)
    base = ek.activations.measure(model, torch.ones(num_rows, 8), loss=torch.sum, time_levers=True, links=LINKS)
    assert len(base.calibration.of_ranks.errors) == (4 if blocks else 2)
    fitted, checks = ran[:4], ran[4:]
    for batch, levers in checks:
        same = [other for size, other in fitted if len(size) == len(batch)]
        assert levers not in same
        assert blocks or replace(levers, wrap="blocks") not in same


def test_buckets_are_sent_while_backward_goes_on_and_the_last_one_after_it():
    clock, levers = RanksClock(CLOCK, LINKS), Levers(world_size=2, shard="ddp")
    _, alone = clock.step_ns(step((REDUCE, 2**18)), levers)
    assert alone == pytest.approx(takes(2**18))  # it is full when backward ends
    _, two = clock.step_ns(step((REDUCE, 2**18), (REDUCE, 2**18)), levers)
    assert two == pytest.approx(takes(2**18))  # the first one is done before the second is full
    _, slow = clock.step_ns(step((REDUCE, 2**22), (REDUCE, 2**22)), levers)
    assert slow == pytest.approx(2 * takes(2**22) - COMPUTING_NS / 4)  # the second waits for the first


def test_each_micro_batch_waits_for_its_own_buckets():
    clock = RanksClock(CLOCK, LINKS)
    twice = step((REDUCE, 2**18), (REDUCE, 2**18))  # a replay has two micro-batches, which stand for all
    _, exposed = clock.step_ns(twice, Levers(world_size=2, shard="zero1", micro_batches=2))
    assert exposed == pytest.approx(2 * takes(2**18))


def test_its_fit_finds_how_much_slower_ranks_are_and_what_a_wrapper_adds():
    plain, fsdp2, ddp = Levers(), Levers(world_size=2), Levers(world_size=2, shard="ddp")
    sent = step((GATHER, 4096), (GATHER, 4096))
    truth = 2 * COMPUTING_NS + 2 * takes(4096) + 2 * 300_000
    averaged = step((REDUCE, 4096))
    runs = [RanksRun(plain, step(), [2 * COMPUTING_NS]), RanksRun(fsdp2, sent, [round(truth)]),
            RanksRun(ddp, averaged, [round(2 * COMPUTING_NS + takes(4096))])]  # fmt: skip
    checks = [RanksRun(Levers(world_size=2, shard="zero3"), sent, [round(truth / 1.1)])]
    clock = RanksClock.fit(CLOCK, LINKS, runs, checks)
    assert clock.slower == 2
    assert clock.added_ns == {"fsdp2": pytest.approx(300_000, rel=1e-3), "ddp": pytest.approx(0, abs=2)}
    assert clock.errors == (pytest.approx(0.1, rel=1e-3),)
    assert clock.trust.band_frac == pytest.approx(0.2, rel=1e-2)


def test_messages_larger_than_those_that_were_measured_are_told():
    clock, levers = RanksClock(CLOCK, LINKS), Levers(world_size=2)
    assert clock.doublings(step((GATHER, 2**20)), levers) == 0
    assert clock.doublings(step((GATHER, 2**23)), levers) == pytest.approx(2)


def test_bytes_are_of_the_whole_tensor():
    sent = step((GATHER, 100), ("c10d::_reduce_scatter_base_", 30), (REDUCE, 10))
    assert collective_bytes(sent, Levers()) == {"all-gather": 400, "reduce-scatter": 120, "all-reduce": 40}


# doors


@pytest.fixture(scope="module")
def model():
    return ek.models.gpt(layers=2, hidden=64, heads=4, device="cpu")


@pytest.fixture(scope="module")
def base(model):
    links = ek.activations.links(2, num_repeats=1)
    return ek.activations.measure(model, model.random_batch(4, 32), time_levers=True, links=links, repeats=1)


def test_a_step_on_ranks_has_a_time_and_what_of_it_is_exposed(base, model):
    predicted = ek.activations.predict(base, world_size=2, shard="zero1", micro_batches=2)
    time = predicted.companion("Time of one step")
    assert list(time.frame.index) == ["computing", "exposed communication"]
    assert time.low < time.total < time.high
    measured = ek.activations.measure(
        model, model.random_batch(4, 32), base=base, world_size=2, shard="zero1", micro_batches=2, repeats=1
    )
    assert 1 / 4 < time.total / measured.companion("Time of one step").total < 4
    assert abs(ek.Receipt(predicted, measured).error) < 0.005
    split = ek.activations.predict(base, world_size=4)
    assert "Time of one step" not in [one.title for one in split.companions]  # links were measured between two ranks


def test_the_front_of_ranks_begins_with_ddp_and_the_quickest_that_fits_is_on_it(base):
    table = ek.activations.front(base, num_ranks=2, levers=["sharding"])
    assert {"exposed_ns", "sent_bytes"} <= set(table.columns)
    assert table["setting"].str.startswith("world_size=2").all()
    assert {"world_size=2, shard=ddp", "world_size=2, shard=zero3"} <= set(table["setting"])
    least = table["peak_bytes"].min()
    fits = ek.activations.cheapest(base, round(1.02 * least), num_ranks=2, levers=["sharding"])
    assert fits.high <= 1.02 * least
    assert fits.setting["shard"] != "ddp"
    with pytest.raises(ValueError, match=r"on 4 ranks was not measured: .* links=links\(4\)"):
        ek.activations.front(base, num_ranks=4)
    with pytest.raises(ValueError, match="sharding is between ranks: give num_ranks"):
        ek.activations.front(base, levers=["sharding"])


def test_links_without_time_levers_are_refused():
    layer, batch = nn.Linear(4, 4), torch.ones(2, 4)
    with pytest.raises(ValueError, match="links go with time_levers=True"):
        ek.activations.measure(layer, batch, loss=torch.sum, links=LINKS)
    with pytest.raises(ValueError, match="a step of one process"):
        ek.activations.measure(layer, batch, loss=torch.sum, time_levers=True, links=LINKS, world_size=2)
    for given in (LINKS["all-gather"], {"all-gather": LINKS["all-gather"]}):
        with pytest.raises(ValueError, match=r"links are what activations\.links\(\) found, of every kind"):
            ek.activations.measure(layer, batch, loss=torch.sum, time_levers=True, links=given)
