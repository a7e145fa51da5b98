"""A shared machine works at another speed for seconds at a time: calibrations and receipts are the same there."""

import numpy as np
import pandas as pd
import pytest
import torch
from test_padding_bad_input import MODEL
from torch import nn

import effkit as ek
from effkit import activations, decoder, padding
from effkit.activations import stepping
from effkit.activations.on_ranks import TIME
from effkit.decoder import live as generating
from effkit.decoder.module_timers import watch
from effkit.padding import live
from effkit.timing import ratios_in_turn

LENGTHS = pd.DataFrame({"input_length": np.random.default_rng(0).integers(4, 40, 48)})


class Machine:
    """Runs what takes so many ms, and has a clock; between ``begin`` and ``end`` [ms] it is slower."""

    def __init__(self, begin=0.0, end=0.0, slower=1.4):
        self.now, self.begin, self.end, self.slower = 0.0, begin, end, slower

    def run(self, work_ms):
        taken = work_ms * (self.slower if self.begin <= self.now < self.end else 1.0)
        self.now += taken
        return round(1e6 * taken)


@pytest.mark.parametrize("begin", range(-300, 700, 90))
def test_ratios_are_those_of_a_steady_machine_wherever_it_was_slow(begin):
    works = [120.0, 200.0, 50.0, 90.0, 310.0, 140.0, 80.0, 100.0]
    machine = Machine(10 * begin, 10 * begin + 4000)
    times, ratios = ratios_in_turn(
        lambda: machine.run(100.0), [lambda work=work: machine.run(work) for work in works],
        lambda ratios: range(len(works)) if len(ratios[0]) < 3 else [],
    )  # fmt: skip
    assert [len(of_one) for of_one in ratios] == [3] * len(works)
    assert np.median(ratios, axis=1) == pytest.approx(np.array(works) / 100.0, rel=0.01)
    assert min(times) in (100_000_000, 140_000_000)


def test_each_is_run_as_often_as_is_asked_for_and_the_reference_warms_up():
    made = []

    def call(name, taken=30_000_000):
        return lambda: made.append(name) or taken

    times, ratios = ratios_in_turn(
        call("r"), [call("a"), call("b", 60_000_000)], lambda ratios: [1] * (len(ratios[1]) < 2)
    )
    assert "".join(made) == "rrbrbr"
    assert times == [30_000_000] * 3
    assert ratios == [[], [2.0, 2.0]]


def test_short_ones_are_run_a_few_times_at_once_and_a_spike_does_not_count():
    spikes = iter([1, 1, 9, 1, 1, 9, 1, 9, 9, 1, 1, 1, 1, 1, 1, 9, 1, 1, 9, 1] * 4)
    times, ((ratio,),) = ratios_in_turn(
        lambda: 5_000_000 * next(spikes), [lambda: 4_000_000 * next(spikes)], lambda ratios: [0] * (not ratios[0])
    )
    assert times == [5_000_000] * 2
    assert ratio == pytest.approx(0.8)


@pytest.fixture
def speed(monkeypatch):
    """How slow both labs' clocks find the machine: a dict to change. A step takes what its batch holds."""
    now = {"slower": 1.0}

    def step_ns(call):
        call()
        (batch,) = call.args
        return round(now["slower"] * sum(1_000 + 100 * tensor.numel() for tensor in batch.values()))

    def phases_ns(model, batch, loss, update, levers):
        stepping.run(model, batch, loss, update, levers)
        part = round(now["slower"] * (1_000_000 + 500_000 * bool(levers.changed)))
        return {"forward": part, "backward": 2 * part, "optimizer": part // 4}

    monkeypatch.setattr(live, "elapsed_ns", step_ns)
    monkeypatch.setattr(stepping, "phases_ns", phases_ns)
    return now


def test_an_epoch_is_told_relative_to_the_base_beside_it(speed):
    plan, other = (padding.plan(LENGTHS, strategy, batch_size=8) for strategy in ("random", "sorted"))
    base = padding.measure(plan, MODEL)
    quick = padding.measure(other, MODEL, base=base)
    assert "as long as before" not in quick.source
    speed["slower"] = 1.5
    slow, again = padding.measure(other, MODEL, base=base), padding.measure(plan, MODEL, base=base)
    assert slow.total == pytest.approx(quick.total, rel=1e-6)
    assert again.total == pytest.approx(base.total, rel=1e-6)
    assert "relative to the base measured in turn, which took 1.5 times as long as before" in slow.source
    assert padding.measure(other, MODEL).total == pytest.approx(1.5 * quick.total, rel=0.01), "without a base: as it is"


def test_a_step_is_told_relative_to_the_base_beside_it(speed):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1))
    batch, setting = {"input": torch.randn(8, 8)}, {"loss": lambda output: output.square().mean()}
    base = activations.measure(model, batch, **setting)
    assert base.companion(TIME).total == 3_250_000
    speed["slower"] = 2.0
    moved = activations.measure(model, batch, base=base, micro_batches=2, **setting)
    assert moved.companion(TIME).total == 4_875_000
    assert moved.companion(TIME).frame["value"].tolist() == [1_500_000, 3_000_000, 375_000]
    assert "relative to the base measured in turn, which took 2 times as long" in moved.companion(TIME).source
    beside_a_prediction = activations.measure(model, batch, base=activations.predict(base, micro_batches=2), **setting)
    assert beside_a_prediction.companion(TIME).total == 9_750_000, (
        "as it is: nothing was measured that it could be told by"
    )
    at_rest = activations.measure(model, batch, base=base, **setting)
    assert at_rest.companion(TIME).total == base.companion(TIME).total


@pytest.fixture(scope="module")
def generator():
    """A model, and its generation on a machine where a token takes 10 ms, clocks inside a tenth more."""
    model, machine = ek.models.text(hidden=32, heads=2, layers=1), Machine()

    def elapsed_ns(generate):
        return machine.run(10.0 * generate().sequences.numel())

    def watched(model, generate):
        made = []
        seen = watch(model, lambda: made.append(generate()))
        return seen.lasting(machine.run(11.0 * made[0].sequences.numel()))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(generating, "elapsed_ns", elapsed_ns)
        patched.setattr(generating, "watch", watched)
        yield model, machine, decoder.measure(model, num_steps=8, input_length=2, repeats=3)


@pytest.mark.parametrize("begin", [0, 50, 150, 300, 450, 600, 800, 1000])
def test_a_generation_is_told_relative_to_the_base_beside_it_wherever_the_machine_was_slow(generator, begin):
    model, machine, base = generator
    assert base.total == 100_000_000
    assert base.residual == pytest.approx(-0.1 * base.total, rel=1e-3), "what the clocks cost"
    for slow_ms in (300, 100_000):
        machine.begin, machine.end = machine.now + begin, machine.now + begin + slow_ms
        moved = decoder.measure(model, base=base, num_steps=18, repeats=5)
        assert moved.total == pytest.approx(2 * base.total, rel=0.02)


def test_the_costs_of_a_generation_are_those_of_a_steady_machine(generator):
    model, machine, _ = generator
    machine.begin = machine.end = machine.now
    steady = decoder.measure(model, num_steps=8, input_length=2, repeats=3).calibration
    machine.begin, machine.end = machine.now + 400, machine.now + 4_000
    drifting = decoder.measure(model, num_steps=8, input_length=2, repeats=3).calibration
    taken, before = ([run.total_ns for run in one.runs] for one in (drifting, steady))
    assert np.array(taken) / taken[0] == pytest.approx(np.array(before) / before[0], rel=0.05)
