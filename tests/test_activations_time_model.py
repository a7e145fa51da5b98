"""The clock, on steps whose times are made up: what it is told it gives back, and it finds the laws behind it."""

from dataclasses import replace

import numpy as np
import pytest
from activation_models import made_timeline

from effkit.activations.levers import Levers
from effkit.activations.time_model import Clock, Run

COST = {"mm": (1000.0, 0.5, 0.01), "relu": (500.0, 0.25, 0.0), "adam": (2000.0, 1.0, 0.0)}
PER_OPERATOR = 3000.0


def step(size, extra=0, half=False):
    """Forward, backward and update on tensors of three sizes, with ``extra`` operators more."""
    ops = ["mm", "relu"] * 3 + ["mm", "mm", "relu"] * 2 + ["relu"] * extra + ["adam", "adam"]
    moved = np.array([size * (1 + i % 3) for i in range(len(ops))])
    flops = np.array([50 * m if op == "mm" else 0 for op, m in zip(ops, moved, strict=True)])
    return made_timeline(ops, firsts=(0, 6, len(ops) - 2), moved=moved, flops=flops, half=[half] * len(ops))


def durations(timeline):
    costs = np.array([COST[op] for op in timeline.ops])
    return costs[:, 0] + costs[:, 1] * timeline.work[:, 3] + costs[:, 2] * timeline.work[:, 1]


def truth(timeline, more=0.0):
    return durations(timeline).sum() + PER_OPERATOR * len(timeline.ops) + more


def run(levers, timeline, more=0.0):
    return Run(levers, timeline, durations(timeline).round().astype("int64"), round(truth(timeline, more)))


PLAIN = step(1000)
RUNS = [
    run(Levers(), PLAIN),
    run(Levers(checkpoint_every=1), step(1000, extra=6)),
    run(Levers(compress="int8"), step(1000, extra=12), more=40_000),
    run(Levers(offload_frac=1.0), step(1000, extra=3), more=90_000),
]


@pytest.fixture(scope="module")
def clock():
    return Clock.fit(RUNS)


def test_every_run_is_given_back(clock):
    for one in RUNS:
        assert clock.step_ns(one.timeline, one.levers) == pytest.approx(one.step_ns, rel=1e-6)


def test_backward_s_share_of_a_step_is_that_of_its_operators(clock):
    each = durations(PLAIN) + PER_OPERATOR
    assert clock.backward_frac(PLAIN, Levers()) == pytest.approx(each[6:-2].sum() / each.sum(), rel=0.05)


def test_steps_without_corrections_are_found_to_be_of_that_law():
    runs = [run(Levers(), PLAIN), run(Levers(checkpoint_every=1), step(1000, extra=6))]
    exact = Clock.fit([*runs, run(Levers(micro_batches=2), step(500, extra=6))])
    for size in (500, 1500, 4000):
        assert exact.step_ns(step(size), Levers()) == pytest.approx(truth(step(size)), rel=0.02)


def test_a_lever_that_is_half_in_force_is_corrected_by_half(clock):
    timeline = step(1000, extra=3)
    none, half, whole = (clock.step_ns(timeline, Levers(checkpoint_every=every)) for every in (0, 2, 1))
    assert half == pytest.approx((none + whole) / 2, rel=1e-9)
    assert whole != none


def test_offloading_a_part_looks_at_every_tensor_too(clock):
    timeline = step(1000, extra=3)
    none, half, whole = (clock.step_ns(timeline, Levers(offload_frac=frac)) for frac in (0.0, 0.5, 1.0))
    assert half == whole > none


def test_corrections_of_several_levers_add_up(clock):
    timeline = step(1000)
    plain = clock.step_ns(timeline, Levers())
    settings = {"compress": "int8"}, {"offload_frac": 1.0}, {"compress": "int8", "offload_frac": 1.0}
    one, other, both = (clock.step_ns(timeline, Levers(**setting)) - plain for setting in settings)
    assert both == pytest.approx(one + other, rel=1e-6)


def test_corrections_grow_with_the_batch(clock):
    timeline, levers = step(1000), Levers(compress="int8")
    times = [clock.step_ns(timeline, levers, growth) for growth in (1.0, 2.0, 3.0)]
    assert times[2] - times[1] == pytest.approx(times[1] - times[0], rel=1e-6)
    assert clock.step_ns(timeline, levers, -1e9) >= 0


def test_what_python_does_to_call_a_block_again_recurs_with_every_micro_batch_and_not_with_the_rows():
    clock = Clock.fit([RUNS[0], run(Levers(checkpoint_every=1), step(1000, extra=6), more=60_000)])
    timeline, none = step(1000, extra=6), replace(clock, corrections={})

    def beyond(growth, parts):
        levers = Levers(checkpoint_every=1, micro_batches=parts)
        return clock.step_ns(timeline, levers, growth) - none.step_ns(timeline, levers, growth)

    assert beyond(2, 1) == pytest.approx(beyond(1, 1))
    assert beyond(1, 4) == pytest.approx(4 * beyond(1, 1))


def test_what_offloading_costs_by_the_tensor_recurs_with_every_micro_batch(clock):
    timeline = step(1000, extra=3)
    runs = [run(Levers(offload_frac=1.0, micro_batches=parts), timeline, 50_000 + 40_000 * parts) for parts in (1, 4)]
    fitted = Clock.fit([RUNS[0], *runs])

    def beyond(parts, growth=1.0):
        levers = Levers(offload_frac=0.5, micro_batches=parts)
        without = replace(fitted, corrections={}).step_ns(timeline, levers, growth)
        return fitted.step_ns(timeline, levers, growth) - without

    assert fitted.step_ns(timeline, runs[1].levers) == pytest.approx(runs[1].step_ns)
    assert beyond(3) == pytest.approx(beyond(1) + 2 / 3 * (beyond(4) - beyond(1)))
    assert beyond(4, 2.0) == pytest.approx(beyond(4) + beyond(1))  # the bytes alone are twice as many
    assert fitted.knows(runs[1].levers)
    assert not clock.knows(runs[1].levers)  # which has seen no micro-batch offloaded


def test_micro_batches_and_smaller_batches_are_corrected_by_how_many_rows_run_at_once():
    """Each part of a batch takes 10 us less than the law says where half as much runs at once, 5 us more at a quarter:
    a batch half as large is one such part, a batch twice as large, cut into four, has four of them."""
    runs = [run(Levers(micro_batches=parts), PLAIN, parts * more) for parts, more in ((1, 0), (2, -1e4), (4, 5e3))]
    clock = Clock.fit(runs)
    assert list(clock.missing) == [1, 2, 4]

    def beyond(parts, growth):
        plain = replace(clock, missing={1: 0.0})
        levers = Levers(micro_batches=parts)
        return clock.step_ns(PLAIN, levers, growth) - plain.step_ns(PLAIN, levers, growth)

    whole, halves, quarters = (beyond(parts, 1) for parts in (1, 2, 4))
    assert beyond(1, 0.5) == pytest.approx(halves / 2)
    assert beyond(4, 2) == pytest.approx(2 * halves)
    assert beyond(2, 0.5) == pytest.approx(quarters / 2)
    assert beyond(3, 1) == pytest.approx((halves + quarters) / 2)
    assert beyond(1, 3) == pytest.approx(3 * whole)  # nothing larger was run
    assert clock.doublings(Levers(micro_batches=4), 1) == 0
    assert clock.doublings(Levers(micro_batches=8), 1) == 1


def test_it_knows_the_levers_that_were_run(clock):
    assert clock.knows(Levers())
    assert clock.knows(Levers(checkpoint_every=3, compress="int8", offload_frac=0.2))
    assert not clock.knows(Levers(checkpoint_every=1, keep="matmul"))
    assert not clock.knows(Levers(compress="fp8_e4m3"))
    assert not clock.knows(Levers(autocast="bfloat16"))
    assert clock.doublings(Levers(micro_batches=2), 1) == 1  # none was run
    assert not clock.knows(Levers(optimizer_states="int8"))


def test_an_operator_that_was_never_timed_costs_what_the_median_one_does(clock):
    other = step(1000)
    strange = made_timeline(["strange", *other.ops[1:]], firsts=(0, 6, 12), moved=other.work[:, 3],
                            flops=other.work[:, 1])  # fmt: skip
    assert 0.5 < clock.step_ns(strange, Levers()) / clock.step_ns(other, Levers()) < 2


def test_half_precision_has_costs_of_its_own():
    half = Run(Levers(autocast="bfloat16"), step(1000, half=True), (durations(PLAIN) / 4).astype("int64"), 70_000)
    clock = Clock.fit([RUNS[0], half])
    assert clock.costs["mm", True] @ [1, 1000, 50_000] == pytest.approx(
        clock.costs["mm", False] @ [1, 1000, 50_000] / 4, rel=0.01
    )


def test_micro_batches_that_are_not_replayed_take_their_time():
    ops = ["mm", "relu"] * 4 + ["adam"]
    timeline = made_timeline(ops, firsts=(0, 2, 4, 6, 8), moved=[1000] * 9, flops=[100] * 9)
    clock = Clock.fit([RUNS[0]])
    two, four = (clock.step_ns(timeline, Levers(micro_batches=count)) for count in (2, 4))
    assert four > 1.6 * two - 0.6 * clock.step_ns(made_timeline(["adam"] * 3, moved=[1000] * 3), Levers())


def test_its_error_is_that_of_steps_it_did_not_see(clock):
    assert clock.errors == ()
    both = Levers(compress="int8", offload_frac=1.0)
    checked = Clock.fit(RUNS, [run(both, step(1000, extra=15), more=150_000), replace(RUNS[0], growth=0.5)])
    assert checked.corrections == clock.corrections
    assert checked.errors[0] == pytest.approx(
        clock.step_ns(step(1000, extra=15), both) / truth(step(1000, extra=15), 150_000) - 1, abs=1e-6
    )
    assert abs(checked.errors[0]) > 0.01
    assert checked.trust.band_frac == pytest.approx(2 * np.sqrt(np.mean(np.square(checked.errors))))
    assert checked.doublings(Levers(), 0.5) == 0
    assert clock.doublings(Levers(), 0.5) == 1
    assert checked.doublings(Levers(), 2.0) == 1


def test_its_noise_is_that_of_repeats():
    repeated = [replace(one, repeats_ns=(100, 110, 100)) for one in RUNS]
    assert Clock.fit(repeated).noise_frac == pytest.approx(0.105, abs=0.001)
    assert Clock.fit(repeated).num_repeats == 3
    assert Clock.fit(RUNS).noise_frac == 0
