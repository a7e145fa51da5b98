"""A study of files: rows of hand-written steps, bounds that are bounds, and what cannot be known said in words."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from child_ranks import end_well
from made_snapshots import Allocator, dump
from made_traces import event, launched, note, op, written

import effkit as ek
from effkit.advice import families
from effkit.advice.recorded_study import COPIES, NO_OPERATOR, RANKS
from effkit.trace.names import TODAY, WAITS

RECORDED = Path(os.environ.get("EFFKIT_RECORDED", Path(__file__).resolve().parents[2] / "shared" / "data"))
TRACES = sorted(RECORDED.glob("traces/**/*.json.gz"))
MISSING = pytest.mark.skipif(not TRACES, reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")


def step(number, start, end):
    return note(f"ProfilerStep#{number}", start, end)


def copied(call, start, end, correlation):
    return [event("cuda_runtime", "cudaMemcpyAsync", call, call + 1, correlation=correlation),
            event("gpu_memcpy", "Memcpy HtoD", start, end, correlation=correlation)]  # fmt: skip


def exchange(arrives, ends, at):
    """An all-reduce that this rank came to at ``arrives``."""
    kernel = "ncclDevKernel_AllReduce_Sum_f32(ncclDevKernelArgsStorage<4096ul>)"
    return [note("nccl:all_reduce", arrives - 1, arrives + 2), *launched(kernel, arrives, arrives, ends, at)]


def flat(*given):
    return [one for events in given for one in (events if isinstance(events, list) else [events])]


def one_step(*more):
    """1,000 us: products 300, elementwise 100, copies 50, loader 150, host and device idle 60, host between 340."""
    return flat(
        launched("earlier", -90, -60, -10, 90),  # outside of any operator, and of the step
        step(0, 0, 1000),
        note("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 150),
        op("aten::mm", 200, 210), *launched("gemm", 205, 210, 510, 1),
        op("aten::add", 510, 520), *launched("add", 515, 520, 620, 2),
        op("aten::copy_", 620, 625), *copied(621, 630, 680, 3),
        op("aten::view", 700, 745),
        *more,
    )  # fmt: skip


@pytest.fixture
def study(tmp_path):
    return ek.study(trace=written(tmp_path / "trace.json", one_step()))


def us(account):
    return {row: value / 1000 for row, value in account.frame["value"].items()}


def test_time_of_kernels_goes_to_families_and_the_rest_stays_as_it_is(study):
    account = study.overview().time
    assert us(account) == {
        families.PRODUCTS: 300, families.OTHER: 100, COPIES: 50, families.DATA: 150, "host busy, device idle": 70,
        families.HOST: 330,
    }  # fmt: skip
    assert (account.total, account.residual) == (1_000_000, 0)
    assert account.source == "the profiler's step marks"
    assert dict(account.frame["basis"])[families.PRODUCTS] == "derived"


def test_what_no_operator_launched_is_said(tmp_path):
    path = written(tmp_path / "trace.json", one_step(*launched("graph", 800, 800, 900, 8)))
    assert us(ek.study(trace=path).overview().time)[NO_OPERATOR] == 100


def test_without_a_device_operators_are_divided_and_nothing_is_zero(tmp_path):
    events = [step(0, 0, 100), op("aten::mm", 10, 70), op("aten::add", 70, 90)]
    overview = ek.study(trace=written(tmp_path / "trace.json", events)).overview()
    assert us(overview.time) == {families.PRODUCTS: 60, families.OTHER: 20, families.HOST: 20}
    assert any(sentence.startswith("what a device did: none was recorded") for sentence in overview.unseen)
    assert overview.ceilings.empty


def test_products_with_shapes_are_held_against_the_datasheet(tmp_path):
    weights = {"Input_Dims": [[1000, 2000], [2000, 3000]], "Input_type": ["c10::BFloat16"] * 2}
    events = flat(
        step(0, 0, 1000), op("aten::mm", 0, 10, **weights), launched("gemm", 5, 10, 510, 1),
        op("aten::mm", 2000, 2010, **weights), launched("gemm", 2005, 2010, 2510, 2),  # outside of the step
    )  # fmt: skip
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"deviceProperties": [{"name": "NVIDIA H200"}], "traceEvents": events}))
    page = ek.study(trace=path).overview()
    row = page.ceilings.loc["model FLOPs utilisation"]
    assert row["reached"] == pytest.approx(2 * 1000 * 2000 * 3000 / 1e-3)
    assert row["reached_frac"] == pytest.approx(12e12 / 989.5e12)
    assert not any("model FLOPs" in sentence for sentence in page.unseen)
    assert "1.2% of 990 TFLOP/s" in repr(page)
    path.write_text(json.dumps({"deviceProperties": [{"name": "a GPU"}], "traceEvents": events}))
    page = ek.study(trace=path).overview()
    assert page.ceilings.empty
    assert any(sentence.startswith("model FLOPs utilisation: no matrix product") for sentence in page.unseen)


def test_each_lever_is_bounded_by_its_row(study):
    advice = study.advise()
    bounds = {lever.kind: (lever.gain_frac, *lever.gain_band) for lever in advice}
    assert bounds == {
        "data loading": pytest.approx((0.15, 0, 0.15)), "launch gaps": pytest.approx((0.07, 0, 0.07)),
    }  # fmt: skip
    assert repr(advice[0]).startswith("more loader processes: saves at most 15%\n")
    assert repr(advice).startswith("Advice for time: together at most 22% less\n")
    assert [lever.kind for lever in advice] == ["data loading", "launch gaps"], "the largest first"
    assert "these are bounds, from a recording" in advice.notes[0]
    assert "num_workers" in advice[0].code
    with pytest.raises(RuntimeError, match="study a live model, not a recording"):
        advice[0].measure()
    with pytest.raises(RuntimeError, match="is a change of your code"):
        advice[0].apply()


def test_rows_below_a_twentieth_are_not_worth_a_word(tmp_path):
    events = [step(0, 0, 10_000), op("aten::mm", 100, 150), *launched("gemm", 110, 120, 9900, 1),
              note("enumerate(DataLoader)#x", 0, 90)]  # fmt: skip
    advice = ek.study(trace=written(tmp_path / "trace.json", events)).advise()
    assert not advice.levers
    assert "no row that a lever could shorten takes 5%" in advice.notes[0]


def wait(start, end):
    return event("cuda_runtime", "cudaStreamSynchronize", start, end)


def test_waits_save_no_more_than_the_device_idles_behind_them(tmp_path):
    """The device is done at 510, 620 and 680, and idles for 10, 10 and 320 us: 260 of waiting save 10 + 10 + 60."""
    waits = [wait(410, 510), wait(520, 620), wait(630, 690)]
    lever = {lever.kind: lever for lever in ek.study(trace=written(tmp_path / "a.json", one_step(*waits))).advise()}
    assert lever["synchronisation"].gain_band == pytest.approx((0, 0.08))
    assert lever["synchronisation"].found.startswith("the host waits for the device 3 times in a step")
    assert lever["synchronisation"].group == lever["launch gaps"].group


def test_numbers_asked_of_the_host_s_own_tensors_wait_for_nothing(tmp_path):
    asks = [op("aten::item", at, at + 8) for at in range(700, 990, 10)]
    asks += [op("aten::_local_scalar_dense", at + 1, at + 7) for at in range(700, 990, 10)]
    outside = [wait(-40, -10), wait(1005, 1100)]
    advice = ek.study(trace=written(tmp_path / "trace.json", one_step(*asks, *outside))).advise()
    assert {lever.kind for lever in advice} == {"data loading", "launch gaps"}


def test_communication_cannot_hide_under_more_than_there_is_to_compute(tmp_path):
    """200 us of products, 50 of which hide communication: of 700 us, 600 exposed, no more than 150 can go."""
    events = flat(step(0, 0, 900), op("aten::mm", 5, 10), launched("gemm", 6, 10, 210, 1), exchange(160, 810, 2))
    advice = ek.study(trace=written(tmp_path / "trace.json", events)).advise()
    lever = next(lever for lever in advice if lever.kind == "communication")
    assert lever.base.total - lever.predicted.low == 150_000
    assert lever.found == ("67% of a step is communication that no computation hides, and 17% of a step could run "
                           "under computation that hides none")  # fmt: skip
    assert lever.predicted.low >= 650_000, "communication alone is busy so long"


def test_what_first_launches_cost_is_left_out_of_a_steady_step(tmp_path):
    slow = [op("aten::mm", 685, 900), event("cuda_runtime", "cudaLaunchKernel", 690, 890, correlation=9),
            event("kernel", "sort", 895, 900, correlation=9), op("aten::view", 905, 960)]  # fmt: skip
    study = ek.study(trace=written(tmp_path / "trace.json", one_step(*slow)))
    account = study.overview().time
    assert (account.total, account.residual) == (800_000, 0)
    assert account.source == "the profiler's step marks, without first launches (200.0 us)"
    advice = study.advise()
    assert advice.notes[0].startswith("20% of the time is spent in first launches")
    assert {lever.kind: lever.gain_frac for lever in advice}["launch gaps"] == pytest.approx(90 / 800)


def test_of_a_recording_that_is_mostly_first_launches_nothing_is_advised(tmp_path):
    slow = [op("aten::mm", 685, 3900), event("cuda_runtime", "cudaLaunchKernel", 690, 3890, correlation=9),
            event("kernel", "sort", 3895, 3900, correlation=9)]  # fmt: skip
    events = [step(0, 0, 4000), *(one for one in one_step(*slow) if "Step" not in one["name"])]
    advice = ek.study(trace=written(tmp_path / "trace.json", events)).advise()
    assert not advice.levers
    (note,) = advice.notes
    assert note.startswith("80% of the time is spent in first launches")
    assert note.endswith("record after a warm-up")


def test_a_whole_window_is_not_called_a_step(tmp_path):
    study = ek.study(trace=written(tmp_path / "trace.json", [one for one in one_step() if "Step" not in one["name"]]))
    overview = study.overview()
    assert overview.time.title == "Time of the whole recording"
    assert overview.found[-1] == (
        "one rank, the whole recording: no step is marked; name an annotation that marks one with step="
    )
    assert all("of the whole recording" in lever.found for lever in study.advise())
    assert "a step" not in repr(study.advise())


def test_a_serving_engines_prefill_and_decode_are_studied_by_themselves(tmp_path):
    events = flat(
        note("step[EXTEND bs=2 toks=90]", 0, 100), op("aten::mm", 5, 20), launched("sgemm", 10, 15, 95, 1),
        *([note("step[DECODE bs=2]", at, at + 50), op("aten::mul", at + 2, at + 10),
           *launched("flash_fwd_kernel", at + 4, at + 10, at + 40, at)] for at in range(100, 400, 50)),
    )  # fmt: skip
    path = written(tmp_path / "trace.json", flat(*events))
    decode, prefill = ek.study(trace=path), ek.study(trace=path, step="prefill")
    assert (decode.overview().time.title, decode.overview().time.total) == ("Time of one step of decode", 50_000)
    assert us(decode.overview().time)[families.ATTENTION] == 30
    assert families.PRODUCTS not in decode.overview().time.frame.index
    assert "steps of prefill: study(..., step='prefill') looks at them" in decode.overview().unseen
    assert "of a step of decode" in decode.advise()[0].found
    assert (prefill.overview().time.title, prefill.overview().time.total) == ("Time of one step of prefill", 100_000)
    assert us(prefill.overview().time)[families.PRODUCTS] == 80


@pytest.fixture
def folder(tmp_path):
    """Two ranks of 1,000 us, of which 400 in an all-reduce: rank 0 waits 300 for rank 1. Two more have no file."""
    for rank, arrives in enumerate((500, 800)):
        events = flat(step(0, 0, 1000), op("aten::mm", 5, 10), launched("gemm", 6, 10, arrives - 10, 1),
                      exchange(arrives, 900, 2))  # fmt: skip
        written(tmp_path / f"rank{rank}.json", events, rank=rank, world=4)
    return tmp_path


def test_waiting_is_told_from_moving(folder):
    study = ek.study(trace=folder)
    overview = study.overview()
    ranks = overview.accounts[1]
    assert ranks.title == RANKS
    assert us(ranks)["other collectives waiting"] == 150, "the mean of 300 and 0"
    assert us(ranks)["other collectives moving"] == 100
    assert us(overview.time)[families.COMMUNICATION] == 250
    assert "2 of 4 ranks, one step each" in overview.found[-1]
    assert any(sentence.startswith("ranks 2, 3 were not recorded") for sentence in overview.unseen)
    gains = {lever.kind: lever.gain_band[1] for lever in study.advise()}
    assert gains["waiting for ranks"] == pytest.approx(0.15)
    assert gains["communication"] == pytest.approx(0.10)


def test_one_rank_of_many_shows_nobodys_waiting(folder):
    study = ek.study(trace=folder / "rank0.json")
    assert len(study.overview().accounts) == 1
    assert any("this is one rank; give a folder with all" in sentence for sentence in study.overview().unseen)
    assert {lever.kind for lever in study.advise()} == {"communication"}


def snapshot_of(path):
    allocator = Allocator()
    for size in (1 << 20, 1 << 18):
        allocator.allocate(size)
    path.write_bytes(dump(allocator.trace, segments=allocator.final()))
    return path


def test_memory_of_a_snapshot_beside_the_time_of_a_trace(tmp_path):
    trace, snapshot = written(tmp_path / "trace.json", one_step()), snapshot_of(tmp_path / "memory.pickle")
    study = ek.study(trace=trace, snapshot=snapshot)
    assert study.overview().memory.total == (1 << 20) + (1 << 18)
    assert study.what == "a recording, trace.json and memory.pickle"
    advice = study.advise("memory", budget_bytes=1 << 20)
    assert not advice.levers
    assert "cannot be predicted from files; the largest part of the peak of 1.2 MiB is" in advice.notes[0]
    assert advice.notes[1] == "the peak exceeds 1.0 MiB by 256.0 KiB"
    alone = ek.study(snapshot=snapshot)
    assert [one.unit for one in alone.overview().accounts] == ["bytes"]
    assert alone.advise().notes == ("time is not visible: no trace was given; give trace= as well",)
    with pytest.raises(ValueError, match=r"memory is not visible in this study: .*give snapshot="):
        _ = ek.study(trace=trace).overview().memory
    assert ek.study(trace=trace).advise("memory").notes[0].startswith("memory is not visible")


def test_files_of_the_other_kind_are_refused_in_one_sentence(tmp_path, folder):
    trace, snapshot = written(tmp_path / "trace.txt.json", one_step()), snapshot_of(tmp_path / "memory.pickle")
    with pytest.raises(ValueError, match=r"there are no events in memory\.pickle: trace= takes"):
        ek.study(trace=snapshot)
    with pytest.raises(ValueError, match=r"no memory is in trace\.txt\.json: snapshot= takes"):
        ek.study(snapshot=trace)
    with pytest.raises(FileNotFoundError, match="no capture at"):
        ek.study(trace=tmp_path / "nowhere")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    written(mixed / "rank0.json", one_step(), rank=0, world=2)
    written(mixed / "rank1.json", [step(0, 0, 100), op("aten::mm", 10, 70)], rank=1, world=2)
    with pytest.raises(ValueError, match="some of the ranks in mixed recorded a device and some did not"):
        ek.study(trace=mixed)


# What should be said first of each recording, checked by hand against its events; None: nothing
FIRST = {
    # DLRM: tiny kernels; the device idles for 4 of 14 ms while operators run, and a collective has 1 ms to hide under
    **dict.fromkeys((f"worker{rank}_step_12" for rank in range(4)), "launch gaps"),
    "Qwen_Qwen1": "launch gaps",  # 2.0 of 35 ms
    "google_owlv2-large-patch14-ensemble__1016001": "data loading",  # 0.6 of 1.2 s
    "rank-0": None,  # the device works for 97% of the time
    "rank-34": None,  # gloo alone, and nothing is computed that it could hide under
    "sampled_rank-0": "launch gaps",  # 118 of 615 ms; 72 of computation that hides no communication
    "sampled_rank-1": "launch gaps",
    "worker0": "data loading",  # 59 of 178 ms
    "sglang_Qwen3-8B_decode": None,  # 98% was launched by an earlier step, which was not recorded
    "sglang_Qwen3-8B_prefilldecode": None,
}


def could_free(path):
    """The most [us] that a lever of each kind could free in the whole file, by plain sums over its events."""
    with gzip.open(path) as file:
        events = [each for each in json.loads(file.read(), strict=False)["traceEvents"] if each["ph"] == "X"]
    times = {"data": [], "moving": [], "computing": [], "device": [], "waiting": [], "all": []}
    for each in events:
        category, name = TODAY.get(each["cat"], each["cat"]), each["name"]
        span = (float(each["ts"]), float(each["ts"]) + float(each.get("dur", 0)))
        moves = "nccl" in name.lower()
        kinds = {"all": category not in ("python_function", "Trace"), "data": name.startswith("enumerate(DataLoader)#"),
                 "moving": category == "kernel" and moves, "computing": category == "kernel" and not moves,
                 "device": category in ("kernel", "gpu_memcpy", "gpu_memset"),
                 "waiting": category.endswith(("_runtime", "_driver")) and bool(WAITS.search(name))}  # fmt: skip
        for kind, holds in kinds.items():
            times[kind] += [span] * holds
    total = {kind: sum(end - start for start, end in spans) for kind, spans in times.items()}
    window = max(end for _, end in times["all"]) - min(start for start, _ in times["all"])
    busy = us_covered(times["device"])
    return {
        "data loading": total["data"], "communication": min(total["moving"], total["computing"]),
        "launch gaps": window - busy, "synchronisation": min(total["waiting"], window - busy),
        "waiting for ranks": total["moving"],
    }  # fmt: skip


def us_covered(spans):
    covered, reach = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, reach))
        reach = max(reach, end)
    return covered


@MISSING
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name[:28])
def test_recordings_of_others_close_and_no_lever_saves_more_than_its_events_took(path):
    study = ek.study(trace=path)
    account = study.overview().time.closed(1e-4)
    assert (account.frame["value"] > 0).all()
    advice = study.advise()
    most = could_free(path) if len(advice) else {}
    for lever in advice:
        least, best = lever.gain_band
        assert 0 == least < lever.gain_frac == best <= 1
        assert study.num_steps * (lever.base.total - lever.predicted.total) / 1000 <= most[lever.kind] + 1
    assert (advice[0].kind if len(advice) else None) == FIRST[path.name.split(".")[0]]


# ranks that record themselves


def test_one_process_records_as_rank_0(tmp_path, one_thread):
    model, seen = torch.nn.Linear(8, 8), []

    def step(batch):
        seen.append(float(batch[0, 0]))
        model(batch).sum().backward()

    loader = [torch.full((4, 8), float(number)) for number in range(3)]
    path = ek.advice.record(tmp_path / "traces", step, loader, num_steps=3)
    assert path == tmp_path / "traces" / "rank0.pt.trace.json.gz"
    assert seen == [0, 1, 2, 0, 1], "two to warm up, three recorded, the loader begun again"
    study = ek.study(trace=path.parent)
    assert study.num_steps == 3
    assert families.PRODUCTS in study.overview().time.frame.index


def test_a_rank_is_told_by_its_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "3")
    assert ek.advice.record(tmp_path, lambda: torch.ones(4).sum(), num_steps=1).name == "rank3.pt.trace.json.gz"


def test_what_cannot_be_recorded_leaves_nothing_behind(tmp_path, monkeypatch):
    with pytest.raises(TypeError, match=r"step is a function step\(batch\), or .*; given: 3"):
        ek.advice.record(tmp_path, 3)
    with pytest.raises(ValueError, match="num_steps is a whole number from 1 on; given: 0"):
        ek.advice.record(tmp_path, print, num_steps=0)
    with pytest.raises(ValueError, match="the loader is empty"):
        ek.advice.record(tmp_path, print, [])

    def fails(*_):
        raise OSError("no room")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="no room"):
        ek.advice.record(tmp_path, lambda: torch.ones(4).sum(), num_steps=1)
    assert not list(tmp_path.iterdir())


RANK = """
import sys, time, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from effkit.advice import record
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[3], rank=rank, world_size=2)
model = torch.nn.Linear(16, 16)
fully_shard(model, mesh=dist.device_mesh.init_device_mesh("cpu", (2,)))
def step(batch):
    time.sleep(0.1 * rank)
    model(batch).sum().backward()
record(sys.argv[2], step, [torch.ones(4, 16)] * (2 + rank), num_steps=2)
dist.destroy_process_group()
"""


def test_two_ranks_of_a_model_in_shards_record_each_its_own(tmp_path):
    """The ranks alone: a launcher would only start them, after seconds of its own."""
    script, folder = tmp_path / "ranks.py", tmp_path / "traces"
    script.write_text(RANK)
    ranks = [subprocess.Popen([sys.executable, script, str(rank), folder, f"file://{tmp_path}/store"],
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT) for rank in (0, 1)]  # fmt: skip
    end_well(ranks, 100)
    assert sorted(path.name for path in folder.iterdir()) == [f"rank{rank}.pt.trace.json.gz" for rank in (0, 1)]
    study = ek.study(trace=folder)
    assert any(line.startswith("2 ranks, 2 steps each") for line in study.overview().found)
    waiting = study.overview().accounts[1].frame["value"]["other collectives waiting"]
    assert waiting > 20_000_000, "rank 0 waits for the other, which sleeps 100 ms; the mean of both"
    assert study.advise()[0].kind == "waiting for ranks"
    assert study.memory.total > 2 * 16 * 17 * 4 / 2, "the allocator's peak of a rank: its half of weights and gradients"
