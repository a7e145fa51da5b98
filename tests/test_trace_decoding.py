"""A trace read in pieces is the one read whole, and what other profilers wrote is read as they meant it."""

import gzip
import io
import json
from collections import Counter
from unittest import mock

import msgspec
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import effkit as ek
from effkit import trace
from effkit.trace import decoding

NASTY = ['}, {"', "},{lambda()#1}", '}, {"ph": "X", "name": "no event"}', '"traceEvents": [', "]}", 'a "b" c',
         "back\\slash", "é 漢 🦀", "a\tb\nc\0", '", "pid": 3', '"name": "x", "pid": 3', "f(x, NaN)", ""]  # fmt: skip
# what an escape in a name means to JSON, though whoever wrote it meant a backslash and a letter
AS_GIVEN = str.maketrans({"\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t"})
BEHIND = {"schemaVersion": 1, "distributedInfo": {"rank": 3, "world_size": 4, "pg_config": [
    {"pg_name": "0", "ranks": [0, 1]}, {"name": "1", "ranks": []}, {"ph": "X", "name": "no event"}]}}  # fmt: skip
ARGS = {"Input Dims": [[2, 3], []], "Call stack": [{"name": "f"}, {"name": "}, {"}, {"ph": "X"}, {"line": 3}]}
STYLES = [{}, {"separators": (",", ":")}, {"indent": 2}, {"ensure_ascii": False}, {"separators": (" ,\n", ": ")}]


def event(name="a", **more) -> dict:
    return {"ph": "X", "cat": "cpu_op", "name": name, "pid": 1, "tid": 2, "ts": 1, "dur": 2} | more


def args_first(name: str) -> dict:
    return {"args": ARGS} | event(name)


def text(events, behind=None, style=None) -> bytes:
    return json.dumps({"traceEvents": events} | (behind or {}), **(style or {})).encode("utf-8", "surrogatepass")


def read(content: bytes, **options) -> trace.Trace:
    return trace.read(content, **{"details": trace.DETAIL_COLUMNS, "stacks": True} | options)


class Dribble(io.BytesIO):
    """A stream that gives little at a time, as a slow one may."""

    def read(self, size=-1):
        return super().read(min(size, decoding._PIECE))


def read_in_pieces(content: bytes, piece: int) -> trace.Trace:
    with mock.patch.object(decoding, "_PIECE", piece):
        return read(Dribble(content))


def same(one: trace.Trace, other: trace.Trace) -> None:
    pd.testing.assert_frame_equal(one.events, other.events)
    pd.testing.assert_frame_equal(one.memory, other.memory)
    assert (one.metadata, one.num_left_out) == (other.metadata, other.num_left_out)


@pytest.mark.parametrize("piece", [64, 333, 4096])
def test_a_real_trace_in_pieces_is_the_whole_one(kineto, plain_events, piece):
    events, memory, *_ = read_in_pieces(kineto, piece)
    same(read_in_pieces(kineto, piece), read(kineto))
    assert len(events) == sum(e["ph"] == "X" and e["cat"] != "Trace" for e in plain_events)
    assert len(memory) == sum(e["name"] == "[memory]" for e in plain_events)


def test_it_is_read_in_as_many_pieces_as_fit(kineto):
    with mock.patch.object(decoding, "_PIECE", 1000):
        lengths = [len(piece) for piece in decoding.Decoder(msgspec.Raw).pieces(Dribble(kineto))]
    assert len(lengths) > len(kineto) / 4000
    assert sum(lengths) == len(json.loads(kineto)["traceEvents"])


@pytest.mark.parametrize("style", STYLES, ids=str)
@pytest.mark.parametrize("piece", [64, 333, 4096])
def test_whatever_is_in_names_arguments_and_behind(style, piece):
    events = [make(name) for name in NASTY for make in (event, args_first)] * 3
    content = text(events, BEHIND, style)
    found = read_in_pieces(content, piece)
    same(found, read(content))
    plain = json.loads(content)["traceEvents"]
    assert found.events["name"].tolist() == [e["name"].translate(AS_GIVEN) for e in plain]
    assert len(plain) > 70
    assert found.events["shapes"].notna().sum() == len(plain) / 2
    assert set(found.events["rank"]) == {3}
    assert found.metadata["distributedInfo"] == BEHIND["distributedInfo"]


VALUES = st.recursive(
    st.none() | st.integers(-9, 9) | st.sampled_from(NASTY) | st.text(max_size=4),
    lambda one: st.lists(one, max_size=3) | st.dictionaries(st.sampled_from(["ph", "name", *NASTY]), one, max_size=3),
    max_leaves=6,
)
EVENTS = st.fixed_dictionaries(
    {"args": st.dictionaries(st.sampled_from(["Input Dims", "x", *NASTY]), VALUES, max_size=3),
     "ph": st.sampled_from("XiM"),
     "name": st.sampled_from(NASTY) | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
     "ts": st.integers(0, 10**6) | st.floats(0, 1e6), "cat": st.sampled_from(["cpu_op", "kernel", "python_function"])},
    optional={"pid": st.integers() | st.text(max_size=3), "tid": st.integers(), "dur": st.integers(0, 99)},
).flatmap(lambda e: st.permutations(list(e)).map(lambda keys: {key: e[key] for key in keys}))  # fmt: skip


@given(st.lists(EVENTS, max_size=6), st.sampled_from(STYLES), st.integers(1, 400), st.booleans(), st.booleans())
def test_any_events_in_any_pieces(events, style, piece, bare, before):
    content = text(events, BEHIND, style)
    if bare and events:  # the list that Chrome reads, too
        content = json.dumps(events, **style).encode("utf-8", "surrogatepass")
    elif before:
        content = json.dumps(BEHIND | {"traceEvents": events}, **style).encode("utf-8", "surrogatepass")
    try:
        expected = read(content)
    except ValueError:  # one half of a surrogate pair: refused, in pieces too
        with pytest.raises(ValueError, match="not a profiler trace"):
            read_in_pieces(content, piece)
        return
    same(read_in_pieces(content, piece), expected)
    complete = [e for e in json.loads(content)["traceEvents"] if e["ph"] == "X"] if not bare or not events else [
        e for e in events if e["ph"] == "X"]  # fmt: skip
    assert Counter(expected.events["name"]) == Counter(e["name"].translate(AS_GIVEN) for e in complete)


def test_a_cut_is_not_believed_because_the_bytes_around_it_are_bad():
    content = text([args_first("a@b")] * 9).replace(b"@", b"\xff")
    same(read_in_pieces(content, 64), read(content))
    assert set(read(content).events["name"]) == {"a\ufffdb"}


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        pytest.param(rb"a\gb", r"a\gb", id="bad escape"),
        pytest.param(rb"C:\work\utils\x.py", r"C:\work\utils\x.py", id="Windows path"),
        pytest.param(rb"C:\new\tools\build.py", r"C:\new\tools\build.py", id="Windows path with letters of escapes"),
        pytest.param(b"a\x01b\x1fc", "a b c", id="control characters"),
        pytest.param(b"caf\xe9", "caf\ufffd", id="Latin-1"),
        pytest.param(b'a "b" c', 'a "b" c', id="quotation marks"),
        pytest.param(b'f("x", "y")', 'f("x", "y")', id="quotation marks and commas"),
        pytest.param(b'"all of it"', '"all of it"', id="in quotation marks"),
        pytest.param(b'one "', 'one "', id="one quotation mark"),
        pytest.param(b'escaped \\" and "not"', 'escaped " and "not"', id="some escaped"),
        pytest.param(b"NaN, N/A, inf", "NaN, N/A, inf", id="words for no number"),
    ],
)
def test_a_name_that_is_no_json_is_read_as_it_was_meant(written, meant):
    # torch writes a name's neighbours in this order; metadata comes in another and must not be swallowed
    about = b'{"name": "process_name", "ph": "M", "ts": 1, "pid": 0, "tid": 0, "args": {"name": "python"}}'
    op = b'{"ph": "X", "cat": "cpu_op", "name": "%s", "pid": 1, "tid": 1, "ts": 1, "dur": 2, "args": {"x": NaN}}'
    content = (
        b'{"traceEvents": [' + b",\n".join([about, op % b"before", op % written, about, op % b"behind"] * 2) + b"]}"
    )
    for found in (read(content), read_in_pieces(content, 64)):
        assert found.events["name"].tolist() == ["before", meant, "behind"] * 2


LIVE = ['part "A"', '{"device": "cpu"}', '{"name": "x"}', '"', 'ends with "', 'f("x", "y")', r"C:\new\build.py",
        r'a\"b']  # fmt: skip


def test_names_that_torch_itself_writes_come_back_as_they_were_given(tmp_path):
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for name in LIVE:
            with record_function(name):
                pass
    path = tmp_path / 'a "file" of {"device": "cpu"}.json'  # torch writes it into itself, at the end
    profiler.export_chrome_trace(str(path))
    with pytest.raises(json.JSONDecodeError):
        json.loads(path.read_bytes())
    for content in (path.read_bytes(), gzip.decompress(gzip.compress(path.read_bytes()))):
        for found in (read(content), read_in_pieces(content, 333)):
            assert found.events.loc[found.events["category"] == "user_annotation", "name"].tolist() == [
                name.replace("\\", "/")
                for name in LIVE  # torch itself does so
            ]


def test_a_step_with_quotation_marks_in_its_names_can_be_captured():
    import torch

    def step():
        with torch.profiler.record_function('part "A"'):
            torch.ones(2).sum()

    seen = ek.capture(step, steps=1)
    assert 'part "A"' in set(seen.events["name"])


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    content = text([event("a@b")], BEHIND)
    same(read(b"\xef\xbb\xbf" + content), read(content))
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf" + content)
    assert ek.load(tmp_path / "a.json").events["name"].tolist() == ["a@b"]


def half(phase, name, ts, **more):
    return {"ph": phase, "pid": 1, "tid": 1, "ts": ts, "cat": "cpu_op", **({"name": name} if name else {}), **more}


TWO_PARTS = [
    half("B", "outer", 10, args={"Input Dims": [[2]]}),
    half("B", "inner", 10.001),
    half("B", "elsewhere", 11, tid=2),
    half("E", "inner", 12.5, args={"Input Dims": [[3]]}),
    event("whole", ts=11),
    half("E", "", 20),
    half("E", "elsewhere", 30, tid=2),
]


def test_a_begin_and_its_end_are_one_event():
    for found in (read(text(TWO_PARTS)), read_in_pieces(text(TWO_PARTS), 40)):
        events = found.events.set_index("name")
        times = {"outer": [10_000, 10_000], "inner": [10_001, 2_499], "elsewhere": [11_000, 19_000]}
        assert events.loc[[*times], ["start_ns", "dur_ns"]].to_numpy().tolist() == [*times.values()]
        assert events.loc[["outer", "inner"], "shapes"].tolist() == ["[[2]]", "[[3]]"]
        assert (len(events), found.num_halves) == (4, 0)


def test_halves_of_events_are_counted_and_no_event_is_made_of_them():
    halves = [
        half("E", "begun before", 1),
        half("B", "outer", 2),
        half("B", "inner", 3),
        half("E", "unknown", 4),
        half("E", "inner", 5),
        half("B", "its end is lost", 6),
        half("E", "outer", 7),  # of something that began before another which did not end
        event("whole"),
        event(ph="M"),
    ]
    found = read(text(halves))
    assert found.events["name"].tolist() == ["whole", "inner"]
    assert found.num_halves == 5


def test_of_two_events_of_the_same_time_the_one_begun_first_is_around_the_other():
    from effkit.trace import nesting

    same_time = [half(*each) for each in (("B", "outer", 1), ("B", "inner", 1), ("E", "inner", 2), ("E", "outer", 2))]
    events = read(text(same_time)).events
    assert events["name"].tolist() == ["outer", "inner"]
    assert nesting.parents(events).tolist() == [-1, 0]


def test_times_since_1970_stay_exact_in_events_of_two_parts():
    content = text([half("B", "a", 0), half("E", "a", 1)]).replace(b'"ts": 0', b'"ts": 1700000000000000.123')
    found = read(content.replace(b'"ts": 1,', b'"ts": 1700000000000001.124,')).events
    assert found.loc[0, ["start_ns", "dur_ns"]].tolist() == [1_700_000_000_000_000_123, 1_001]


@pytest.mark.parametrize("ts", ["1e400", "1e99999", "-1e300"])
def test_a_begin_at_no_time_is_refused(ts):
    content = text([event(ts=2**44), half("B", "a", 0), half("E", "a", 1)]).replace(b'"ts": 0', f'"ts": {ts}'.encode())
    with pytest.raises(ValueError, match="not a profiler trace"):
        read(content)


@pytest.mark.parametrize("value", ["NaN", "-NaN", "Infinity", "-Infinity", "N/A", "nan", "-inf"])
def test_what_stands_for_no_number_is_absent(value):
    content = text(
        [event("k, NaN", cat="kernel", args={"est. achieved occupancy %": 1234, "bytes": 7, "list": [1234]})]
    )
    found = read(content.replace(b"1234", value.encode())).events
    assert "occupancy_percent" not in found
    assert found.loc[0, ["name", "size_bytes"]].tolist() == ["k, NaN", 7]


def test_a_text_where_a_number_belongs_is_no_detail_and_no_reason_to_refuse():
    wrong = {"est. achieved occupancy %": "N/A", "bytes": "7", "In msg nelems": 2**64 - 1, "Group size": True,
             "Collective name": "", "Input Dims": None}  # fmt: skip
    right = {"est. achieved occupancy %": 50, "bytes": 7, "In msg nelems": 12, "Group size": 2,
             "Input Dims": "[[1, 2]]", "Collective name": "allreduce"}  # fmt: skip
    names = {"nccl:all_reduce": "user_annotation", "copy": "gpu_memcpy"}
    found = read(text([event(name, cat=cat, args=wrong) for name, cat in names.items()])).events
    assert tuple(found) == trace.EVENT_COLUMNS
    found = read(
        text([event(name, cat=cat, args=args) for name, cat in names.items() for args in (wrong, right)])
    ).events
    assert found["num_elements"].tolist() == [pd.NA, 12, pd.NA, pd.NA]
    assert found["size_bytes"].tolist() == [pd.NA, pd.NA, pd.NA, 7]
    assert found["occupancy_percent"].tolist() == [pd.NA, pd.NA, pd.NA, 50]
    assert found["shapes"].fillna("none").tolist() == ["none", "[[1,2]]", "none", "none"]
    assert found["collective"].fillna("none").tolist() == ["none", "allreduce", "none", "none"]


def test_details_come_when_asked_for_and_recorded():
    content = text([event(args={"Input Dims": [[2, 3]], "Input type": ["float"], "bytes": 3})])
    assert tuple(trace.read(content).events) == trace.EVENT_COLUMNS
    assert tuple(trace.read(content, details=["dtypes", "splits"]).events) == (*trace.EVENT_COLUMNS, "dtypes")
    found = read(content).events
    assert tuple(found) == (*trace.EVENT_COLUMNS, "shapes", "dtypes"), "bytes belong to kernels and copies"
    assert found.loc[0, ["shapes", "dtypes"]].tolist() == ["[[2,3]]", '["float"]']
    with pytest.raises(ValueError, match=r"no such column: shape; there are size_bytes, .*shapes"):
        trace.read(content, details=["shape"])


def test_a_detail_of_bytes_that_are_no_text():
    content = text([event("record_param_comms", args={"Concrete Inputs": ["a@b", "[1, 2]"]})]).replace(b"@", b"\xff")
    assert json.loads(read(content).events.loc[0, "inputs"]) == ["a\ufffdb", "[1, 2]"]


def test_python_functions_are_counted_and_kept_only_when_asked_for():
    content = text([event("f.py(3): g", cat="python_function"), event("aten::mm")] * 2)
    assert (read(content).events["name"].tolist(), read(content).num_left_out) == (["f.py(3): g", "aten::mm"] * 2, 0)
    found = read(content, stacks=False)
    assert (found.events["name"].tolist(), found.num_left_out) == (["aten::mm"] * 2, 2)


def test_categories_of_torch_1_become_todays():
    older = {"aten::mm": "Operator", "ProfilerStep#3": "Operator", "enumerate(DataLoader)#_Iter": "Operator",
             "gemm": "Kernel", "launch": "Runtime", "copy": "Memcpy", "fill": "Memset", "mine": "Else"}  # fmt: skip
    found = read(text([event(name, cat=cat, args={"bytes": 9}) for name, cat in older.items()])).events
    todays = [
        "cpu_op",
        "user_annotation",
        "user_annotation",
        "kernel",
        "cuda_runtime",
        "gpu_memcpy",
        "gpu_memset",
        "Else",
    ]
    assert dict(zip(found["name"], found["category"], strict=True)) == dict(zip(older, todays, strict=True))
    assert found.loc[found["size_bytes"].notna(), "name"].tolist() == ["gemm", "copy", "fill"]


def test_processes_threads_and_streams_are_numbers_or_texts():
    places = [{"pid": 0, "tid": "stream 7", "args": {"stream": 7}},
              {"pid": "Spans", "tid": -3, "args": {"stream": "7"}}, {"pid": 2**70, "tid": 2**40}]  # fmt: skip
    found = read(text([event(**place) for place in places])).events
    assert found["process"].tolist() == ["0", "Spans", str(2**70)]
    assert found["thread"].tolist() == ["stream 7", "-3", str(2**40)]
    assert found["stream"].tolist() == [7, pd.NA, pd.NA]


@pytest.mark.parametrize(
    ("written", "time_ns"),
    [("1712195495406752.8", 1712195495406752800), ("1712195495406752.25", 1712195495406752250),
     ("1623143089861597", 1623143089861597000), ("4399791054538.553", 4399791054538553), ("3", 3000), ("0.001", 1)],
)  # fmt: skip
def test_times_are_what_the_file_says(written, time_ns):
    content = text([event(ts=77, dur=0.5)]).replace(b"77", written.encode())
    assert read(content).events.loc[0, ["start_ns", "dur_ns"]].tolist() == [time_ns, 500]


@given(st.lists(st.integers(0, 9 * 10**18), max_size=5), st.integers(30, 300))
@example([1712195495406752567], 64)  # a double of these microseconds is a quarter of one wide
@example([1, 1712195495406752567, 1712195495406752000], 64)
@example([1097078495393152938], 30)  # and this one is whole
def test_times_since_1970_are_exact_to_the_nanosecond(times_ns, piece):
    made = event("[memory]", ts="ts", args={"Addr": 8, "Bytes": 4}), event(ts="ts")
    content = text(made * len(times_ns))
    for time_ns in times_ns:
        content = content.replace(b'"ts": "ts"', f'"ts": {time_ns // 1000}.{time_ns % 1000:03d}'.encode(), 2)
    for found in (read(content), read_in_pieces(content, piece)):
        assert found.events["start_ns"].tolist() == sorted(2 * times_ns)
        assert found.memory["time_ns"].tolist() == sorted(times_ns)


@pytest.mark.parametrize("written", ["1e300", "9.3e15", "-9.3e15", "1712195495406752.5, 1e99999999"])
def test_a_time_beyond_64_bits_is_refused(written):
    first, *more = written.split(", ")
    content = text([event(ts=77), event(ts=77)]).replace(b"77", (more or [first])[0].encode())
    content = content.replace(b": " + (more or [first])[0].encode(), b": " + first.encode(), 1)
    with pytest.raises(ValueError, match="not a profiler trace"):
        read_in_pieces(content, 64)


@pytest.mark.parametrize("style", [{}, {"indent": 1}], ids=str)
def test_the_base_of_times_counts_wherever_it_stands(style):
    moment = {"ph": "i", "name": "[memory]", "ts": 2.5, "pid": 1, "tid": 1,
              "args": {"Addr": 8, "Bytes": 4, "Total Allocated": 4, "Device Type": 0}}  # fmt: skip
    events, base = [event(ts=1.5), moment], {"baseTimeNanoseconds": 1712195495 * 10**9}
    for content in (base | {"traceEvents": events}, {"traceEvents": events} | base):
        found = read(json.dumps(content, **style).encode())
        assert found.events["start_ns"].tolist() == [1712195495000001500]
        assert found.events["dur_ns"].tolist() == [2000]
        assert found.memory["time_ns"].tolist() == [1712195495000002500]
    with pytest.raises(ValueError, match="not a profiler trace: a time beyond"):
        read(text(events, {"baseTimeNanoseconds": 2**63 - 1}))


def test_compressed_or_not_is_seen_from_the_content(kineto, tmp_path):
    for name, content in {"a.json": gzip.compress(kineto), "b.gz": kineto}.items():
        (tmp_path / name).write_bytes(content)
        with (tmp_path / name).open("rb") as file:
            stream = trace.Unpacked(file)
            same(trace.read(stream), trace.read(kineto))


def test_the_head_is_read_without_the_events(tmp_path):
    path = tmp_path / "trace.json"
    path.write_bytes(json.dumps(BEHIND)[:-1].encode() + b', "traceEvents": [never read')
    assert trace.head(path) == {"distributedInfo": BEHIND["distributedInfo"]}
    path.write_bytes(b'[{"ph": "X"}]')
    assert trace.head(path) == {}
