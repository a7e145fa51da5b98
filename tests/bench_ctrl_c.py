"""Ctrl-C at 300 moments, and 40 second presses while 34 M parameters are put back: ``make bench``; wants minutes."""

from __future__ import annotations

from functools import partial

import pytest
from loops import BATCHES, Loop, begun, state
from test_ctrl_c import DOORS, check, pressed, scanned
from torch import nn

import effkit as ek

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
POSITIONS, SECOND_PRESSES = 100, 40


class Larger(Loop):
    """34 million parameters, and few examples."""

    def built(self):
        return nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 4096), nn.Linear(4096, 4096), nn.BatchNorm1d(4096))


def test_presses_at_300_moments():
    for door, (_, call) in DOORS.items():
        outcomes, whole_s = scanned(call, POSITIONS)
        late = sum(presses == 0 for presses, _ in outcomes)
        lost = sum(told < presses for presses, told in outcomes)
        print(f"\n{door}: {POSITIONS} positions in {whole_s:.1f} s: {late} after its end, {lost} lost, all given back")
        assert lost == 0


def test_40_second_presses_while_putting_back():
    loop = begun(Larger)
    num_parameters = sum(parameter.numel() for parameter in loop.model.parameters())
    before, told_of = state(loop), []
    for number in range(SECOND_PRESSES):
        again_s = (0.002, 0.01, 0.03, 0.06)[number % 4]
        run = partial(ek.study, step=loop.step, model=loop.model, loader=BATCHES)
        presses, told = pressed(run, 0.1 + 0.05 * (number // 4), [again_s, again_s])
        assert presses == 3
        told_of.append(told)
        check(loop, before)
    print(f"\n{num_parameters / 1e6:.1f} M parameters, {SECOND_PRESSES} times two more presses: {sum(told_of)} of "
          f"{3 * SECOND_PRESSES} told, the rest late or at once with another; all given back")  # fmt: skip
    assert min(told_of) >= 1
