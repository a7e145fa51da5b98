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
    absent = ["kernel_ns", "memcpy_ns", "not_visible_ns", "device_busy_frac", "first_launch_ns", "behind_waits_ns"]
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
    assert (overview["first_launch_ns"].fillna(0) <= overview["cpu_exec_ns"]).all()
    rest = overview["dur_ns"] - overview[["kernel_ns", "exposed_communication_ns", "memcpy_ns"]].fillna(0).sum(axis=1)
    assert overview["behind_waits_ns"].fillna(0).sum() <= rest.sum()


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


def other(category: str | None, start: float, end: float) -> dict:
    """Work of a device, as other profilers write it."""
    named = {} if category is None else {"cat": category}
    return {"ph": "X", "name": "dot", "pid": 17, "tid": 2, "ts": start, "dur": end - start, "args": {}} | named


@pytest.mark.parametrize("category", ["mtia_ccp_events", "hpu_op"])
def test_kernels_of_other_backends_are_kernels(category, tmp_path):
    seen = capture_of(tmp_path, op("aten::mm", 100, 150), other(category, 150, 1000))
    assert parts(seen) == {"cpu_exec_ns": 50, "kernel_ns": 850}
    assert seen.kernels()["total_ns"].to_dict() == {"dot": 850_000}
    assert seen.overview()["device_busy_frac"].tolist() == [850 / 900]


@pytest.mark.parametrize(("category", "words"), [("tpu_op", "category “tpu_op”"), (None, "no category")])
def test_what_no_pane_knows_is_said_and_not_idle(category, words, tmp_path):
    seen = capture_of(tmp_path, op("aten::mm", 100, 150), other(category, 140, 1000), other(category, 1010, 1020))
    assert parts(seen) == {"cpu_exec_ns": 50, "not_visible_ns": 860, "idle_ns": 10}
    notes = seen.overview().attrs["notes"]
    assert f"not understood: 2 events of {words}, 870.0 us, which are in no pane" in notes
    assert not any("no device activity" in note for note in notes)


@pytest.mark.parametrize("inside", [True, False])
def test_a_wait_for_work_that_nobody_recorded_is_not_visible_inside_an_operator_too(inside, tmp_path):
    seen = capture_of(
        tmp_path, event("cuda_runtime", "cudaLaunchKernel", 100, 105, correlation=1),
        event("cuda_runtime", "cudaStreamSynchronize", 210, 690, correlation=2),
        op("aten::item", 200, 700) if inside else op("aten::mm", 95, 115),
    )  # fmt: skip
    # beside operators nothing is known of a device that was given work
    expected = {"cpu_exec_ns": 20, "not_visible_ns": 580} if inside else {"cpu_exec_ns": 20, "not_visible_ns": 575}
    assert parts(seen) == expected
    notes = seen.overview().attrs["notes"]
    assert "of 1 of 1 launches and copies the device's own work is not in the recording" in notes


def test_launches_whose_kernels_were_lost_are_counted(tmp_path):
    lost = [event("cuda_runtime", "cudaLaunchKernel", i, i + 1, correlation=i) for i in (5, 7)]
    seen = capture_of(tmp_path, op("aten::mm", 0, 30), launched("gemm", 2, 10, 20, correlation=1), lost)
    assert (
        "of 2 of 3 launches and copies the device's own work is not in the recording" in seen.overview().attrs["notes"]
    )
    whole = capture_of(tmp_path, op("aten::mm", 0, 30), launched("gemm", 2, 10, 20, correlation=1))
    assert whole.overview().attrs["notes"] == ["steps from the whole window: no step is marked"]


@pytest.mark.parametrize("call", [lambda seen: seen.overview(step=3), lambda seen: seen.diff("other.json")])
def test_arguments_of_another_type_are_refused_in_a_sentence(tmp_path, call):
    with pytest.raises(TypeError, match=r"given: (3|str)"):
        call(capture_of(tmp_path, op("a", 0, 1)))


def test_earlier_work_is_told_per_stream(tmp_path):
    """Until 60 the device does what nobody saw being launched; a copy of the step on another stream begins before."""
    seen = capture_of(
        tmp_path,
        note("ProfilerStep#0", 0, 100),
        event("kernel", "earlier", -20, 30, correlation=90),
        event("kernel", "earlier", 30, 60, correlation=91),
        event("kernel", "of nobody's launch", -30, -25, correlation=93, stream=9),  # of a stream that no step uses
        event("cuda_runtime", "cudaMemcpyAsync", 2, 3, correlation=1),
        event("gpu_memcpy", "Memcpy HtoD", 5, 15, correlation=1, stream=8),
        launched("gemm", 10, 60, 110, correlation=2),
        note("ProfilerStep#1", 100, 150),
        launched("gemm", 101, 110, 150, correlation=3),
    )
    overview = seen.overview()
    assert overview["start_ns"].tolist() == [60_000, 110_000]
    assert overview["dur_ns"].tolist() == [50_000, 40_000]
    assert overview["kernel_ns"].tolist() == [50_000, 40_000]


@pytest.mark.parametrize(("gemm_us", "word"), [(500, "hides: overlap it"), (20, "hides, nor could")])
def test_communication_is_to_be_overlapped_only_where_something_computes(tmp_path, gemm_us, word):
    seen = capture_of(
        tmp_path, note("ProfilerStep#0", 0, 1000), launched("gemm", 1, 2, 2 + gemm_us, 1),
        launched("ncclDevKernel_AllReduce_Sum", 3, 600, 1000, 2),
    )  # fmt: skip
    words = seen.overview().attrs["suggestions"]
    assert any(f"40% of the time is communication that no computation {word}" in one for one in words)


# What a recording began with, and what waits cost


def cold(first_us: float) -> list:
    """Fifty products whose launches take 8 us, but for the first."""
    events, t = [], 0.0
    for number in range(50):
        long = first_us if number == 0 else 8
        events += [op("aten::mm", t, t + long + 20),
                   event("cuda_runtime", "cudaLaunchKernel", t + 5, t + 5 + long, correlation=number + 1),
                   event("kernel", "gemm", t + long + 15, t + long + 60, correlation=number + 1)]  # fmt: skip
        t += long + 50
    return events


def test_a_first_launch_that_loads_the_driver_is_no_launch_gap(tmp_path):
    seen = capture_of(tmp_path, cold(350_000)).overview()
    assert seen["first_launch_ns"].tolist() == [350_000_000]
    assert seen["cpu_exec_ns"].iloc[0] >= 350_000_000, "of which it is"
    (word,) = seen.attrs["suggestions"]
    assert word.startswith("99% of the time is spent in first launches, each over 10 times as long")
    assert word.endswith("record after a warm-up")


def test_a_first_launch_like_the_others_is_not_worth_a_word(tmp_path):
    seen = capture_of(tmp_path, cold(9)).overview()
    assert seen["first_launch_ns"].tolist() == [0]
    assert seen.attrs["suggestions"] == []


def test_a_launch_that_waits_for_a_full_queue_is_no_first_launch(tmp_path):
    """The device is busy all the while; and the seventh of its kind is not the first."""
    calls = [event("cuda_runtime", "cudaLaunchKernel", 1 + 2 * i, 2 + 2 * i, correlation=i + 10) for i in range(6)]
    seen = capture_of(
        tmp_path, note("ProfilerStep#0", 0, 1000), calls,
        event("kernel", "gemm", 4, 700, correlation=10),
        event("cuda_runtime", "cudaLaunchKernel", 20, 690, correlation=6),
        event("kernel", "add", 700, 720, correlation=6),  # the first of its kernel
        event("cuda_runtime", "cudaLaunchKernel", 800, 990, correlation=7),
        event("kernel", "gemm", 990, 1000, correlation=7),
    )  # fmt: skip
    assert seen.overview()["first_launch_ns"].tolist() == [0]


def wait(start: float, end: float) -> dict:
    return event("cuda_runtime", "cudaStreamSynchronize", start, end, correlation=99)


@pytest.mark.parametrize(
    ("waits", "number", "behind_us"),
    [
        # the device is done at 40; its next work begins at 70. The host had come 25 before it could go on
        ([wait(15, 40)], 1, 25),
        ([wait(38, 40)], 1, 2),  # a short wait costs no more than it is long
        ([wait(5, 45)], 1, 30),  # a long one no more than the device idles
        ([wait(15, 40), wait(50, 52)], 2, 25 + 2),  # what the device did in the second nobody knows: 28 are left
        ([wait(15, 24)], 1, 9),  # it waited for an earlier kernel: what it then launched came too late all the same
        ([wait(70, 95), wait(95, 100)], 2, 0),  # nothing idles any more
        ([], 0, 0),
        ([wait(-20, -10)], 0, 0),  # not of the step
    ],
)  # fmt: skip
def test_a_wait_costs_what_the_device_idles_behind_it(tmp_path, waits, number, behind_us):
    seen = capture_of(
        tmp_path, note("ProfilerStep#0", 0, 100), launched("gemm", 1, 10, 40, 1), waits,
        launched("gemm", 60, 70, 100, 2),
        op("aten::item", 200, 210),  # of a tensor of the host: no call to the device is in it
    ).overview()  # fmt: skip
    assert (seen["num_waits"].tolist(), seen["behind_waits_ns"].tolist()) == ([number], [1000 * behind_us])


# Serving engines


ENGINES = {
    "SGLang": ("step[EXTEND bs=2 toks=90]", "step[DECODE bs=2]", "step[MIXED bs=3]"),
    "vLLM": ("execute_context_2(90)_generation_0(0)", "execute_context_0(0)_generation_2(2)",
             "execute_context_1(64)_generation_2(2)"),
}  # fmt: skip


@pytest.mark.parametrize("engine", ENGINES)
def test_batches_of_a_serving_engine_are_steps_by_themselves(tmp_path, engine):
    fill, decode, mixed = ENGINES[engine]
    events = [
        op("aten::mm", 0, 10),  # before the first
        note(fill, 10, 60), launched("gemm", 20, 25, 70, correlation=1),
        note(decode, 70, 80), launched("gemv", 71, 72, 80, correlation=2),
        note(decode, 80, 92), launched("gemv", 81, 82, 92, correlation=3),
        note(mixed, 100, 130), launched("gemm", 101, 102, 130, correlation=4),
    ]  # fmt: skip
    seen = capture_of(tmp_path, *events)
    overview = seen.overview()
    assert overview["phase"].tolist() == ["prefill", "decode", "decode", "mixed"]
    assert overview["kernel_ns"].tolist() == [45_000, 8_000, 10_000, 28_000]
    assert overview.attrs["notes"][0] == "steps from the serving engine's marks: 1 of prefill, 2 of decode, 1 of mixed"
    assert seen.overview("decode")["dur_ns"].tolist() == [10_000, 12_000]
    assert seen.overview(decode)["dur_ns"].tolist() == [10_000, 12_000], "by its whole name, whatever signs are in it"
    assert len(seen.steps) == 4
    with pytest.raises(ValueError, match="no annotation is called “idle”"):
        seen.overview("idle")


def test_a_mark_within_another_is_no_step_of_its_own(tmp_path):
    seen = capture_of(
        tmp_path, note("execute_32_context_0(sq0sk0)_generation_32(sq32sk9)", 0, 100),
        note("step[DECODE bs=32]", 5, 90), op("aten::mm", 10, 20),
    )  # fmt: skip
    assert seen.overview()[["dur_ns", "phase"]].values.tolist() == [[100_000, "decode"]]
