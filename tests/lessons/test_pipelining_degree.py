"""The pipelining degree: the schedule, its closed forms, and the scheduler against running every degree."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lessons import pipelining_degree as degrees
from lessons.pipelining_degree import LayerCosts, Task

_ns = st.one_of(st.just(0.0), st.floats(0.01, 100.0))
_tasks = st.builds(Task, alpha_ns=_ns, beta_ns=st.floats(0.01, 10.0), size=st.one_of(st.just(0.0), st.floats(1, 500.0)))
_costs = st.builds(
    LayerCosts,
    dispatch=_tasks, experts=_tasks, combine=_tasks, all_gather=_tasks, reduce_scatter=_tasks,
    gradient_ns=st.one_of(st.just(0.0), st.floats(0.1, 3000.0)),
)  # fmt: skip


def by_waiting(costs, num_chunks):
    """The same schedule from its rules: a task starts when its stream is free and what it waits for has ended."""
    durations = dict(zip("DGESC", (task.chunk_ns(num_chunks) for task in costs.chain), strict=True))
    chunks = range(num_chunks)
    streams = [
        [("D", i) for i in chunks] + [("gradient", 0)] + [("C", i) for i in chunks],
        [("G", i) for i in chunks] + [("S", i) for i in chunks],
        [("E", i) for i in chunks],
    ]
    ended, free = {}, [0.0, 0.0, 0.0]
    while any(streams):
        for which, queue in enumerate(streams):
            if not queue:
                continue
            kind, i = queue[0]
            before = {"G": "D", "E": "G", "S": "E", "C": "S"}.get(kind)
            if before and (before, i) not in ended:
                continue
            start = max(free[which], ended[before, i] if before else 0.0)
            free[which] = ended[kind, i] = start + durations.get(kind, costs.gradient_ns)
            queue.pop(0)
    return max(ended.values())


@settings(max_examples=200, deadline=None)
@given(_costs, st.integers(1, 12))
def test_the_schedule_obeys_its_streams_and_what_chunks_wait_for(costs, num_chunks):
    expected = max(by_waiting(costs, num_chunks), 0.0)
    assert degrees.pipelined_ns(costs, num_chunks) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(_costs, st.integers(1, 40))
def test_the_largest_closed_form_is_the_schedule(costs, num_chunks):
    longest = max(piece.at(num_chunks) for piece in degrees.pieces(costs))
    assert longest == pytest.approx(degrees.pipelined_ns(costs, num_chunks), rel=1e-9, abs=1e-9)


@settings(max_examples=300, deadline=None)
@given(_costs, st.integers(1, 60))
def test_the_scheduler_is_as_quick_as_running_every_degree(costs, max_degree):
    best = degrees.best_degree(costs, max_degree)
    times = {r: degrees.pipelined_ns(costs, r) for r in range(1, max_degree + 1)}
    assert times[best] <= min(times.values()) * (1 + 2e-9)


@settings(max_examples=200, deadline=None)
@given(_costs, st.sets(st.integers(1, 40), min_size=1))
def test_among_allowed_degrees_it_takes_the_best(costs, allowed):
    best = degrees.best_degree(costs, 40, allowed=tuple(allowed))
    assert best in allowed
    least = min(degrees.pipelined_ns(costs, r) for r in allowed)
    assert degrees.pipelined_ns(costs, best) <= least * (1 + 4e-9)


def test_the_scheduler_runs_no_schedule(monkeypatch):
    def refuse(*_):
        raise AssertionError("ran a schedule")

    monkeypatch.setattr(degrees, "pipelined_ns", refuse)
    task = Task(alpha_ns=1.0, beta_ns=1.0, size=1e10)
    costs = LayerCosts(dispatch=task, experts=task, combine=task, gradient_ns=3.0)
    assert degrees.best_degree(costs, 10**9) > 1  # a search would not end


def test_compute_bound_degree_is_the_square_root():
    exchange, experts = Task(1.0, 1.0, 200.0), Task(5.0, 1.0, 4000.0)
    costs = LayerCosts(exchange, experts, exchange)
    # 2 t_a2a + r t_exp: the start-ups of experts against two halves of the exchange, sqrt(2 * 200 / 5)
    expected = math.sqrt(400 / 5)
    best = degrees.best_degree(costs, 100)
    assert best in (math.floor(expected), math.ceil(expected))
    assert degrees.binding(costs, best) == "compute"
    assert degrees.pipelined_ns(costs, best) == pytest.approx(2 * (1 + 200 / best) + best * 5 + 4000)


@pytest.mark.parametrize(
    ("changes", "binds", "expected"),
    [
        ({"experts": Task(1.0, 1.0, 900.0)}, "compute", lambda d, g, e, r: 2 * d + 2 * g + r * e),
        ({"dispatch": Task(1.0, 1.0, 900.0)}, "inter-node", lambda d, g, e, r: 2 * r * d + 2 * g),
        ({"all_gather": Task(1.0, 1.0, 900.0)}, "intra-node", lambda d, g, e, r: 2 * d + 2 * r * g),
        ({"gradient_ns": 5000.0}, "gradient", lambda d, g, e, r: 2 * r * d + 5000),
    ],
)
def test_fsmoe_s_four_cases(changes, binds, expected):
    small = Task(1.0, 1.0, 100.0)
    costs = dataclasses.replace(LayerCosts(small, small, small, small, small), **changes)
    costs = dataclasses.replace(costs, combine=costs.dispatch, reduce_scatter=costs.all_gather)
    dispatch, gather, experts = (task.chunk_ns(4) for task in costs.chain[:3])
    assert degrees.binding(costs, 4) == binds
    assert degrees.pipelined_ns(costs, 4) == pytest.approx(expected(dispatch, gather, experts, 4))


def test_one_chunk_is_the_plain_sum_and_no_start_up_never_hurts():
    tasks = [Task(alpha, 2.0, size) for alpha, size in ((3, 10), (1, 40), (2, 7), (5, 9), (4, 20))]
    costs = LayerCosts(tasks[0], tasks[2], tasks[4], tasks[1], tasks[3])
    assert degrees.pipelined_ns(costs, 1) == pytest.approx(sum(task.chunk_ns(1) for task in tasks))
    free = LayerCosts(*(dataclasses.replace(task, alpha_ns=0.0) for task in tasks))
    times = [degrees.pipelined_ns(free, r) for r in range(1, 60)]
    assert times == sorted(times, reverse=True)
    assert times[-1] > max(2 * task.size for task in tasks)  # the longest stream cannot be shortened


def test_absent_tasks_cost_nothing_and_ties_go_to_the_smaller_degree():
    assert degrees.pipelined_ns(LayerCosts(Task(), Task(), Task()), 7) == 0
    assert degrees.best_degree(LayerCosts(Task(), Task(), Task()), 7) == 1
    assert degrees.best_degree(LayerCosts(Task(), Task(0.0, 1.0, 50.0), Task()), 7) == 1


def test_backward_computes_twice_and_may_reduce_a_gradient():
    task = Task(2.0, 3.0, 5.0)
    backward = LayerCosts(task, task, task).backward(70.0)
    assert backward.experts.chunk_ns(4) == 2 * task.chunk_ns(4)
    assert backward.gradient_ns == 70.0
    assert backward.dispatch == backward.combine == task


def test_numpy_degrees_are_whole_numbers_too():
    task = Task(1.0, 1.0, 10.0)
    assert degrees.pipelined_ns(LayerCosts(task, task, task), np.int64(2)) > 0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: Task(-1.0), "alpha_ns is -1.0, expected a finite number of at least 0"),
        (lambda: Task(0.0, float("nan")), "beta_ns is nan"),
        (lambda: Task(0.0, 0.0, float("inf")), "size is inf"),
        (lambda: LayerCosts(Task(), Task(), Task(), gradient_ns=-2.0), "gradient_ns is -2.0"),
        (
            lambda: degrees.pipelined_ns(LayerCosts(Task(), Task(), Task()), 0),
            "num_chunks is 0, expected a whole",
        ),
        (lambda: degrees.pipelined_ns(LayerCosts(Task(), Task(), Task()), 1.5), "num_chunks is 1.5"),
        (lambda: degrees.best_degree(LayerCosts(Task(), Task(), Task()), 0), "max_degree is 0"),
        (
            lambda: degrees.best_degree(LayerCosts(Task(), Task(), Task()), 4, allowed=(8,)),
            "allowed is \\[8\\]",
        ),
        (lambda: degrees.exhaustive_degree(LayerCosts(Task(), Task(), Task()), []), "degrees is empty"),
    ],
)
def test_wrong_costs_and_degrees_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()
