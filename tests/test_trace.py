"""A trace read with effkit holds what plain Python finds in it."""

import json
from collections import Counter
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from effkit import trace


def encoded(**event) -> bytes:
    return json.dumps({"traceEvents": [{"ph": "X", "name": "a", "cat": "c", "ts": 1, "dur": 2} | event]}).encode()


def nanoseconds(microseconds) -> int:
    return round(Decimal(str(microseconds)) * 1000)


def test_events_are_those_of_the_file(kineto, plain_events):
    events = trace.read(kineto).events
    expected = [event for event in plain_events if event["ph"] == "X" and event.get("cat") != "Trace"]
    assert len(events) == len(expected) > 20
    assert Counter(events["name"]) == Counter(event["name"] for event in expected)
    assert Counter(events["category"]) == Counter(event["cat"] for event in expected)
    found = Counter(zip(events["name"], events["category"], events["dur_ns"].tolist(), events["thread"], strict=True))
    assert found == Counter((e["name"], e["cat"], nanoseconds(e["dur"]), str(e["tid"])) for e in expected)


def test_memory_is_that_of_the_file(kineto, plain_events):
    memory = trace.read(kineto).memory
    args = [event["args"] for event in plain_events if event["name"] == "[memory]"]
    assert len(memory) == len(args) > 5
    columns = zip(memory["address"], memory["size_bytes"], memory["total_bytes"], strict=True)
    assert Counter(columns) == Counter((a["Addr"], a["Bytes"], a["Total Allocated"]) for a in args)
    assert set(memory["device"]) == {"cpu"}


def test_columns_and_types(kineto):
    for content in (kineto, b'{"traceEvents": []}'):
        events, memory, *_ = trace.read(content, rank=3)
        assert tuple(events) == trace.EVENT_COLUMNS
        assert tuple(memory) == trace.MEMORY_COLUMNS
        assert set(events.dtypes[["start_ns", "dur_ns", "rank"]].map(str)) == {"int64"}
        assert set(events.dtypes[["stream", "correlation"]].map(str)) == {"Int64"}
        assert set(memory.dtypes[["time_ns", "size_bytes", "rank"]].map(str)) == {"int64"}
        assert set(events["rank"]) <= {3}
        assert events["start_ns"].is_monotonic_increasing
        assert memory["time_ns"].is_monotonic_increasing


def test_what_was_not_recorded_is_absent():
    events, memory, *_ = trace.read(encoded())
    assert events.loc[0, ["stream", "correlation"]].isna().all()
    assert memory.empty
    events = trace.read(encoded(args={"stream": 7, "correlation": 11})).events
    assert events.loc[0, ["stream", "correlation"]].tolist() == [7, 11]


def test_only_complete_events_count():
    events = [{"ph": phase, "name": phase, "ts": 1} for phase in "BEMfsX"]
    found, *_ = trace.read(json.dumps({"traceEvents": events}).encode())
    assert found["name"].tolist() == ["X"]


def test_reading_leaves_the_garbage_collector_as_it_was():
    import gc

    with pytest.raises(ValueError, match="not a profiler trace"):
        trace.read(b"{")
    assert gc.isenabled()


@given(st.integers(0, 7_889_238 * 10**9))  # Kineto counts from the beginning of a quarter of a year
@example(4_399_791_054_538_553)
def test_times_are_exact_to_the_nanosecond(time_ns):
    content = encoded(ts=0).replace(b'"ts": 0', f'"ts": {time_ns // 1000}.{time_ns % 1000:03d}'.encode())
    assert trace.read(content)[0].loc[0, "start_ns"] == time_ns


@pytest.mark.parametrize("part", range(12))
def test_a_cut_trace_is_refused(kineto, part):
    with pytest.raises(ValueError, match="not a profiler trace"):
        trace.read(kineto[: len(kineto) * part // 12])


@given(st.binary(max_size=40) | st.text(max_size=20).map(str.encode))
@example(b"[]")
@example(b'{"traceEvents": {}}')
@example(b'{"traceEvents": [3]}')
@example(b"\x89PNG\r\n\x1a\n")
def test_anything_else_is_refused(content):
    with pytest.raises(ValueError, match=r"not a profiler trace|codec"):
        trace.read(content)


@pytest.mark.parametrize(
    "event",
    [{"ts": "1"}, {"dur": None}, {"pid": [1]}, {"name": 3}, {"args": [1]}, {"args": {"correlation": "x"}}],
    ids=str,
)
def test_a_field_of_another_type_is_refused(event):
    with pytest.raises(ValueError, match=r"not a profiler trace: .*traceEvents\[0\]"):
        trace.read(encoded(**event))


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(encoded(ts=1e300), id="time beyond 64 bits"),
        pytest.param(encoded(args={"correlation": 2**63}), id="correlation beyond 63 bits"),
        pytest.param(encoded(args={"correlation": 2**70}), id="correlation beyond 64 bits"),
        pytest.param(encoded(name="[memory]", args={"Addr": -1, "Bytes": 4}), id="negative address"),
        pytest.param(encoded(name="[memory]", args={"Addr": 1, "Bytes": 2**70}), id="size beyond 64 bits"),
        pytest.param(b'{"traceEvents": [], "x": ' + b"[" * 100_000, id="nested too deep"),
    ],
)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_values_out_of_range_are_refused(content):
    with pytest.raises(ValueError, match="not a profiler trace"):
        trace.read(content)
