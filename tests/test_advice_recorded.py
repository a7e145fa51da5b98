"""A study of files: rows of hand-written steps, bounds that are bounds, and what cannot be known said in words."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from made_snapshots import Allocator, dump
from made_traces import event, launched, note, op, written

import effkit as ek
from effkit.advice import families
from effkit.advice.recorded_study import COPIES, NO_OPERATOR, RANKS

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


def test_each_lever_is_bounded_by_its_row(study):
    advice = study.advise()
    bounds = {lever.kind: (lever.gain_frac, *lever.gain_band) for lever in advice}
    assert bounds == {
        "data loading": pytest.approx((0.075, 0.015, 0.15)), "launch gaps": pytest.approx((0.035, 0.007, 0.07)),
    }  # fmt: skip
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


def test_waits_count_inside_of_the_step_alone(tmp_path):
    def with_waits(name, at):
        waits = [event("cuda_runtime", "cudaStreamSynchronize", start, start + 1) for start in at]
        return ek.study(trace=written(tmp_path / name, one_step(*waits)))

    many = with_waits("many.json", range(900, 916, 4)).advise()
    lever = next(lever for lever in many if lever.kind == "synchronisation")
    assert "waits for the device 4 times (cudaStreamSynchronize" in lever.found
    assert {one.group for one in many if one.kind in ("synchronisation", "launch gaps")} == {"idle device"}
    few = with_waits("few.json", [-20, -16, 900, 904, 908])
    assert "synchronisation" not in {one.kind for one in few.advise()}


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
    assert any(sentence.startswith("what ranks 2, 3 did") for sentence in overview.unseen)
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


@MISSING
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.name[:28])
def test_recordings_of_others_close(path):
    study = ek.study(trace=path)
    account = study.overview().time.closed(1e-4)
    assert (account.frame["value"] > 0).all()
    for lever in study.advise():
        least, most = lever.gain_band
        assert 0 < least < lever.gain_frac < most <= 1


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
    with pytest.raises(TypeError, match=r"step is a callable, step\(batch\); given: int"):
        ek.advice.record(tmp_path, 3)
    with pytest.raises(ValueError, match="num_steps is 1 or more; given: 0"):
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
from effkit.advice import record
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(16, 16))
def step(batch):
    time.sleep(0.1 * rank)
    model(batch).sum().backward()
record(sys.argv[1], step, [torch.ones(4, 16)] * (2 + rank), num_steps=2)
dist.destroy_process_group()
"""


def test_two_ranks_record_each_its_own(tmp_path):
    script, folder = tmp_path / "ranks.py", tmp_path / "traces"
    script.write_text(RANK)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, folder]
    launcher = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        said, _ = launcher.communicate(timeout=100)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
            launcher.wait()
    assert launcher.returncode == 0, said.decode()
    assert sorted(path.name for path in folder.iterdir()) == [f"rank{rank}.pt.trace.json.gz" for rank in (0, 1)]
    study = ek.study(trace=folder)
    assert study.overview().found[-1].startswith("2 ranks, 2 steps each")
    waiting = study.overview().accounts[1].frame["value"]["other collectives waiting"]
    assert waiting > 20_000_000, "rank 0 waits for the other, which sleeps 100 ms; the mean of both"
    assert study.advise()[0].kind == "waiting for ranks"
