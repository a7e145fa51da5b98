"""The trace for Perfetto holds every event as it was, and what the panes know beside them."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pytest
from made_traces import capture_of, event, launched, note, op

import effkit as ek
from effkit.account import Account
from effkit.receipt import Receipt

DATA = Path(__file__).resolve().parents[1] / "data" / "captures"


@pytest.fixture
def step(tmp_path):
    moved = {"Input Dims": [[64]], "Input type": ["float"]}
    return capture_of(
        tmp_path,
        note("ProfilerStep#4", 0, 100),
        note("my range", 9, 41),
        op("aten::addmm", 11, 39, **{"Input Dims": [[2, 3], [3, 4]]}),
        launched("gemm", 12, 20, 50, correlation=1),
        note("nccl:_all_gather_base", 41, 45, **moved),
        launched("ncclDevKernel_AllGather", 42, 45, 70, correlation=2),
        event("gpu_memcpy", "Memcpy DtoH", 85, 90, correlation=9),
    )


def entries(path, phase):
    text = path.read_bytes()
    whole = json.loads(gzip.decompress(text) if path.suffix == ".gz" else text)
    return [one for one in whole["traceEvents"] if one["ph"] == phase]


@pytest.mark.parametrize("name", ["again.json", "again.json.gz"])
def test_loading_it_gives_the_same_events_row_for_row(step, tmp_path, name):
    again = ek.load(step.trace(tmp_path / name))
    pd.testing.assert_frame_equal(again.events, step.events)
    pd.testing.assert_frame_equal(again.overview(), step.overview())


def test_recorded_captures_come_back_too(tmp_path):
    text = ek.load(DATA / "text_amd-epyc.zip")
    pd.testing.assert_frame_equal(ek.load(text.trace(tmp_path / "text.json.gz")).events, text.events)
    ranks = ek.load(DATA / "moe_amd-epyc.zip")
    folder = ranks.trace(tmp_path / "ranks")
    assert sorted(path.name for path in folder.iterdir()) == [
        f"rank{rank}.json.gz" for rank in sorted(ranks.events["rank"].unique())
    ]
    pd.testing.assert_frame_equal(ek.load(folder).events, ranks.events)


def test_arrows_lead_from_launches_to_kernels(step, tmp_path):
    path = step.trace(tmp_path / "trace.json")
    ends = {phase: {one["id"]: one["ts"] for one in entries(path, phase)} for phase in "sf"}
    assert ends == {"s": {1: 12, 2: 42}, "f": {1: 20, 2: 45}}, "none for a copy whose launch was not recorded"


def test_communication_that_nothing_hides_is_counted(step, tmp_path):
    seen = [(one["ts"], one["args"]["exposed"]) for one in entries(step.trace(tmp_path / "trace.json"), "C")]
    assert seen == [(50, 1), (70, 0)], "until 50 a product runs"


def test_memory_is_counted_by_category_up_to_its_peak(tmp_path):
    capture = ek.load(DATA / "text_amd-epyc.zip")
    counted = [one for one in entries(capture.trace(tmp_path / "trace.json"), "C") if one["name"] == "memory of cpu"]
    level, peak = {}, 0
    moments = pd.DataFrame(counted).groupby("ts")["args"]
    for _, args in moments:
        for one in args:
            level |= one
        peak = max(peak, sum(level.values()))
    line = capture.memory_timeline()
    assert peak == line["allocated_bytes"].max()
    assert set(level) == set(capture.allocations["category"])


def test_receipts_stand_at_the_end(step, tmp_path):
    predicted = Account.of("Time", "ns", {"step": 100}, total=100, source="a model", low=90, high=110)
    receipt = Receipt(predicted, Account.of("Time", "ns", {"step": 105}, total=105, source="a clock"))
    (mark,) = entries(step.trace(tmp_path / "trace.json", receipts=[receipt]), "i")
    assert mark["name"] == receipt.sentence()
    assert mark["ts"] == 100


def test_a_folder_in_place_of_a_file_is_refused_in_a_sentence(step, tmp_path):
    with pytest.raises(IsADirectoryError, match=r"give the name of the file to write"):
        step.trace(tmp_path)
    assert not list(tmp_path.glob("*.part"))


def test_an_empty_capture_is_an_empty_trace(tmp_path):
    empty = ek.Capture(ek.load(DATA / "text_amd-epyc.zip").events[:0])
    assert json.loads(empty.trace(tmp_path / "empty.json").read_text())["traceEvents"] == []
