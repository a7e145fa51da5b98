"""Recorded matrix products by shape: FLOPs and bytes as a hand counts them, and the floor of the datasheet."""

import json

import pandas as pd
import pytest
from made_traces import capture_of, launched, op

import effkit as ek


def product(name, shapes, kinds, start, end, correlation):
    return [op(name, start, start + 2, Input_Dims=shapes, Input_type=kinds),
            *launched("gemm", start + 1, start + 3, end, correlation=correlation)]  # fmt: skip


def test_products_are_held_against_the_datasheet_of_their_device(tmp_path):
    half, weights = "c10::BFloat16", [[4096, 2048], [2048, 8192]]
    events = [
        *product("aten::mm", weights, [half, half], 0, 1003, 1),
        *product("aten::mm", weights, [half, half], 2000, 2503, 2),
        *product("aten::addmm", [[64], [16, 32], [32, 64]], ["float", "float", "float"], 3000, 3013, 3),
        *product("aten::bmm", [[8, 16, 32], [8, 32, 64]], ["c10::Half", "c10::Half"], 4000, 4023, 4),
        *product("aten::mm", [[16, 32], [31, 64]], [half, half], 5000, 5013, 5),  # which no product is
        *product("aten::mm", [[2, 3], [3, 4]], ["long int", "long int"], 6000, 6013, 6),
        op("aten::relu", 7000, 7001, Input_Dims=[[2, 3]], Input_type=[half]),
        op("aten::mm", 8000, 8001, Input_Dims=weights, Input_type=[half, half]),  # launched nothing
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"deviceProperties": [{"name": "NVIDIA H200"}], "traceEvents": events}))
    table = ek.load(path).products().droplevel(["shapes", "dtypes"])
    large = table.iloc[0]
    assert large["calls"] == 2, "those that ran on the device"
    assert large["flops"] == 2 * 4096 * 2048 * 8192
    assert large["size_bytes"] == 2 * (4096 * 2048 + 2048 * 8192 + 4096 * 8192)
    assert large["mean_ns"] == 750_000
    assert large["floor_ns"] == pytest.approx(large["flops"] / 989.5e12 * 1e9), "arithmetic, not reading"
    assert large["reached_frac"] == pytest.approx(138.9 / 750, rel=0.001)
    small = table.loc["aten::addmm"]
    assert small["flops"] == 2 * 16 * 32 * 64
    assert small["rate_flops_per_s"] == 494.5e12, "float32 may have been TF32"
    assert small["floor_ns"] == pytest.approx(4 * (16 * 32 + 32 * 64 + 16 * 64) / 4800e9 * 1e9), "reading"
    assert table.loc["aten::bmm", "flops"] == 2 * 8 * 16 * 32 * 64
    assert len(table) == 4, "the one that is no product is not there"
    whole = table.loc["aten::mm"].iloc[1]
    assert whole["flops"] == 48
    assert pd.isna(whole["floor_ns"]), "no datasheet tells the rate of whole numbers"


def test_products_of_a_device_without_a_datasheet_have_no_floor(tmp_path):
    table = capture_of(tmp_path, product("aten::mm", [[4, 4], [4, 4]], ["float", "float"], 0, 9, 1)).products()
    assert table["flops"].tolist() == [128]
    assert table[["floor_ns", "reached_frac"]].isna().all(axis=None)
    assert capture_of(tmp_path, op("aten::mm", 0, 9)).products().empty, "no shapes, no products"
