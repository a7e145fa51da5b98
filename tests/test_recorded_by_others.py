"""Real recordings of other people against plain ``json.load``: nothing is lost, nothing rounded, nothing invented.

They are not part of the project: lay them beside it as ``shared/data``, or name their folder in ``EFFKIT_RECORDED``.
"""

import gzip
import json
import math
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest

import effkit as ek
from effkit import decoder
from effkit.operators import ATTENTION, MULTIPLIES
from effkit.trace.names import TODAY

RECORDED = Path(os.environ.get("EFFKIT_RECORDED", Path(__file__).resolve().parents[2] / "shared" / "data"))
TRACES = sorted(RECORDED.glob("traces/**/*.json.gz"))
ITEM_BYTES = {"float": 4, "long int": 8, "long": 8, "int": 4, "unsigned char": 1, "signed char": 1, "c10::Half": 2}

pytestmark = pytest.mark.skipif(not TRACES, reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")


@pytest.fixture(scope="module", params=TRACES, ids=lambda path: path.name[:28])
def pair(request):
    """One trace as effkit loads it, and its complete events as plain Python reads them."""
    with gzip.open(request.param) as file:
        plain = json.loads(file.read(), strict=False, parse_float=Decimal)["traceEvents"]
    return ek.load(request.param), [event for event in plain if event["ph"] == "X" and event["cat"] != "Trace"]


def nanoseconds(microseconds) -> int:
    return round(Decimal(microseconds) * 1000)


def test_events_of_each_category(pair):
    seen, plain = pair
    left_out = sum(event["cat"] == "python_function" for event in plain)
    counts = Counter(TODAY.get(event["cat"], event["cat"]) for event in plain)
    ours = seen.events["category"].value_counts().to_dict()
    if "Operator" in {event["cat"] for event in plain}:  # then marks and annotations were called operators
        ours["cpu_op"] += ours.pop("user_annotation")
    assert ours == {category: count for category, count in counts.items() if category != "python_function"}
    assert (left_out > 0) == ("left_out" in seen.provenance)
    if left_out:
        assert f"{left_out:,} events of Python functions" in repr(seen)


def test_time_of_kernels_by_name(pair):
    seen, plain = pair
    times: Counter[str] = Counter()
    for event in plain:
        if event["cat"].lower() == "kernel":
            times[event["name"]] += nanoseconds(event["dur"])
    assert seen.kernels()["total_ns"].to_dict() == times


def test_bytes_of_collectives_by_name(pair):
    seen, plain = pair
    size_bytes: Counter[str] = Counter()
    for event in plain:
        backend, _, collective = event["name"].partition(":")
        if backend in ("nccl", "gloo") and event["cat"] == "user_annotation" and "Input Dims" in event["args"]:
            for shape, kind in zip(event["args"]["Input Dims"], event["args"]["Input type"], strict=True):
                size_bytes[collective.strip("_").removesuffix("_base")] += math.prod(shape) * ITEM_BYTES[kind]
    told = [event for event in plain if event["name"] == "record_param_comms" and "In msg nelems" in event["args"]]
    for event in told:  # the newer way: what c10d itself says, of calls that have an annotation inside
        name = {"allreduce": "all_reduce"}.get(event["args"]["Collective name"], event["args"]["Collective name"])
        inside = any(one["name"].startswith("nccl:") and one["tid"] == event["tid"]
                     and event["ts"] <= one["ts"] <= event["ts"] + event["dur"] for one in plain)  # fmt: skip
        if inside:
            size_bytes[name] += int(event["args"]["In msg nelems"]) * {"Float": 4, "Long": 8}[event["args"]["dtype"]]
    ours = seen.collectives().groupby("collective")["size_bytes"].sum().to_dict()
    assert {name: total for name, total in ours.items() if total} == {n: t for n, t in size_bytes.items() if t}


def test_device_time_of_operators_is_all_there_is(pair):
    seen, plain = pair
    device = {"kernel", "gpu_memcpy", "gpu_memset", "Kernel", "Memcpy", "Memset"}
    total = sum(nanoseconds(event["dur"]) for event in plain if event["cat"] in device)
    operators = seen.operators()
    assert operators["device_self_ns"].sum() == total
    assert operators["host_self_ns"].min() >= 0 or operators["host_self_ns"].min() > -2_000, "clocks of coarse traces"


def test_kernels_that_say_that_they_multiply_count_as_products(pair):
    seen, plain = pair
    times = seen.families().get("kernel_ns", pd.Series(dtype="Int64")).fillna(0)
    multiply = [event for event in plain if event["cat"].lower() == "kernel"
                and re.search(r"(?<!fb)gemm|nvjet|cijk_", event["name"], re.IGNORECASE)]  # fmt: skip
    told = sum(int(times.get(family, 0)) for family in (*MULTIPLIES, ATTENTION))
    assert told >= sum(nanoseconds(event["dur"]) for event in multiply)


@pytest.mark.parametrize(("name", "phase"), [("decode", "decode"), ("prefilldecode", "prefill")])
def test_a_serving_engines_batch_is_a_step(name, phase):
    seen = ek.load(next(RECORDED.glob(f"traces/**/*Qwen3-8B_{name}.json.gz")))
    overview = seen.overview()
    assert overview["phase"].tolist() == seen.overview(phase)["phase"].tolist() == [phase]
    (mark,) = seen.events.loc[seen.events["name"].str.startswith("execute_"), "start_ns"]
    assert overview["start_ns"].tolist() == [mark], "the outer of the two marks"


def test_parts_of_the_steps_sum(pair):
    from effkit.panes.breakdown import PARTS

    overview = pair[0].overview()
    assert (overview[list(PARTS)].sum(axis=1) == overview["dur_ns"]).all()
    assert (overview[list(PARTS)].fillna(0) >= 0).all(axis=None)


def test_a_decode_behind_a_graph_is_not_called_idle():
    path = next(RECORDED.glob("traces/**/*Qwen3-8B_decode.json.gz"))
    row = ek.load(path).overview().iloc[0]
    assert row["idle_ns"] < 0.01 * row["dur_ns"]
    assert row["not_visible_ns"] > 0.9 * row["dur_ns"]
    assert row["kernel_ns"] > 9_000_000, "kernels that a graph launched still count"


# Counted by hand in the files [ns]: all kernels and copies that the engine's step launched, those of attention (CK's
# FmhaBatchPrefill, paged_attention and its reduction), and those of products (Tensile's Cijk)
@pytest.mark.parametrize(("name", "mode", "phase", "by_hand", "attention", "products"), [
    ("Qwen3-8B_prefilldecode", "EXTEND", "prefill", 492_811_900, 20_075_200, 420_305_700),
    ("Qwen3-8B_decode", "DECODE", "decode", 9_778_610, 2_127_900, 5_782_300),
])  # fmt: skip
def test_prefill_and_decode_of_a_serving_engine(name, mode, phase, by_hand, attention, products):
    path = next(RECORDED.glob(f"traces/**/*{name}.json.gz"))
    with gzip.open(path) as file:
        plain = [event for event in json.load(file)["traceEvents"] if event["ph"] == "X"]
    assert any(event["name"].startswith(f"step[{mode} ") for event in plain)
    (around,) = (event for event in plain if event["name"].startswith("execute_"))
    called = {event["args"]["correlation"]: event["ts"] for event in plain if event["cat"] == "cuda_runtime"}
    begin, end = around["ts"], around["ts"] + around["dur"]
    own = [event for event in plain if event["cat"] in ("kernel", "gpu_memcpy")
           and begin <= called.get(event["args"]["correlation"], 0) <= end]  # fmt: skip
    assert sum(nanoseconds(event["dur"]) for event in own) == pytest.approx(by_hand, rel=0.001)
    account = decoder.account(ek.load(path))
    phases = account.companion("Prefill and decode")
    assert phases.frame["value"].to_dict() == {phase: pytest.approx(by_hand, rel=0.02)}
    assert phases.residual == 0
    # not the half second in which its host waits for the batch before
    assert by_hand < account.total < 1.12 * by_hand
    assert abs(account.residual) <= len(account.frame), "rounding alone"
    assert account.frame.loc["attention", "value"] == pytest.approx(attention, rel=0.02)
    assert account.frame.loc["matrix products", "value"] == pytest.approx(products, rel=0.02)
    named = decoder.account(ek.load(path), step=around["name"])
    assert (named.total, named.frame["value"].to_dict()) == (account.total, account.frame["value"].to_dict())


def test_no_recorded_product_beats_the_floor_of_its_datasheet(pair):
    seen, plain = pair
    table = seen.products()
    assert (table["reached_frac"].dropna() < 1).all(), table
    # those with two factors as a hand counts them
    factors = {"aten::mm": slice(0, 2), "aten::bmm": slice(0, 2), "aten::addmm": slice(1, 3)}
    flops: Counter[tuple] = Counter()
    for event in plain:
        if (place := factors.get(event["name"])) and "Input Dims" in event.get("args", {}):
            left, right = event["args"]["Input Dims"][place]
            flops[event["name"], json.dumps(event["args"]["Input Dims"], separators=(",", ":"))] = (
                2 * math.prod(left) * right[-1])  # fmt: skip
    for (operator, shapes, _), row in table.iterrows():
        if (operator, shapes) in flops:
            assert row["flops"] == flops[operator, shapes]
    if "MI300X" in str(seen.provenance.get("device")) and len(table):
        assert 0.1 < table["reached_frac"].max() < 0.8


def test_four_of_eight_ranks():
    seen = ek.load(RECORDED / "traces" / "dlrm_4_of_8_ranks")
    assert "ranks 4, 5, 6, 7 were not recorded" in repr(seen)
    calls = seen.collectives()
    # all leave the first all-to-all together; three of the four had waited for the fourth
    first = calls[(calls["collective"] == "all_to_all") & (calls["call"] == calls["call"].min())]
    assert first["moving_ns"].max() - first["moving_ns"].min() < 10_000
    assert first["waiting_ns"].max() > 5_000_000
    assert (seen.clocks()["spread_ns"] < 2_000).all()


def test_a_step_begins_when_the_stream_that_its_products_run_on_is_done_with_earlier_work():
    """A copy of the step, on a stream of its own, begins 14 us before the last that nobody saw launched is done."""
    seen = ek.load(next(RECORDED.glob("traces/dlrm*/worker1*")))
    device = seen.events[seen.events["category"].isin(["kernel", "gpu_memcpy", "gpu_memset"])]
    launched = device["correlation"].isin(seen.events.loc[seen.events["category"] == "cuda_runtime", "correlation"])
    earlier, copy = device[~launched & (device["stream"] == 7)], device[launched & (device["stream"] == 22)].iloc[0]
    end = (earlier["start_ns"] + earlier["dur_ns"]).max()
    assert end - copy["start_ns"] == 14_000
    assert seen.overview()["start_ns"].tolist() == [end]
