"""Operator and kernel tables: the figures of torch's own key_averages(), and device time where it was launched."""

import json

import pandas as pd
import pytest
import torch
from made_traces import capture_of, event, launched, note, op
from torch.profiler import ProfilerActivity, profile, record_function

import effkit as ek


def training(model, *shape):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        with record_function("forward"):
            out = model(torch.ones(*shape))
        (out[0] if isinstance(out, tuple) else out).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


nn = torch.nn
LIVE = {
    "a perceptron": lambda: training(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 1)), 4, 8),
    "convolutions": lambda: training(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), 2, 3, 8, 8),
    "an LSTM": lambda: training(nn.LSTM(4, 8, num_layers=2), 5, 2, 4),
    "attention": lambda: training(nn.TransformerEncoderLayer(8, 2, 16), 5, 2, 8),
}


@pytest.mark.parametrize("name", LIVE)
def test_every_operator_equals_key_averages(name, tmp_path):
    step = LIVE[name]()
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        for _ in range(3):
            step()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    seen = ek.load(tmp_path / "trace.json")
    table = seen.operators()
    oracle = {row.key: row for row in profiler.key_averages()}
    assert len(table) > 15
    for name, row in table.iterrows():
        torchs = oracle[name]
        found = (row["calls"], row["host_total_ns"] / 1000, row["host_self_ns"] / 1000)
        assert found == pytest.approx((torchs.count, torchs.cpu_time_total, torchs.self_cpu_time_total), abs=1e-6), name
    annotations = set(seen.events.loc[seen.events["category"] == "user_annotation", "name"])
    assert {key for key in oracle if "::" in key or key.endswith("Backward0")} - annotations <= set(table.index)

    by_shape = seen.operators(by_shape=True)
    grouped = {(row.key, json.dumps(row.input_shapes, separators=(",", ":"))): row
               for row in profiler.key_averages(group_by_input_shape=True)}  # fmt: skip
    shared = [key for key in by_shape.index if key in grouped]
    assert len(shared) > 10
    for key in shared:
        assert by_shape.loc[key, "calls"] == grouped[key].count
        assert by_shape.loc[key, "host_self_ns"] / 1000 == pytest.approx(grouped[key].self_cpu_time_total, abs=1e-6)
    assert by_shape["calls"].sum() == table["calls"].sum()


def test_device_time_goes_to_the_innermost_operator_around_the_launch(tmp_path):
    seen = capture_of(
        tmp_path,
        op("aten::linear", 0, 50, External_id=77),
        op("aten::addmm", 10, 40, External_id=78),
        launched("gemm", 20, 100, 130, correlation=5, External_id=77),  # not by the external id
        launched("bias", 45, 130, 135, correlation=6),
        launched("somebody else's", 60, 140, 142, correlation=7),
        event("kernel", "launched before the recording", 0, 8, correlation=1),
        event("gpu_memcpy", "Memcpy HtoD", 150, 151, correlation=99),
    )
    table = seen.operators()
    assert table.loc["aten::addmm", ["device_self_ns", "device_total_ns"]].tolist() == [30_000, 30_000]
    assert table.loc["aten::linear", ["device_self_ns", "device_total_ns"]].tolist() == [5_000, 35_000]
    assert table.loc["not visible", "device_self_ns"] == 11_000
    device = seen.events[seen.events["category"].isin(["kernel", "gpu_memcpy"])]
    assert table["device_self_ns"].sum() == device["dur_ns"].sum()
    assert table.loc["aten::linear", "host_self_ns"] == 50_000 - 30_000 - 1_000


def test_an_only_child_with_its_parents_name_is_its_parent(tmp_path):
    seen = capture_of(
        tmp_path, op("a", 0, 10), op("a", 1, 9), op("b", 2, 4), op("a", 20, 30), op("a", 21, 22), op("b", 23, 24)
    )
    table = seen.operators()
    assert table.loc["a", ["calls", "host_total_ns", "host_self_ns"]].tolist() == [3, 21_000, 8_000 + 8_000 + 1_000]


def test_without_a_device_its_times_are_absent(tmp_path):
    table = capture_of(tmp_path, op("aten::mm", 0, 10)).operators()
    assert table[["device_self_ns", "device_total_ns"]].isna().all(axis=None)
    assert "not visible" not in table.index


def test_kernels(tmp_path):
    seen = capture_of(
        tmp_path,
        event("kernel", "sm90_xmma_gemm_bf16", 0, 30, correlation=1, **{"est. achieved occupancy %": 50}),
        event("kernel", "sm90_xmma_gemm_bf16", 40, 50, correlation=2, **{"est. achieved occupancy %": 10}),
        event("kernel", "vectorized_elementwise", 60, 70, correlation=3),
    )
    table = seen.kernels()
    gemm, other = table.loc["sm90_xmma_gemm_bf16"], table.loc["vectorized_elementwise"]
    assert gemm[["calls", "total_ns", "mean_ns", "min_ns", "max_ns"]].tolist() == [2, 40_000, 20_000, 10_000, 30_000]
    assert gemm["share_frac"] == pytest.approx(0.8)
    assert gemm["occupancy_frac"] == pytest.approx((0.5 * 30 + 0.1 * 10) / 40)
    assert (gemm["tensor_cores"], other["tensor_cores"]) == (True, False)
    assert seen.kernels()["tensor_cores"].dtype == "boolean"
    assert pd.isna(other["occupancy_frac"])


def test_diff_names_what_grew_shrank_appeared_and_went(tmp_path):
    mark = note("ProfilerStep#0", 0, 100)
    one = [op("a", 0, 10), op("b", 10, 20), op("c", 20, 30), launched("k", 41, 42, 50, correlation=1)]
    other = [op("a", 0, 40), op("b", 40, 44), op("b", 50, 54), op("d", 60, 70),
             launched("k", 71, 72, 80, correlation=1), launched("k", 91, 92, 100, correlation=2)]  # fmt: skip
    before = capture_of(tmp_path, mark, *one)
    table = before.diff(capture_of(tmp_path, mark, note("ProfilerStep#1", 100, 200), *other))
    change = table["change"].loc["operator"]
    assert change.to_dict() == {"a": "grew", "b": "shrank", "c": "went", "d": "appeared"}
    assert table.loc[("kernel", "k"), "change"] == "same"  # per step: two in two steps
    assert table.loc[("operator", "a"), ["time_ns", "other_time_ns", "difference_ns"]].tolist() == [
        10_000,
        20_000,
        10_000,
    ]
    assert pd.isna(table.loc[("operator", "d"), "time_ns"])


def test_diff_compares_what_is_in_the_steps_and_says_what_is_not(tmp_path):
    """Kernels of 32 us, of which 22 are in the two steps: the rest was launched before, or after."""

    def run(name, kernel_us):
        mark = [note("ProfilerStep#0", 100, 150), note("ProfilerStep#1", 150, 200)]
        inside = [launched("k", 110, 111, 111 + kernel_us, 1), launched("k", 160, 161, 161 + kernel_us, 2)]
        around = [
            op("aten::mm", 0, 30),
            launched("k", 5, 20, 26, 3),
            op("aten::mm", 230, 240),
            launched("k", 231, 235, 239, 4),
        ]
        (tmp_path / name).mkdir()
        return capture_of(tmp_path / name, mark, op("aten::mm", 105, 115), op("aten::mm", 155, 165), *inside, *around)

    table = run("one", 11).diff(run("other", 22))
    kernel, operator = table.loc[("kernel", "k")], table.loc[("operator", "aten::mm")]
    assert kernel[["time_ns", "other_time_ns", "calls", "other_calls"]].tolist() == [11_000, 22_000, 1, 1]
    assert operator[["time_ns", "calls"]].tolist() == [9_000, 1], "of each ten, one is the call that launches"
    assert table.attrs["notes"] == [
        "before: 31% of the kernels' time is outside of the steps",
        "after: 19% of the kernels' time is outside of the steps",
    ]  # fmt: skip
    whole = capture_of(tmp_path, launched("k", 0, 1, 5, 1))
    assert whole.diff(whole).attrs["notes"] == []
    assert whole.diff(whole).loc[("kernel", "k"), "time_ns"] == 4_000


def test_what_a_step_launched_counts_as_its_own_though_earlier_work_shortens_the_step(tmp_path):
    """The step begins when the earlier step's kernel is done, at 60; its operators ran on the host before."""
    seen = capture_of(
        tmp_path, note("ProfilerStep#0", 0, 100), event("kernel", "earlier", -20, 60, correlation=90),
        op("aten::mm", 5, 15), launched("gemm", 10, 60, 110, 1),
    )  # fmt: skip
    inside = seen._in_steps()
    assert inside.kernels()["total_ns"].to_dict() == {"gemm": 50_000}
    assert inside.operators().loc["aten::mm", "device_self_ns"] == 50_000


def test_a_correlation_of_zero_links_nothing(tmp_path):
    seen = capture_of(
        tmp_path,
        op("aten::add", 100, 120),
        event("hip_runtime", "hipGetDevice", 102, 103, correlation=0),
        event("hip_runtime", "hipLaunchKernel", 105, 110, correlation=12),
        event("kernel", "add", 130, 140, correlation=12),
        event("kernel", "ncclDevKernel_Generic(ncclWork*)", 200, 600, correlation=0, stream=1),
    )
    assert seen.operators()["device_total_ns"].to_dict() == {"aten::add": 10_000, "not visible": 400_000}
    assert seen.collectives()["annotations"].tolist() == [""]
