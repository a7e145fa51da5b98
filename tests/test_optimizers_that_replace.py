"""Optimizers that put new tensors into the place of their state, as hand-written ones do: counted once, by all labs."""

from __future__ import annotations

import pytest
import torch

import effkit as ek
from effkit import activations, padding
from effkit.activations import LowBitAdamW
from effkit.training import PerParameter, states_replaced

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH, LAYERS = 128, 4


class Replacing(PerParameter):
    """AdamW as courses write it: ``state["m"] = new``."""

    def __init__(self, parameters, lr=1e-3):
        super().__init__(parameters, {"lr": lr})

    def _update(self, parameter, settings):
        state = self.state[parameter]
        for name, power in (("m", 1), ("v", 2)):
            before = state.get(name, torch.zeros_like(parameter))
            state[name] = 0.9 * before + 0.1 * parameter.grad**power
        parameter.sub_(settings["lr"] * state["m"] / (state["v"].sqrt() + 1e-8))


class InPlace(Replacing):
    def _update(self, parameter, settings):
        state = self.state[parameter]
        for name, power in (("m", 1), ("v", 2)):
            before = state.setdefault(name, torch.zeros_like(parameter))
            before.copy_(0.9 * before + 0.1 * parameter.grad**power)
        parameter.sub_(settings["lr"] * state["m"] / (state["v"].sqrt() + 1e-8))


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)))


BATCH = torch.randn(4, WIDTH)
STATES = 2 * 4 * LAYERS * (WIDTH * WIDTH + WIDTH)  # two moments of float32


def square(output):
    return output.square().mean()


@pytest.mark.parametrize("make", [Replacing, InPlace, torch.optim.AdamW])
def test_states_are_counted_once(make):
    measured = activations.measure(model(), BATCH, loss=square, optimizer=make, repeats=1)
    steps = 4 * 2 * LAYERS if make is torch.optim.AdamW else 0  # of its counters
    assert measured.residual == 0
    largest = 4 * WIDTH * WIDTH  # beside the states, one parameter's new ones and what makes them
    assert STATES + steps <= measured.frame["value"]["optimizer state"] <= STATES + steps + 2 * largest


@pytest.mark.parametrize("make", [Replacing, LowBitAdamW])
def test_a_peak_is_that_of_a_session_that_has_seen_the_states_being_made(make):
    """The profiler does not see the end of what is older than itself: a whole training inside it is the truth."""
    net = model()
    update = make(net.parameters())

    def step():
        square(net(BATCH)).backward()
        update.step()
        update.zero_grad()

    from effkit.recording import memory_events

    def training():
        for _ in range(2):
            step()
        with torch.profiler.record_function("steady"):
            step()

    seen = memory_events(training)
    begin = seen.events.loc[seen.events["name"] == "steady", "start_ns"].iloc[0]
    before, steady = (seen.memory[there] for there in (seen.memory["time_ns"] < begin, seen.memory["time_ns"] >= begin))
    parameters = 4 * LAYERS * (WIDTH * WIDTH + WIDTH)
    at_first = int(before["total_bytes"].iloc[0] - before["size_bytes"].iloc[0])
    truth = parameters + BATCH.nbytes + int(steady["total_bytes"].max()) - at_first

    fresh = model()
    measured = activations.measure(fresh, BATCH, loss=square, optimizer=make, repeats=1)
    forecast = activations.forecast(fresh, BATCH, loss=square, optimizer=make)
    assert measured.total == pytest.approx(truth, rel=0.005)
    assert forecast.total == pytest.approx(truth, rel=0.005)


def test_it_is_told_whether_states_were_replaced():
    for make, expected in ((Replacing, True), (InPlace, False), (torch.optim.AdamW, False), (LowBitAdamW, True)):
        net = model()
        update = make(net.parameters())
        for _ in range(2):
            replaced = states_replaced([update])
            square(net(BATCH)).backward()
            update.step()
        assert replaced() is expected, make


def test_a_study_and_the_padding_lab_count_them_once():
    lengths = [5, 9, 16, 30] * 6
    rows = [torch.randint(0, 50, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]

    def padded(rows):
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        return {"input_ids": ids, "attention_mask": torch.nn.utils.rnn.pad_sequence(
            [torch.ones_like(row) for row in rows], batch_first=True)}  # fmt: skip

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.rest = torch.nn.Embedding(50, WIDTH), model()

        def forward(self, input_ids, attention_mask):
            return self.rest(self.table(input_ids)) * attention_mask[..., None]

    peaks = {}
    for make in (Replacing, InPlace):
        net = Net()
        update = make(net.parameters())

        def step(batch, net=net, update=update):
            square(net(**batch)).backward()
            update.step()
            update.zero_grad()

        loader = torch.utils.data.DataLoader(rows, 4, collate_fn=padded)
        study = ek.study(step=step, model=net, loader=loader, num_batches=4)
        lab = study.epoch.companion(padding.PEAK).total
        peaks[make] = study.memory.total, lab, study.peaks.of(study.largest)
    largest = 2 * 4 * WIDTH * WIDTH
    for replacing, in_place in zip(peaks[Replacing], peaks[InPlace], strict=True):
        assert abs(replacing - in_place) <= largest


def test_gradients_that_are_accumulated_are_no_leak_and_states_are_there():
    net = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
    update, count = torch.optim.AdamW(net.parameters()), 0

    def step(batch):
        nonlocal count
        square(net(batch)).backward()
        count += 1
        if count % 3 == 0:
            update.step()
            update.zero_grad()

    loader = torch.utils.data.DataLoader(torch.randn(48, 64), 4)
    study = ek.study(step=step, model=net, loader=loader, num_batches=4)
    assert study.rhythm == (3, 3)
    assert study.kept.growth_bytes <= 64
    assert study.memory.frame["value"]["optimizer state"] == 2 * 4 * 2 * (64 * 64 + 64) + 4 * 4
    assert count == 0
