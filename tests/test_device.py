"""The machine's ceilings: measured once, kept, and laid beside the datasheet of exactly this part."""

import json
import re
import time
from dataclasses import asdict, replace

import accelerators
import pytest
import torch

from effkit import device
from effkit.datasheets import DATASHEETS
from effkit.device import Device, fastest_ns, provenance

KNOWN = Device(
    name="NVIDIA H200",
    kind="cuda",
    num_threads=2,
    rate_flops_per_s={"float32": 50e12, "bfloat16": 700e12, "int8": 1e12},
    bandwidth_bytes_per_s=4.2e12,
    launch_overhead_ns=4_500,
    memory_bytes=141 * 10**9,
    torch_version="2.13.0",
    measured_on="2026-01-31",
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "effkit"


@pytest.fixture
def measured(monkeypatch):
    """Stands in for the measurement; its length says how often it was made."""
    calls = []

    def measure():
        calls.append(replace(KNOWN, launch_overhead_ns=len(calls) + 1))
        return calls[-1]

    monkeypatch.setattr(device, "_measure", measure)
    return calls


def test_the_second_call_does_not_measure(measured, cache):
    first = Device.here()
    assert Device.here() == first == measured[0]
    assert len(measured) == 1
    assert len(list(cache.iterdir())) == 1, "one file per machine, no temporary ones left"


def test_refresh_measures_again_and_is_kept(measured):
    Device.here()
    assert Device.here(refresh=True) == measured[1]
    assert Device.here() == measured[1]
    assert len(measured) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"3", b"\xff\xfe", b"{}", b'{"version": 2}', b'{"version": 2, "name": "x", "odd": 1}',
     json.dumps({"version": 1, **asdict(KNOWN)}).encode()],
)  # fmt: skip
def test_a_damaged_or_older_cache_file_is_measured_again(measured, cache, content):
    Device.here()
    (path,) = cache.iterdir()
    path.write_bytes(content)
    assert Device.here() == measured[1]
    assert Device.here() == measured[1], "and the good file is in its place again"
    assert len(measured) == 2


def test_other_threads_are_another_measurement(measured):
    before = torch.get_num_threads()
    Device.here()
    try:
        torch.set_num_threads(before + 1)
        Device.here()
    finally:
        torch.set_num_threads(before)
    assert len(measured) == 2


@pytest.fixture
def precision():
    before = torch.get_float32_matmul_precision()
    yield torch.set_float32_matmul_precision
    torch.set_float32_matmul_precision(before)


def test_rates_with_products_in_fewer_bits_are_kept_apart(measured, precision):
    precision("highest")
    plain = Device.here()
    precision("high")
    assert Device.here() == measured[1] != plain
    precision("highest")
    assert Device.here() == plain
    assert len(measured) == 2


@pytest.mark.parametrize(("name", "value"), [
    ("ONEDNN_MAX_CPU_ISA", "AVX2"), ("MKL_CBWR", "COMPATIBLE"), ("NVIDIA_TF32_OVERRIDE", "0"), ("HOME", None),
])  # fmt: skip
def test_what_libraries_read_from_the_environment_is_another_measurement(measured, monkeypatch, name, value):
    monkeypatch.delenv(name, raising=False)
    Device.here()
    monkeypatch.setenv(name, value or "/elsewhere")
    Device.here()
    assert len(measured) == (2 if value else 1)


def test_one_core_is_another_measurement_than_several(measured, monkeypatch):
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    Device.here()
    monkeypatch.setattr(device.os, "sched_getaffinity", lambda _: {0})
    Device.here()
    assert len(measured) == 2


def test_float32_in_fewer_bits_is_laid_beside_what_is_published_of_them():
    frame = replace(KNOWN, rate_flops_per_s={"float32": 400e12}, float32_precision="tf32").frame
    assert frame.loc["matrix rate float32 [FLOP/s]", "published"] == 494.5e12
    assert frame.loc["matrix rate float32 [FLOP/s]", "reached_frac"] < 1


def test_a_ceiling_on_an_accelerator_is_free_of_the_waits_for_it(monkeypatch):
    queue = accelerators.installed(monkeypatch, "cuda")

    def slowly():
        queue.synchronize()
        time.sleep(0.002)  # until the host has heard

    monkeypatch.setattr(torch.accelerator, "synchronize", slowly)
    assert fastest_ns(lambda: queue.give(0.001), seconds=0.2) == pytest.approx(1e6, rel=0.15), "of 3 ms with its wait"


def test_a_ceiling_on_the_cpu_is_that_of_the_quickest_runs():
    naps = iter([0.0, *[0.02, 0.005] * 99])
    assert fastest_ns(lambda: time.sleep(next(naps)), seconds=0.25) == pytest.approx(5e6, rel=0.4)


@pytest.mark.parametrize(("kind", "where"), [("cuda", "cuda"), ("xpu", "xpu"), ("mps", "cpu")])
def test_models_are_built_where_a_peak_is_counted(kind, where, monkeypatch):
    accelerators.installed(monkeypatch, kind)
    assert device.accelerator() == kind
    assert device.usual_device() == where
    assert (provenance()["device"] == "an accelerator") == (where != "cpu")


@pytest.mark.slow
def test_this_machine_is_measured_in_under_five_seconds():
    start = time.perf_counter()
    here = Device.here()
    assert time.perf_counter() - start < 5
    assert all(rate > 1e6 for rate in here.rate_flops_per_s.values())
    assert here.bandwidth_bytes_per_s > 1e6
    assert 0 < here.launch_overhead_ns < 10**7
    assert here.name in repr(here)


def named(name: str) -> Device:
    return replace(KNOWN, name=name)


@pytest.mark.parametrize(
    ("name", "sheet"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100"),
        ("AMD Instinct MI300X", "MI300X"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA B200", "B200"),
    ],
)
def test_a_known_part_finds_its_datasheet(name, sheet):
    assert named(name).datasheet is DATASHEETS[sheet]


@pytest.mark.parametrize(
    "name",
    [
        "AMD EPYC 7763 64-Core Processor",
        "Tesla T4",
        "",
        "NVIDIA L40S",
        "NVIDIA L40",
        "NVIDIA GB200",
        "NVIDIA A100-SXM4-40GB",
        "NVIDIA H100 PCIe",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
    ],
)
def test_a_part_we_hold_no_datasheet_of_has_none(name):
    assert named(name).datasheet is None


@pytest.mark.parametrize("sheet", DATASHEETS.values(), ids=lambda sheet: sheet.name)
def test_every_datasheet_says_where_and_when(sheet):
    assert sheet.source
    assert re.fullmatch(r"20\d\d-(0[1-9]|1[0-2])", sheet.date)
    assert {"float32", "bfloat16"} <= set(sheet.rate_flops_per_s)
    assert 1e11 < sheet.bandwidth_bytes_per_s < 1e14
    assert 1e9 < sheet.memory_bytes < 1e12


@pytest.mark.parametrize(
    ("name", "driver_mebibytes"),
    [("NVIDIA H200", 143_771), ("NVIDIA A100-SXM4-80GB", 81_920), ("NVIDIA H100 80GB HBM3", 81_559)],
)
def test_a_part_has_no_more_memory_than_its_datasheet_says(name, driver_mebibytes):
    frame = replace(KNOWN, name=name, memory_bytes=driver_mebibytes * 2**20).frame
    assert frame.loc["memory [B]", "reached_frac"] <= 1.05


def test_frame_lays_measured_beside_published():
    frame = KNOWN.frame
    assert list(frame) == ["measured", "published", "reached_frac", "source"]
    assert frame.index.name == "ceiling"
    assert frame.loc["memory bandwidth [B/s]", "reached_frac"] == pytest.approx(4.2 / 4.8)
    assert frame.loc["matrix rate float32 [FLOP/s]", "published"] == 67e12
    # what the datasheet does not say is absent
    assert frame.loc[["matrix rate int8 [FLOP/s]", "operator overhead [ns]"], "published"].isna().all()
    assert frame["source"].str.contains("2024-11").all()


def test_frame_without_a_datasheet():
    frame = named("a processor").frame
    assert frame["published"].isna().all()
    assert frame["reached_frac"].isna().all()
    assert (frame["source"] == "no datasheet held").all()


def test_provenance_says_where_and_with_what():
    assert list(provenance()) == ["device", "kind", "num_threads", "torch", "python", "date"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", provenance()["date"])
    assert json.loads(json.dumps(provenance())) == provenance()
