"""What a study or a measurement runs on comes back bit for bit, whatever the loop does and however it ends."""

from __future__ import annotations

import random
from contextlib import suppress

import numpy as np
import pytest
import torch
from loops import BATCHES, LOOPS, Codes, Loop, Master, Teacher, begun, same, stack, state
from torch import nn

import effkit as ek
from effkit import activations

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ENDINGS = {"ends": None, "an exception": KeyError, "Ctrl-C": KeyboardInterrupt}
each_ending = pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)


def interrupted(step, ending, at):
    """The step, and in its call of this number, when it is through, this ending."""
    calls = []

    def run(*given):
        result = step(*given)
        calls.append(1)
        if ending and len(calls) == at:
            raise ending
        return result

    return run


@each_ending
@pytest.mark.parametrize("kind", LOOPS)
def test_a_loop_that_was_studied_goes_on_as_if_it_was_not(kind, ending):
    loop = begun(kind)
    before = state(loop)
    step = interrupted(loop.step, ending, at=5)
    with suppress(KeyError, KeyboardInterrupt):
        ek.study(step=step, model=loop.model, loader=BATCHES, num_batches=3)
        assert ending is None
    after = state(loop)
    wrong = [i for i, (one, other) in enumerate(zip(before[0], after[0], strict=True)) if not same(one, other)]
    assert not wrong, [(before[0][i], after[0][i]) for i in wrong]
    assert after[1:] == before[1:]
    losses = [loop.step(batch).item() for batch in BATCHES]
    plain = begun(kind)
    assert same(losses, [plain.step(batch).item() for batch in BATCHES])
    assert same(state(plain)[0], state(loop)[0])


class Noisy(nn.Module):
    """Draws from every source in forward, and keeps books."""

    def __init__(self):
        super().__init__()
        self.inside, self.numbers, self.seen = Codes(), np.random.default_rng(0), {"calls": 0}
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x):
        self.seen["calls"] += 1
        noise = torch.rand(x.shape[0], 1, generator=self.generator)
        return self.inside(x + float(self.numbers.random()) + np.random.rand() + random.random() + noise)  # noqa: NPY002


class Clipped(torch.optim.AdamW):
    """Clips in its step, and writes into gradients and weights whatever the learning rate is."""

    def step(self, closure=None):
        parameters = self.param_groups[0]["params"]
        nn.utils.clip_grad_norm_(parameters, 0.01)
        super().step(closure)
        with torch.no_grad():
            for one in parameters:
                one.mul_(0.99)


MODELS = {
    "plain": stack, "a teacher": Teacher, "buffers bound anew": Codes, "noise": Noisy,
    "float16 that overflows": lambda: nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).half(),
}  # fmt: skip
OPTIMIZERS = {"none": None, "rprop": torch.optim.Rprop, "relative": torch.optim.Adafactor, "clipped": Clipped,
              "master": Master, "momentum": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9)}  # fmt: skip


@each_ending
@pytest.mark.parametrize(("name", "optimizer"), [
    *((name, "none") for name in MODELS), *(("plain", name) for name in OPTIMIZERS if name != "none"),
    ("float16 that overflows", "master"), ("noise", "clipped"), ("a teacher", "rprop"),
])  # fmt: skip
def test_a_model_that_was_measured_is_as_it_was(name, optimizer, ending):
    torch.manual_seed(0)
    loop = Loop()
    loop.model, loop.updates, half = MODELS[name](), [], "float16" in name
    if name == "noise":
        loop.holds = lambda: (loop.model.seen, loop.model.numbers.bit_generator.state,
                              loop.model.generator.get_state(), loop.model.inside.queue)  # fmt: skip
    batch = BATCHES[0].half() if half else BATCHES[0]
    loop.model(batch).sum().backward()
    before = state(loop)
    scale = 1e7 if half else 1
    loss = interrupted(lambda output: scale * output.square().mean(), ending, at=3)
    with suppress(KeyError, KeyboardInterrupt):
        activations.measure(loop.model, batch, loss=loss, optimizer=OPTIMIZERS[optimizer], repeats=1)
        assert ending is None
    after = state(loop)
    wrong = [i for i, (one, other) in enumerate(zip(before[0], after[0], strict=True)) if not same(one, other)]
    assert not wrong, [(before[0][i], after[0][i]) for i in wrong]
    assert after[1:] == before[1:]
