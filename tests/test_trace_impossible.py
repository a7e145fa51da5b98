"""Times that cannot be are set apart: said, counted, and in no sum; what only looks odd stays."""

import pandas as pd
import pytest
from made_traces import capture_of, event, launched, note, op, written

import effkit as ek

T = 1_700_000_000_000_000  # microseconds: now, or nearly
SECOND, YEAR = 10**6, 365 * 86_400 * 10**6


def kernel(start: float, end: float, correlation: int = 2, name: str = "add", **args) -> dict:
    return event("kernel", name, T + start, T + end, correlation=correlation, **args)


def seen(tmp_path, *more) -> ek.Capture:
    """A product of 100 us, and the launch of an addition."""
    return capture_of(
        tmp_path, op("aten::mm", T, T + 50), launched("gemm", T + 10, T + 100, T + 200, correlation=1),
        op("aten::add", T + 60, T + 80), launch(65, 2), *more,
    )  # fmt: skip


def launch(at: float, correlation: int, api: str = "cuda") -> dict:
    return event(f"{api}_runtime", f"{api}LaunchKernel", T + at, T + at + 5, correlation=correlation)


IMPOSSIBLE = {
    "the end is before the begin": [kernel(300, 240)],
    "it lasts longer than a year": [kernel(300, 300 + 234 * YEAR)],
    "it is a year apart from the others": [kernel(-T, -T)],
    "it begins before it was launched": [kernel(-100 * SECOND, -100 * SECOND + 10)],
    "others run on its stream meanwhile": [
        event("gpu_memcpy", "Memcpy DtoH", T + 210, T + 210 + 3 * SECOND), kernel(300, 310),
    ],
}  # fmt: skip


@pytest.mark.parametrize("reason", IMPOSSIBLE)
def test_what_cannot_be_is_said_and_in_no_sum(reason, tmp_path):
    capture = seen(tmp_path, IMPOSSIBLE[reason])
    overview = capture.overview()
    row, kernels = overview.iloc[0], capture.kernels()
    added_us = 10 if "stream" in reason else 0
    assert row["dur_ns"] == (310_000 if added_us else 200_000)
    assert row["kernel_ns"] == capture.operators()["device_self_ns"].sum() == 100_000 + added_us * 1000
    assert row["memcpy_ns"] == 0
    assert kernels["total_ns"].to_dict() == {"gemm": 100_000} | ({"add": 10_000} if added_us else {})
    assert kernels["share_frac"].sum() == pytest.approx(1)
    assert f"set apart, in no sum: 1 events (impossible: {reason})" in overview.attrs["notes"]
    assert (
        overview.attrs["suggestions"]
        == seen(tmp_path, [kernel(300, 310)] if added_us else []).overview().attrs["suggestions"]
    )
    assert len(capture.events) == 5 + len(IMPOSSIBLE[reason]), "it stays among the events"
    again = ek.load(capture.save(tmp_path / "saved.zip"))
    pd.testing.assert_frame_equal(again.overview(), overview)
    assert again.overview().attrs == overview.attrs
    assert capture.provenance["date"] == "2023-11-14"


def test_the_ranks_of_a_fleet_say_theirs(tmp_path):
    for rank in (0, 1):
        events = [op("aten::mm", T, T + 50), kernel(0, [10, -10][rank])]
        written(tmp_path / f"{rank}.json", events, rank=rank, world=2)
    overview = ek.load(tmp_path).overview()
    assert overview["kernel_ns"].tolist()[0] == 10_000
    assert pd.isna(overview["kernel_ns"].tolist()[1]), "no other work of its device was recorded"
    assert [note for note in overview.attrs["notes"] if "set apart" in note] == [
        "set apart, in no sum: 1 events (impossible: the end is before the begin)"
    ]


def test_an_operator_that_ends_before_it_begins_is_set_apart_too(tmp_path):
    operators = capture_of(tmp_path, op("aten::mm", 10, 40), op("aten::add", 50, 45)).operators()
    assert operators["host_self_ns"].to_dict() == {"aten::mm": 30_000}


POSSIBLE = {
    "a launch that overlaps the last blocks before it": [kernel(300, 500), kernel(490, 495, 3)],
    "branches of one graph, written on one stream": [kernel(300, 300 + 5000), kernel(310, 320)],
    "a copy on another stream": [
        kernel(300, 310), event("gpu_memcpy", "Memcpy DtoH", T + 210, T + 210 + SECOND, stream=9),
    ],
    "a kernel that waits for other ranks": [kernel(300, 5300, 4, "ncclDevKernel_AllReduce_Sum"), kernel(310, 320)],
    "a queue of ROCm, which runs several at once": [kernel(300, 300 + 5000), launch(80, 3, "hip"), kernel(310, 320, 3)],
    "clocks that differ by a minute": [
        one for n in (3, 4, 5) for one in (launch(80 + 60 * SECOND, n), kernel(400 + n, 401 + n, n))
    ],
    "a device that is behind": [kernel(90 * SECOND, 90 * SECOND + 10)],
}  # fmt: skip


@pytest.mark.parametrize("case", POSSIBLE)
def test_what_only_looks_odd_stays(case, tmp_path):
    capture = seen(tmp_path, POSSIBLE[case])
    assert not [note for note in capture.overview().attrs["notes"] if "set apart" in note]
    work = [one for one in POSSIBLE[case] if one["cat"] in ("kernel", "gpu_memcpy")]
    assert capture.operators()["device_self_ns"].sum() == 100_000 + sum(round(1000 * one["dur"]) for one in work)


def test_a_mark_does_not_count_as_one_of_the_others(tmp_path):
    marked = capture_of(tmp_path, note("ProfilerStep#0", 0, 100), op("aten::mm", 10, 40), op("aten::mm", 40, -20))
    assert marked.overview()[["dur_ns", "cpu_exec_ns"]].to_numpy().tolist() == [[100_000, 30_000]]
