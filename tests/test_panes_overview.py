"""The overview: each moment of a step counts once, for what it shows, and what was not recorded is not called idle."""

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_traces import capture_of, event, launched, note, op, written

import effkit as ek
from effkit.panes.breakdown import PARTS


def parts(capture, **options) -> dict[str, int]:
    """The first step's parts that are there [us]."""
    row = capture.overview(**options).iloc[0]
    return {name: int(row[name]) // 1000 for name in PARTS if pd.notna(row[name]) and row[name]}


def test_a_moment_counts_for_the_first_part_that_it_shows(tmp_path):
    seen = capture_of(
        tmp_path,
        note("ProfilerStep#3", 0, 100),
        note("enumerate(DataLoader)#_BaseDataLoaderIter.__next__", 0, 10),
        op("aten::mm", 10, 30),
        launched("gemm", 12, 20, 40, correlation=1),
        launched("ncclDevKernel_AllReduce_Sum", 14, 30, 60, correlation=2),
        launched("gemm", 31, 55, 58, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH", 50, 65, correlation=4, bytes=8),
    )
    assert parts(seen) == {"dataloader_ns": 10, "cpu_exec_ns": 10, "kernel_ns": 23, "exposed_communication_ns": 17,
                           "memcpy_ns": 5, "idle_ns": 35}  # fmt: skip
    row = seen.overview().iloc[0]
    assert row["hidden_communication_ns"] == 13_000
    assert row["device_busy_frac"] == pytest.approx(0.45)
    assert row["device_span_ns"] == 45_000


def test_a_step_lasts_until_what_it_launched_has_run_and_the_next_begins_no_earlier(tmp_path):
    seen = capture_of(
        tmp_path,
        note("ProfilerStep#0", 0, 50),
        launched("gemm", 10, 20, 80, correlation=1),
        note("ProfilerStep#1", 50, 100),
        launched("gemm", 60, 80, 95, correlation=2),
    )
    overview = seen.overview()
    assert overview["dur_ns"].tolist() == [80_000, 20_000]
    assert overview["kernel_ns"].tolist() == [60_000, 15_000]


def test_waiting_for_device_work_that_was_not_recorded_is_not_visible_rather_than_idle(tmp_path):
    seen = capture_of(  # one decode step behind a graph: the step before it was not recorded, and this one waits for it
        tmp_path,
        note("decode", 0, 1000),
        op("aten::copy_", 4, 962),
        event("cuda_runtime", "hipMemcpyWithStream", 5, 960, correlation=1),
        event("cuda_runtime", "hipGraphLaunch", 965, 970, correlation=2),
        *(event("kernel", "gemm", 970 + i, 971 + i, correlation=2) for i in range(30)),
    )
    found = parts(seen, step="decode")
    assert found["not_visible_ns"] == 955
    assert found["kernel_ns"] == 30
    assert found["idle_ns"] == 7
    words = seen.overview(step="decode").attrs["suggestions"]
    assert any(
        "not recorded" in sentence and "nothing about whether the device was idle" in sentence for sentence in words
    )


def test_without_a_device_its_columns_are_absent_and_operators_are_what_computes(tmp_path):
    seen = capture_of(
        tmp_path,
        note("ProfilerStep#0", 0, 100),
        op("aten::mm", 0, 40),
        note("gloo:all_reduce", 30, 80, thread=2),
        op("c10d::allreduce_", 41, 42),
    )
    overview = seen.overview()
    assert parts(seen) == {"cpu_exec_ns": 40, "exposed_communication_ns": 40, "idle_ns": 20}
    absent = ["kernel_ns", "memcpy_ns", "not_visible_ns", "device_busy_frac", "device_span_ns"]
    assert overview[absent].isna().all(axis=None)
    assert overview["hidden_communication_ns"].iloc[0] == 10_000
    assert "no device activity was recorded: its columns are absent" in overview.attrs["notes"]


def test_the_steps_say_where_they_come_from(tmp_path):
    events = [op("aten::mm", 0, 10), note("my step 1", 20, 30), note("my step 2", 30, 50)]
    seen = capture_of(tmp_path, events)
    assert seen.overview()["dur_ns"].tolist() == [50_000]
    assert "the whole window: no step is marked" in seen.overview().attrs["notes"][0]
    assert seen.overview(step="my step *")["dur_ns"].tolist() == [10_000, 20_000]
    assert seen.overview(step="my step 2")["dur_ns"].tolist() == [20_000]
    with pytest.raises(ValueError, match="no annotation is called “other”; there are my step 1, my step 2"):
        seen.overview(step="other")


def test_no_suggestion_where_the_numbers_support_none(tmp_path):
    busy = capture_of(tmp_path, note("ProfilerStep#0", 0, 100), launched("gemm", 0, 1, 99, correlation=1))
    assert busy.overview().attrs["suggestions"] == []
    launching = [
        [op("aten::add", i, i + 10), *launched("add", i, i + 8, i + 9, correlation=i)] for i in range(0, 90, 10)
    ]
    launching = [one for operator in launching for one in operator]
    bound = capture_of(tmp_path, note("ProfilerStep#0", 0, 100), launching)
    assert len(bound.overview().attrs["suggestions"]) == 1
    assert "the device idles while the host runs operators" in bound.overview().attrs["suggestions"][0]


KINDS = ("cpu_op", "kernel", "gpu_memcpy", "cuda_runtime", "user_annotation")
NAMES = (
    "aten::mm",
    "ncclDevKernel_SendRecv",
    "gemm",
    "cudaStreamSynchronize",
    "enumerate(DataLoader)#x",
    "gloo:barrier",
)


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.sampled_from(NAMES), st.integers(0, 50), st.integers(0, 50)),
                min_size=1, max_size=12), st.booleans())  # fmt: skip
def test_the_parts_always_sum_to_the_step(tmp_path_factory, drawn, marked):
    events = [
        event(kind, name, start, start + length, correlation=i) for i, (kind, name, start, length) in enumerate(drawn)
    ]
    marks = [note("ProfilerStep#0", 0, 40), note("ProfilerStep#1", 40, 100)] if marked else []
    overview = capture_of(tmp_path_factory.mktemp("drawn"), marks, events).overview()
    assert (overview[list(PARTS)].sum(axis=1) == overview["dur_ns"]).all()
    assert (overview[list(PARTS)].fillna(0) >= 0).all(axis=None)
    assert (overview["hidden_communication_ns"] >= 0).all()
    assert (overview["device_span_ns"].fillna(0) <= overview["dur_ns"]).all()


def test_ranks_are_apart(tmp_path):
    for rank in (0, 1):
        written(
            tmp_path / f"{rank}.json", [note("ProfilerStep#0", 0, 10 + rank), op("aten::mm", 0, 5)], rank=rank, world=2
        )
    overview = ek.load(tmp_path).overview()
    assert overview.index.tolist() == [(0, 0), (1, 0)]
    assert overview["dur_ns"].tolist() == [10_000, 11_000]


def test_between_two_pieces_of_recorded_work_the_device_is_known_to_idle(tmp_path):
    seen = capture_of(
        tmp_path,
        note("ProfilerStep#0", 0, 100),
        event("cuda_runtime", "cudaDeviceSynchronize", 0, 90, correlation=9),
        launched("gemm", 0, 20, 40, correlation=1),
        launched("gemm", 2, 50, 90, correlation=2),
    )
    assert parts(seen) == {"not_visible_ns": 20, "kernel_ns": 60, "cpu_exec_ns": 10, "idle_ns": 10}


@pytest.mark.parametrize("call", [lambda seen: seen.overview(step=3), lambda seen: seen.diff("other.json")])
def test_arguments_of_another_type_are_refused_in_a_sentence(tmp_path, call):
    with pytest.raises(TypeError, match=r"given: (3|str)"):
        call(capture_of(tmp_path, op("a", 0, 1)))
