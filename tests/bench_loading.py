"""The timed bars of loading what others recorded, each beside its peer: ``make bench``.

The inputs are made from real recordings (``EFFKIT_RECORDED``): a trace of 1.6 million events, a run of 64 ranks, and a
memory snapshot of a million events. Each contender is a process of its own, taking turns; medians are compared.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import bench_table
import msgspec
import numpy as np
import pandas as pd
import psutil
import pytest
from peers import HERE, PYTHON, RECORDED, why_not
from test_loading import trace_of

GIB, MIB = 2**30, 2**20
# Of HTA's CPU time, of its peak memory, of torch-tb-profiler's CPU time. The first are what we aim at, and are printed;
# beyond the second a bench fails.
BARS, LIMITS = (0.09, 0.2, 0.13), (0.25, 0.6, 0.2)
RANK_CPU_BAR_S, RANKS_MEMORY_BAR, RANKS_MEMORY_LIMIT = 0.7, GIB, 2 * GIB
SMALL_RANK_CPU_BAR_S, SMALL_RANK_CPU_LIMIT_S = 0.005, 0.2
SNAPSHOT_CPU_BAR_S, SNAPSHOT_CPU_LIMIT_S = 5, 20
SNAPSHOT_MEMORY_BAR, SNAPSHOT_MEMORY_LIMIT = 700 * MIB, 2 * GIB
IMPORT_CPU_BAR_S, REPORT_CPU_BAR_S, REPORT_CPU_LIMIT_S = 0.4, 2.5, 20
NUM_COPIES, NUM_REPEATS, NUM_SMALL_RANKS = 12, 3, 500
NUM_RANKS, RANK_BYTES = 64, 35 * 10**6
NUM_SNAPSHOT_EVENTS = 1_000_000

OURS = "import sys, effkit as ek; seen = ek.load(sys.argv[1]); seen.overview(); seen.operators()"
RANKS = """
import sys, pandas, effkit as ek
seen = ek.load(sys.argv[1])
pandas.to_pickle((seen.overview(), seen.communication()), sys.argv[2])
"""
RANKS_ON_A_CLUSTER = """
import sys, pandas, effkit as ek
from dask.distributed import Client, LocalCluster
with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
    seen = ek.load(sys.argv[1], client=client)
    pandas.to_pickle((seen.overview(), seen.communication()), sys.argv[2])
"""
SNAPSHOT = """
import sys, effkit as ek
seen = ek.load(sys.argv[1])
seen.memory(), seen.memory_timeline(), seen.plot("memory_timeline").figure.savefig(sys.argv[2])
"""

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


class Cost(NamedTuple):
    cpu_s: float
    peak_bytes: float
    wall_s: float


def cost(*command: object) -> Cost:
    """What a command costs with its children: CPU time, the most memory that all of them held at once, wall time.

    Alone, a process is asked for its high-water mark (``ru_maxrss`` would start at ours). With children the memory of
    all is sampled, shared pages counted once; that stops them for a moment, so it is not done for one.
    """
    start, peak, pid = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile() as errors:
        process = psutil.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=errors)
        while not pid:
            children = process.children(recursive=True)
            peak = max(peak, high_water_mark(process.pid), held_together(process, *children) if children else 0)
            time.sleep(0.05)
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall_s = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        assert process.returncode == 0, errors.read().decode()[-2000:]
    return Cost(usage.ru_utime + usage.ru_stime, peak, wall_s)


def high_water_mark(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0  # it has ended and waits to be asked for its status


def held_together(*processes: psutil.Process) -> int:
    total = 0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.Error, ProcessLookupError):  # it ended meanwhile
            continue
    return total


def row(name: str, seen: Cost) -> None:
    print(f"  {name:<44}{seen.cpu_s:>9.1f} s{seen.peak_bytes / MIB:>11,.0f} MiB{seen.wall_s:>9.1f} s")


def medians(*command: object) -> Cost:
    return Cost(*map(statistics.median, zip(*(cost(*command) for _ in range(NUM_REPEATS)), strict=True)))


def head(title: str) -> None:
    print(f"\n\n{title}\n  {'':<44}{'CPU':>11}{'peak memory':>15}{'wall':>11}")


def trace(path: Path) -> dict:
    return msgspec.json.decode(gzip.decompress(path.read_bytes()))


def window(events: list[dict]) -> tuple[float, float]:
    """First start and last end [us] of what was recorded."""
    real = [event for event in events if event["ph"] == "X" and event["cat"] != "Trace"]
    return min(event["ts"] for event in real), max(event["ts"] + event["dur"] for event in real)


def later(event: dict, by_us: int) -> None:
    """Move an event to the next copy: its time, its step, and all that links it to others. Ids of 0 link to nothing."""
    event["ts"] = round(event["ts"] + by_us, 3)
    if event["name"].startswith("ProfilerStep#"):
        event["name"] = f"ProfilerStep#{int(event['name'].split('#')[1]) + 1}"
    for holder, keys in (
        (event, ("id",)),
        (event.get("args") or {}, ("correlation", "External id", "Ev Idx", "Python id", "Python parent id")),
    ):
        for key in keys:
            if holder.get(key):
                holder[key] += 10_000_000


def write_repeated(path: Path, recorded: dict, moves_us: list[int]) -> None:
    """Write a trace with its events as often as there are moves, each copy that much later than the one before."""
    events = recorded["traceEvents"]
    header = {key: value for key, value in recorded.items() if key != "traceEvents"}
    with path.open("wb") as file:
        file.write(msgspec.json.encode(header)[:-1] + b',"traceEvents":[')
        for copy, move_us in enumerate(moves_us):
            for event in events if move_us else ():
                later(event, move_us)
            file.write(b"," * bool(copy) + msgspec.json.encode(events)[1:-1])
        file.write(b"]}")


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Gigabytes, so gone with the last test: pytest would keep what it made in its last three runs."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def large_trace(folder) -> Path:
    recorded = trace(next((RECORDED / "traces" / "h100").glob("google_owlv2*")))
    start, end = window(recorded["traceEvents"])
    write_repeated(folder / "large.json", recorded, [0] + [int(end - start) + 1000] * (NUM_COPIES - 1))
    return folder / "large.json"


@pytest.fixture(scope="module")
def ranks(folder) -> Path:
    """64 ranks of one run: the four recorded ones over and over, each step up to 50 us later than theirs."""
    (folder / "ranks").mkdir()
    jitter = np.random.default_rng(0)
    files = sorted((RECORDED / "traces" / "dlrm_4_of_8_ranks").iterdir())
    windows = [window(trace(file)["traceEvents"]) for file in files]
    step_us = int(max(end for _, end in windows) - min(start for start, _ in windows)) + 1000
    num_copies = RANK_BYTES * len(files) // sum(len(msgspec.json.encode(trace(file))) for file in files)
    for rank in range(NUM_RANKS):
        recorded = trace(files[rank % len(files)])
        recorded["distributedInfo"] |= {"rank": rank, "world_size": NUM_RANKS}
        late = jitter.integers(0, 50, num_copies)
        write_repeated(folder / "ranks" / f"rank{rank}.json", recorded, [0, *(np.diff(late) + step_us).tolist()])
    return folder / "ranks"


@pytest.fixture(scope="module")
def snapshot(folder) -> Path:
    with (folder / "snapshot.pickle").open("wb") as file:
        pickle.dump(made_up_snapshot(np.random.default_rng(0)), file)
    return folder / "snapshot.pickle"


def made_up_snapshot(rng: np.random.Generator) -> dict:
    """A training run of torch's caching allocator: as many stacks, and as deep, as the recorded ones have."""
    slot_bytes, num_slots, base = 2**21, 4096, 2**45
    frames = [{"name": f"function_{i}", "filename": f"/train/file_{i % 40}.py", "line": i} for i in range(600)]
    stacks = [[frames[i] for i in rng.integers(0, 600, 24)] for _ in range(2000)]
    sizes = rng.integers(1, slot_bytes // 512, NUM_SNAPSHOT_EVENTS) * 512
    free, live = list(range(num_slots)), {}

    def entries() -> Iterator[dict]:
        def entry(action: str, slot: int, stack: list) -> dict:
            common = {"addr": base + slot * slot_bytes, "size": live[slot], "stream": 0, "time_us": 10**15 + number}
            return {"action": action, **common, "compile_context": "N/A", "user_metadata": "", "frames": stack}

        number = 0
        while number < NUM_SNAPSHOT_EVENTS:
            stack = list(stacks[number % len(stacks)])
            if free and (len(live) < 100 or rng.random() < 0.5):
                slot = free.pop()
                live[slot] = int(sizes[number])
                yield entry("alloc", slot, stack)
                number += 1
            else:
                slot = next(iter(live))
                for action in ("free_requested", "free_completed"):
                    yield entry(action, slot, stack)
                    number += 1
                free.append(slot)
                del live[slot]

    events = list(entries())
    blocks = [
        {
            "address": base + slot * slot_bytes,
            "size": slot_bytes,
            "requested_size": live.get(slot, 0),
            "state": "active_allocated" if slot in live else "inactive",
            "frames": stacks[slot % len(stacks)] if slot in live else [],
        }
        for slot in range(num_slots)
    ]
    held = {"total_size": num_slots * slot_bytes, "allocated_size": len(live) * slot_bytes}
    held |= {"active_size": held["allocated_size"], "requested_size": sum(live.values())}
    place = {"device": 0, "address": base, "stream": 0, "segment_type": "large", "segment_pool_id": (0, 0)}
    segment = place | held | {"is_expandable": False, "frames": [], "blocks": blocks}
    return {"segments": [segment], "device_traces": [events], "allocator_settings": {}, "external_annotations": []}


def test_a_large_trace(large_trace):
    contenders = {
        "effkit: load, overview, operators": (sys.executable, "-c", OURS, large_trace),
        "HTA: parse, temporal breakdown, overlap": (PYTHON, HERE / "hta_breakdown.py", "--time", large_trace),
        "torch-tb-profiler: parse": (PYTHON, HERE / "tb_breakdown.py", "--time", large_trace),
    }
    runs = {name: [] for name in contenders}
    for _ in range(NUM_REPEATS):
        for name, command in contenders.items():
            runs[name].append(cost(*command))
    head(f"a trace of {large_trace.stat().st_size / 10**6:.0f} MB, medians of {NUM_REPEATS}")
    ours, hta, tb = (Cost(*map(statistics.median, zip(*seen, strict=True))) for seen in runs.values())
    for name, seen in zip(contenders, (ours, hta, tb), strict=True):
        row(name, seen)
    ratios = ours.cpu_s / hta.cpu_s, ours.peak_bytes / hta.peak_bytes, ours.cpu_s / tb.cpu_s
    words = "CPU of HTA's", "memory of HTA's", "CPU of torch-tb-profiler's"
    for each, ratio, most in zip(words, ratios, BARS, strict=True):
        bench_table.row(f"395 MB trace, {each}", ratio, most, "x")
    assert all(ratio <= limit for ratio, limit in zip(ratios, LIMITS, strict=True))


def test_64_ranks(ranks, tmp_path):
    files = list(ranks.iterdir())
    head(f"{len(files)} ranks of {sum(file.stat().st_size for file in files) / len(files) / 10**6:.0f} MB")
    alone = cost(sys.executable, "-c", RANKS, ranks, tmp_path / "alone")
    row("load, overview, communication", alone)
    shared = cost(sys.executable, "-c", RANKS_ON_A_CLUSTER, ranks, tmp_path / "cluster")
    row("the same on a Dask cluster of 2 workers", shared)
    (overview, communication), theirs = (pd.read_pickle(tmp_path / name) for name in ("alone", "cluster"))
    pd.testing.assert_frame_equal(overview, theirs[0])
    pd.testing.assert_frame_equal(communication, theirs[1])
    assert overview.index.get_level_values("rank").nunique() == NUM_RANKS
    assert len(communication) == 2  # all-to-all and all-reduce
    bench_table.row("64 ranks of 36 MB, CPU a rank", alone.cpu_s / NUM_RANKS, RANK_CPU_BAR_S)
    bench_table.row("64 ranks of 36 MB, memory", alone.peak_bytes / MIB, RANKS_MEMORY_BAR / MIB, "MiB")
    assert alone.peak_bytes <= RANKS_MEMORY_LIMIT


def test_many_small_ranks(tmp_path):
    """What each of ten thousand takes, of fewer: their time is in proportion."""
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    recorded = json.dumps(trace_of(0))
    for rank in range(NUM_SMALL_RANKS):
        (ranks / f"rank{rank}.json").write_text(recorded.replace('"rank": 0', f'"rank": {rank}'))
    nothing = medians(sys.executable, "-c", "import effkit as ek; ek.load")
    seen = cost(sys.executable, "-c", RANKS, ranks, tmp_path / "seen")
    head(f"{NUM_SMALL_RANKS} ranks of {len(recorded) / 1000:.1f} kB")
    row("load, overview, communication", seen)
    each = (seen.cpu_s - nothing.cpu_s) / NUM_SMALL_RANKS
    bench_table.row("many small ranks, CPU a rank", each, SMALL_RANK_CPU_BAR_S)
    assert each <= SMALL_RANK_CPU_LIMIT_S


def test_the_import_and_a_report(tmp_path):
    recorded = trace(next((RECORDED / "traces" / "h100").glob("google_owlv2*")))
    recorded["traceEvents"] = recorded["traceEvents"][: 10**7 * len(recorded["traceEvents"]) // 33_000_000]
    write_repeated(tmp_path / "10_mb.json", recorded, [0])
    head(f"the shell, a trace of {(tmp_path / '10_mb.json').stat().st_size / 10**6:.0f} MB, medians of {NUM_REPEATS}")
    imported = medians(sys.executable, "-c", "import effkit")
    row("import effkit", imported)
    bench_table.row("import effkit, CPU", imported.cpu_s, IMPORT_CPU_BAR_S)
    report = medians(sys.executable, "-m", "effkit", "report", tmp_path / "10_mb.json")
    row("python -m effkit report", report)
    bench_table.row("effkit report of 10 MB, CPU", report.cpu_s, REPORT_CPU_BAR_S)
    assert report.cpu_s <= REPORT_CPU_LIMIT_S


def test_a_large_snapshot(snapshot, tmp_path):
    seen = cost(sys.executable, "-c", SNAPSHOT, snapshot, tmp_path / "timeline.png")
    head(f"a snapshot of {NUM_SNAPSHOT_EVENTS:,} events, {snapshot.stat().st_size / 10**6:.0f} MB")
    row("load, memory, memory_timeline, drawn", seen)
    bench_table.row("snapshot of 1M events, drawn, CPU", seen.cpu_s, SNAPSHOT_CPU_BAR_S)
    bench_table.row("snapshot of 1M events, memory", seen.peak_bytes / MIB, SNAPSHOT_MEMORY_BAR / MIB, "MiB")
    assert seen.cpu_s <= SNAPSHOT_CPU_LIMIT_S
    assert seen.peak_bytes <= SNAPSHOT_MEMORY_LIMIT
