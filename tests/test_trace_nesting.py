"""Time that is covered, and which event runs inside which: as counting moments and looking at all pairs say."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from effkit import trace
from effkit.trace import intervals, nesting

STRETCHES = st.lists(st.tuples(st.integers(-30, 30), st.integers(0, 12)), max_size=8)  # start, length


def union(stretches) -> intervals.Covered:
    starts, lengths = np.array(stretches, "int64").reshape(-1, 2).T
    return intervals.union(starts, starts + lengths)


def moments(stretches) -> set[int]:
    """The whole units of time that are covered."""
    return {time for start, length in stretches for time in range(start, start + length)}


@given(STRETCHES, STRETCHES)
@example([(0, 5), (5, 5), (2, 0)], [(0, 10), (5, 0), (-9, 3)])
def test_what_is_covered_is_what_counting_moments_finds(stretches, windows):
    covered, every = union(stretches), moments(stretches)
    starts, lengths = np.array(windows, "int64").reshape(-1, 2).T
    expected = [len(every & set(range(start, start + length))) for start, length in windows]
    assert covered.within(starts, starts + lengths).tolist() == expected
    assert (covered.ends - covered.starts).sum() == len(every)


@given(STRETCHES)
def test_a_union_is_disjoint_and_in_order(stretches):
    covered = union(stretches)
    assert (covered.ends[:-1] < covered.starts[1:]).all(), "what touches is one stretch"
    assert moments(zip(covered.starts, covered.ends - covered.starts, strict=True)) == moments(stretches)


@given(STRETCHES, st.integers(-40, 40))
def test_what_is_covered_up_to_a_moment(stretches, time):
    assert union(stretches).before(np.array([time]))[0] == sum(moment < time for moment in moments(stretches))


def test_times_of_this_century_do_not_overflow():
    now = 1_712_195_495_406_752_567
    covered = intervals.union([now, now + 50], [now + 10, now + 70])
    assert covered.within([0, now + 5, now + 60], [2 * now, now + 55, now + 60]).tolist() == [30, 10, 0]


def test_events_of_several_frames_cover_together():
    one, other = frame((0, 10), (40, 5)), frame((5, 10))
    assert [part.tolist() for part in intervals.of(one, other)] == [[0, 40], [15, 45]]
    assert [part.tolist() for part in intervals.of(one.head(0), other.head(0))] == [[], []]


def frame(*stretches, thread="1", name="op", category="cpu_op") -> pd.DataFrame:
    """Events by start and duration, as trace.read gives them."""
    events = trace.read(b'{"traceEvents": [%s]}' % b",".join([b'{"ph": "X"}'] * len(stretches))).events
    starts, lengths = zip(*stretches, strict=True) if stretches else ((), ())
    return events.assign(
        start_ns=np.array(starts, "int64"),
        dur_ns=np.array(lengths, "int64"),
        thread=thread,
        name=name,
        category=category,
    )


@st.composite
def trees(draw, start=0, length=40, depth=0):
    """Properly nested events: each holds a few, one behind the other, that may fill it or have no length."""
    found, time = [], start
    for _ in range(draw(st.integers(0 if depth else 1, 3))):
        begins = draw(st.integers(time, start + length))
        lasts = draw(st.integers(0, start + length - begins))
        found.append((begins, lasts))
        if depth < 3 and lasts:
            found += draw(trees(begins, lasts, depth + 1))
        time = begins + lasts
    return found


def innermost(events: list[tuple], row: int) -> set[tuple[int, int]]:
    """By looking at all: the shortest event of the same thread that this one lies in, as start and length."""
    begins, lasts, *place = events[row]
    around = [
        (length, start)
        for at, (start, length, *there) in enumerate(events)
        if there == place and at != row
        if start <= begins < start + length and begins + lasts <= start + length
        if (start, length) != (begins, lasts) or at < row  # of two equal ones the first holds the second
    ]
    return {(start, length) for length, start in around if length == min(around)[0]}


@given(st.lists(trees(), min_size=1, max_size=3), st.randoms(use_true_random=False))
def test_the_parent_is_the_innermost_event_around(threads, random):
    places = [{"thread": "2"}, {"thread": "2", "process": "7"}, {"thread": "1", "rank": 1}]
    events = pd.concat(
        [frame(*tree).assign(**place) for tree, place in zip(threads, places[: len(threads)], strict=True)],
        ignore_index=True,
    )
    shuffled = list(range(len(events)))
    random.shuffle(shuffled)
    events = events.iloc[shuffled].sort_values("start_ns", kind="stable", ignore_index=True)
    parent = nesting.parents(events)
    rows = list(events[["start_ns", "dur_ns", "rank", "process", "thread"]].itertuples(index=False, name=None))
    for row, of in enumerate(parent.tolist()):
        expected = innermost(rows, row)
        assert (of >= 0) == bool(expected)
        if of >= 0:
            assert rows[of][:2] in expected
            assert rows[of][2:] == rows[row][2:]
    climbs = nesting.nearest(parent, parent < 0)
    assert (parent[climbs] == -1).all(), "every climb ends: nothing is inside itself"


@pytest.mark.parametrize(
    ("stretches", "expected"),
    [
        pytest.param([(0, 10), (0, 10), (0, 10)], [-1, 0, 1], id="equal ones hold each other"),
        pytest.param([(0, 4), (0, 10)], [1, -1], id="the longer of one start is outside"),
        pytest.param([(0, 10), (6, 4)], [-1, 0], id="of one end"),
        pytest.param([(0, 10), (0, 0), (5, 0), (10, 0)], [-1, 0, 0, -1], id="without length"),
        pytest.param([(3, 0), (3, 0)], [-1, -1], id="two without length hold nothing"),
        pytest.param([(0, 5), (5, 5)], [-1, -1], id="one behind the other"),
        pytest.param([(0, 10), (5, 10), (6, 2), (12, 2)], [-1, -1, 1, 1], id="partial overlap: beside one another"),
        pytest.param([(0, 100), (10, 10), (15, 10), (17, 1)], [-1, 0, 0, 2], id="partial overlap inside another"),
    ],
)
def test_parents_in_the_corners(stretches, expected):
    assert nesting.parents(frame(*stretches)).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), max_size=12))
def test_whatever_overlaps_a_parent_is_around_its_child(stretches):
    events = frame(*sorted(stretches))
    parent, start = nesting.parents(events), events["start_ns"].to_numpy()
    end = start + events["dur_ns"].to_numpy()
    inside = np.flatnonzero(parent >= 0)
    assert (start[parent[inside]] <= start[inside]).all()
    assert (end[parent[inside]] >= end[inside]).all()


def test_the_nearest_wanted_is_oneself_or_above():
    parent = np.array([-1, 0, 1, 2, -1])
    assert nesting.nearest(parent, np.array([1, 0, 1, 0, 0], bool)).tolist() == [0, 0, 2, 2, -1]
    assert nesting.nearest(parent, np.zeros(5, bool)).tolist() == [-1] * 5
    assert nesting.nearest(parent[:0], np.zeros(0, bool)).tolist() == []


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-5, 5)), min_size=1, max_size=12))
def test_what_is_within_is_summed_and_the_nearest_found(drawn):
    parent, values = [at % (row + 1) - 1 for row, (at, _) in enumerate(drawn)], [value for _, value in drawn]
    chains = [[row] for row in range(len(parent))]
    for chain in chains:
        while parent[chain[-1]] >= 0:
            chain.append(parent[chain[-1]])
    sums = [sum(values[row] for row, chain in enumerate(chains) if at in chain) for at in range(len(parent))]
    assert nesting.with_inner(np.array(parent), np.array(values)).tolist() == sums
    wanted = np.array(values) > 0
    nearest = [next((row for row in chain if wanted[row]), -1) for chain in chains]
    assert nesting.nearest(np.array(parent), wanted).tolist() == nearest


def memory(*times, thread="1") -> pd.DataFrame:
    columns = {"time_ns": np.array(times, "int64"), "rank": 0, "process": "0", "thread": thread}
    return pd.DataFrame(columns, index=range(100, 100 + len(times)))


def test_callers_are_the_operators_around_the_innermost_first():
    events = pd.concat([
        frame((0, 100), name="ProfilerStep#3", category="user_annotation"),
        frame((10, 50), name="forward", category="user_annotation"),
        frame((20, 20), name="aten::linear"),
        frame((20, 10), name="aten::mm"),
        frame((21, 8), name="cudaLaunchKernel", category="cuda_runtime"),
        frame((0, 100), name="elsewhere", thread="2"),
        frame((0, 100), name="a kernel", category="kernel"),
    ], ignore_index=True)  # fmt: skip
    found = nesting.callers(events, memory(22, 35, 45, 70, 30))
    assert found.index.tolist() == [100, 101, 102, 103, 104]
    assert found[:-2].tolist() == ["aten::mm < aten::linear < forward", "aten::linear < forward", "forward"]
    assert pd.isna(found[103]), "a step is no caller: everything is in one"
    assert found[104] == "aten::linear < forward", "what ends at a moment is over"
    assert nesting.callers(events, memory(22, thread="2")).tolist() == ["elsewhere"]
    assert nesting.callers(events, memory(22, thread="3")).isna().all()


def test_callers_name_the_innermost_of_a_deep_stack():
    events = pd.concat([frame((i, 100 - 2 * i), name=f"f{i}") for i in range(20)], ignore_index=True)
    assert nesting.callers(events, memory(50)).tolist() == [" < ".join(f"f{i}" for i in range(19, 7, -1))]


def test_callers_of_nothing(kineto):
    read = trace.read(kineto)
    assert len(nesting.callers(read.events, read.memory.head(0))) == 0
    nowhere = nesting.callers(read.events.head(0), read.memory)
    assert nowhere.isna().all()
    assert len(nowhere) == len(read.memory)


def test_the_owner_of_device_work_is_found_by_its_correlation():
    events = pd.concat([
        frame((0, 50), name="aten::mm"), frame((10, 5), name="launch", category="cuda_runtime").assign(correlation=7),
        frame((60, 5), name="launch", category="hip_runtime").assign(correlation=8),
        *(frame((90, 9), name="k", category="kernel").assign(correlation=link) for link in (8, 7, 9, pd.NA)),
    ], ignore_index=True).astype({"correlation": "Int64"})  # fmt: skip
    tree = nesting.host(events)
    above = nesting.nearest(nesting.parents(tree), (tree["category"] == "cpu_op").to_numpy())
    kernels = events[events["category"] == "kernel"]
    assert nesting.owners(tree, above, kernels).tolist() == [-1, 0, -1, -1]
    assert nesting.owners(tree, np.arange(len(tree)), kernels).tolist() == [2, 1, -1, -1]
