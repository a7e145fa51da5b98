"""The exercises of lesson 06e, and what its slider predicts and runs."""

import pytest
from test_exercises import in_notebook, refused

from effkit import models
from lessons.cluster import hybrid_parallel as hp
from lessons.cluster import placement

pytestmark = pytest.mark.usefixtures("one_thread")
NAME = "06e_cluster_on_paper"
COST = hp.SequenceCost(quadratic_ns=2.0, linear_ns=10.0, fixed_ns=5.0, spread_frac=0.1, longest=64)


def test_the_micro_batches_that_double_a_ratio_are_accepted_alone():
    # ZeRO++ takes n x 2.2958 s. Three levels take n x 0.9 s and, once per step, 1.0833 s
    check = in_notebook(NAME, "my_micro_batches = 1\n", placement=placement)
    check("my_micro_batches = 5\n")
    refused(check, *(f"my_micro_batches = {n}\n" for n in (1, 4, 6, 8, 64, 0, "'5'")))


def test_the_step_of_the_slowest_rank_is_accepted_alone():
    first = "def my_step(ranks, a, b, c):\n    return max(sum(lengths) for lengths in ranks)"
    first += "  # two or three lines of yours\n"
    check = in_notebook(NAME, first, hybrid_parallel=hp)
    code = "def my_step(ranks, a, b, c):\n    return {}(sum({} for s in lengths) for lengths in ranks)\n"
    check(code.format("max", "a * s**2 + b * s + c"))
    wrong = (("sum", "a * s**2 + b * s + c"), ("min", "a * s**2 + b * s + c"), ("max", "a * s**2 + b * s"),
             ("max", "b * s + c"), ("max", "s"))  # fmt: skip
    refused(check, *(code.format(*pair) for pair in wrong))


def test_the_slowest_rank_by_hand():
    assert hp.slowest_ns([[10], [4, 4]], COST) == 2 * 100 + 10 * 10 + 5
    assert hp.slowest_ns([[10], [6] * 3], COST) == 3 * (2 * 36 + 10 * 6 + 5)


def test_the_slider_predicts_a_schedule_and_the_button_runs_it():
    lengths = [16, 16, 32, 64]
    model = models.text(layers=1, hidden=32, vocabulary=50, device="cpu")
    base = hp.measure(hp.naive(lengths, 2, 64), model, repeats=1)
    assert base.setting == {"schedule": hp.NAIVE, "num_ranks": 2}
    panel = hp.whatif(base, model, lengths, 64, COST)
    panel.controls["schedule"].value = hp.BALANCED
    # by hand: 64 on one rank, all others on the other
    assert panel.result.total == COST.time_ns(64)
    panel.controls["num_ranks"].value = 1
    assert panel.result.total == sum(int(COST.time_ns(n)) for n in lengths)
    receipt = panel.measure()
    assert receipt.setting == {"num_ranks": 1, "schedule": hp.BALANCED}
    assert receipt.measured.total > 0
