"""load() opens one file by what is in it, and knows of many which rank each is, or names the one that is none."""

import gzip
import json
import os
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import pytest

import effkit as ek
from effkit import progress_bar
from effkit.loading import fleet

PANES = "overview", "operators", "kernels", "collectives", "communication", "rank_pairs", "clocks"
ROUNDS, RANKS = 3, (0, 1, 2)


def complete(name, cat, ts, dur, tid=1, **args) -> dict:
    return {"ph": "X", "cat": cat, "name": name, "pid": 9, "tid": tid, "ts": ts, "dur": dur, "args": args}


def moment(ts, size, total, address) -> dict:
    args = {"Addr": address, "Bytes": size, "Total Allocated": total, "Device Type": 0, "Device Id": -1}
    return {
        "ph": "i",
        "s": "t",
        "cat": "cpu_instant_event",
        "name": "[memory]",
        "pid": 9,
        "tid": 1,
        "ts": ts,
        "args": args,
    }


def trace_of(rank: int, *, ahead_us: int = 0, info: dict | None = None) -> dict:
    """A rank that computes longer the higher it is, then reduces and exchanges: all leave together."""
    events = []
    for number in range(ROUNDS):
        start = 10_000 * number + ahead_us
        comes, leaves = start + 1000 + 500 * rank, start + 4000 + rank * (number - 1)  # a little apart, as real ones
        moved = {"Input Dims": [[256, 2]], "Input type": ["float"]}
        events += [
            complete(f"ProfilerStep#{number}", "user_annotation", start, 9000),
            complete("aten::linear", "cpu_op", start + 10, comes - start - 50, **moved),
            complete("aten::mm", "cpu_op", start + 20, comes - start - 90, **{"Input Dims": [[rank, 2]]}),
            moment(start + 30, 4096 * (rank + 1), 9000 + 4096 * (rank + 1), 64 * (number + 1)),
            moment(start + 8000, -4096 * (rank + 1), 9000, 64 * (number + 1)),
            complete("c10d::allreduce_", "cpu_op", comes - 20, 10, **moved),
            complete("gloo:all_reduce", "user_annotation", comes, leaves - comes, tid="worker 1", **moved),
            complete("c10d::alltoall_base_", "cpu_op", leaves + 10, 10,
                     **{"Concrete Inputs": ["", "", "", "[]", "[1, 2, 5]"]}),
            complete("gloo:all_to_all", "user_annotation", leaves + 100, 900, tid="worker 2", **moved),
        ]  # fmt: skip
    info = {"backend": "gloo", "rank": rank, "world_size": len(RANKS)} if info is None else info
    return {"schemaVersion": 1, "distributedInfo": info, "traceEvents": events, "traceName": "t.json"}


def write(path: Path, content: dict | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else json.dumps(content).encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return path


def folder_of_ranks(path: Path) -> Path:
    for rank in RANKS:
        write(path / f"{rank}.pt.trace.json.gz", trace_of(rank))
    return path


@pytest.fixture
def folder(tmp_path) -> Path:
    return folder_of_ranks(tmp_path / "run")


def panes(seen: ek.Capture) -> dict[str, pd.DataFrame]:
    return {pane: getattr(seen, pane)() for pane in PANES}


def same(one: dict, other: dict) -> None:
    for pane in PANES:
        if one[pane] is not None:
            pd.testing.assert_frame_equal(one[pane], other[pane])


def snapshot() -> bytes:
    block = {"address": 4096, "size": 512, "requested_size": 100, "state": "active_allocated", "frames": []}
    segment = {"device": 0, "address": 4096, "total_size": 512, "stream": 0, "blocks": [block]}
    events = [{"action": "segment_alloc", "size": 512}, {"action": "alloc", "size": 100}]
    events = [{"addr": 4096, "stream": 0, "time_us": 10**15, **event} for event in events]
    return pickle.dumps({"segments": [segment], "device_traces": [events]})


def test_one_file_is_known_by_its_content(kineto, seen, tmp_path):
    saved, plain = seen.save(tmp_path / "seen.zip").read_bytes(), ek.load(write(tmp_path / "plain.json", kineto))
    assert set(plain.events["name"]) >= {"aten::mm", "a name, with a comma"}
    assert plain.provenance["what"] == "plain.json"
    assert plain.memory().frame["value"].sum() > 0
    for name in ("a.txt", "b", "c.zip", "d.pickle", "e.json"):
        for content in (kineto, gzip.compress(kineto), b" \n" + kineto):
            pd.testing.assert_frame_equal(ek.load(write(tmp_path / name, content)).events, plain.events)
        pd.testing.assert_frame_equal(ek.load(write(tmp_path / name, saved)).events, seen.events)
        recorded = ek.load(str(write(tmp_path / name, snapshot())))
        assert recorded.memory().total == 100
        assert recorded.events.empty


def test_columns_and_stacks_are_those_asked_for(tmp_path):
    python = complete("f.py(3): g", "python_function", 1, 2)
    path = write(tmp_path / "a.json", {"traceEvents": [*trace_of(0)["traceEvents"], python]})
    assert set(ek.load(path).events) == {*ek.trace.EVENT_COLUMNS, "shapes", "dtypes", "inputs"}
    assert set(ek.load(path, columns=["shapes"]).events) == {*ek.trace.EVENT_COLUMNS, "shapes"}
    assert "left out: 1 events of Python functions (load with stacks=True)" in repr(ek.load(path))
    assert "python_function" in set(ek.load(path, stacks=True).events["category"])
    with pytest.raises(ValueError, match="no such column: shape; there are"):
        ek.load(path, columns=["shape"])


def test_ranks_are_those_of_the_metadata(folder):
    seen = ek.load(folder)
    assert seen.provenance["rank_from"] == "the traces' own metadata"
    assert seen.provenance["files"] == {str(rank): f"{rank}.pt.trace.json.gz" for rank in RANKS}
    assert seen.provenance["missing_ranks"] == []
    assert (seen.provenance["world_size"], seen.provenance["backend"]) == (3, "gloo")
    assert sorted(set(seen.overview().index.get_level_values("rank"))) == [0, 1, 2]
    turned = ek.load([folder / f"{rank}.pt.trace.json.gz" for rank in reversed(RANKS)])
    assert turned.provenance["files"] == seen.provenance["files"]
    same(panes(turned), panes(seen))


def test_else_of_the_names(tmp_path):
    for rank in (1, 2, 10):
        write(tmp_path / f"rank{rank}.json", trace_of(rank, info={"rank": 0, "world_size": 12}))
    seen = ek.load(tmp_path)
    assert seen.provenance["rank_from"] == "the files' names"
    assert list(seen.provenance["files"].values()) == ["rank1.json", "rank2.json", "rank10.json"]
    assert seen.overview().index.get_level_values("rank").unique().tolist() == [1, 2, 10]
    assert seen.provenance["missing_ranks"] == [0, 3, 4, 5, 6, 7, 8, 9, 11]
    assert "ranks 0, 3, 4, 5, 6, 7, 8, 9, … were not recorded" in repr(seen)


def test_else_of_the_order_in_which_people_count(tmp_path):
    for ahead_us, name in enumerate(("x10.json", "x2.json", "x²1.json")):
        write(tmp_path / name, trace_of(1, ahead_us=ahead_us, info={}))
    seen = ek.load(tmp_path)
    assert seen.provenance["rank_from"] == "the order of the files"
    assert seen.provenance["files"] == {"0": "x2.json", "1": "x10.json", "2": "x²1.json"}
    assert seen.provenance["missing_ranks"] == [], "nobody said how many there were"


GRIDS = {  # as SGLang and vLLM name the files of a run's processes
    "-TP-{}.trace.json.gz": [(0,), (2,), (10,)],
    "1764-TP-{}-DP-{}-EP-{}.trace.json": [(0, 0, 0), (1, 0, 1), (2, 1, 2), (10, 1, 3)],
    "dp{}_pp0_tp{}_dcp0_ep{}_rank{}.17641.pt.trace.json.gz": [(0, 0, 0, 0), (0, 1, 1, 1), (1, 0, 2, 0), (1, 1, 3, 1)],
}  # fmt: skip


@pytest.mark.parametrize(("name", "ranks"), zip(GRIDS, [[0, 2, 10], [0, 1, 2, 10], [0, 1, 2, 3]], strict=True))
def test_ranks_are_those_of_the_parallel_groups_that_engines_write_into_names(tmp_path, name, ranks):
    """By tensors where that tells all apart; else in the order of replicas, stages and tensors."""
    files = [name.format(*place) for place in GRIDS[name]]
    for ahead_us, file in enumerate(files):
        write(tmp_path / file, trace_of(1, ahead_us=ahead_us, info={"rank": 0, "world_size": 1}))
    provenance = ek.load(tmp_path).provenance
    assert provenance["rank_from"] == "the parallel groups in the files' names"
    assert provenance["files"] == dict(zip(map(str, ranks), files, strict=True))


@pytest.mark.parametrize("info", [{}, {"rank": 3, "world_size": 4}], ids=["no rank", "rank 3 twice"])
def test_stretches_of_one_process_are_one_capture(tmp_path, info):
    """tensorboard_trace_handler writes a file for each cycle of its schedule: one process, one after another."""
    for name, ahead_us in (("host_9.17642.pt.trace.json", 60_000), ("host_9.17641.pt.trace.json", 0)):
        write(tmp_path / name, trace_of(ahead_us // 60_000, ahead_us=ahead_us, info=info))
    seen, alone = ek.load(tmp_path), [ek.load(tmp_path / f"host_9.1764{number}.pt.trace.json") for number in (1, 2)]
    pd.testing.assert_frame_equal(seen.events, pd.concat([one.events for one in alone], ignore_index=True))
    assert set(seen.events["rank"]) == {info.get("rank", 0)}
    overview = seen.overview()
    assert overview.index.get_level_values("step").tolist() == list(range(2 * ROUNDS))
    assert overview["dur_ns"].tolist() == [each for one in alone for each in one.overview()["dur_ns"]]
    assert seen.operators()["calls"].sum() == sum(one.operators()["calls"].sum() for one in alone)
    assert len(seen.collectives()) == sum(len(one.collectives()) for one in alone)
    assert seen.memory().total == alone[1].memory().total == 2 * 4096, "the fullest stretch alone"
    assert "Capture of 2 stretches of one process, the memory of host_9.17642.pt.trace.json: 6 steps" in repr(seen)
    same(panes(ek.load(seen.save(tmp_path / "saved.zip"))), panes(seen))


@pytest.mark.parametrize("name", ["{}.json", "host_{}.17641.pt.trace.json"])
def test_files_of_no_rank_that_follow_one_another_are_not_ranks(tmp_path, name):
    for number, ahead_us in enumerate((0, 60_000)):
        write(tmp_path / name.format(number), trace_of(1, ahead_us=ahead_us, info={"rank": 0, "world_size": 1}))
    with pytest.raises(ValueError, match=r"0\S*json ends before \S*1\S* begins: .*Load one of them"):
        ek.load(tmp_path)
    assert len(ek.load(tmp_path / name.format(1)).overview()) == ROUNDS


def test_files_of_one_worker_that_ran_at_once_are_no_stretches(tmp_path):
    for number in (1, 2):  # of two containers, say, in which names and numbers of processes are the same
        write(tmp_path / f"host_9.1764{number}.pt.trace.json", trace_of(1, ahead_us=number, info={}))
    assert ek.load(tmp_path).provenance["rank_from"] == "the order of the files"
    for number in (1, 2):
        write(tmp_path / f"host_9.1764{number}.pt.trace.json", trace_of(number, ahead_us=60_000 * number))
    assert ek.load(tmp_path).provenance["rank_from"] == "the traces' own metadata"


def test_stretches_without_marks_are_not_joined_for_the_time_between_them_is_in_no_step(tmp_path):
    for number in (1, 2):
        run = trace_of(1, ahead_us=60_000 * number, info={})
        run["traceEvents"] = [event for event in run["traceEvents"] if "ProfilerStep" not in event["name"]]
        write(tmp_path / f"host_9.1764{number}.pt.trace.json", run)
    with pytest.raises(ValueError, match="they are stretches of one rank, or runs of their own"):
        ek.load(tmp_path)


def test_that_several_files_say_that_they_are_one_rank_is_said(tmp_path):
    for ahead_us, name in enumerate(("a.json", "b.json")):
        write(tmp_path / name, trace_of(1, ahead_us=ahead_us, info={"rank": 0, "world_size": 1}))
    assert "known from the order of the files, for several say that they are one rank" in repr(ek.load(tmp_path))


def test_ranks_that_never_ran_together_are_not_read_as_one_run(tmp_path):
    day_us = 86_400_000_000
    for rank in RANKS:
        write(tmp_path / f"rank{rank}.json", trace_of(rank, ahead_us=day_us * (rank == 2)))
    notes = ek.load(tmp_path).overview().attrs["notes"]
    assert any("rank 0 ends before rank 2 begins: these are no ranks of one run" in note for note in notes)
    assert len(ek.load([tmp_path / f"rank{rank}.json" for rank in (0, 1)]).overview().attrs["notes"]) == len(notes) - 1


def test_what_torchs_own_handler_writes_for_a_schedule_that_repeats(tmp_path):
    torch = pytest.importorskip("torch")
    cycles = torch.profiler.schedule(wait=0, warmup=1, active=1, repeat=2)
    handler = torch.profiler.tensorboard_trace_handler(str(tmp_path))
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, schedule=cycles, on_trace_ready=handler) as profiler:
        for _ in range(4):
            (torch.ones(8, 8) @ torch.ones(8, 8)).sum()
            profiler.step()
    assert len(list(tmp_path.iterdir())) == 2
    seen = ek.load(tmp_path)
    assert len(seen.steps) == len(seen.overview()) == 2
    assert seen.operators().loc["aten::matmul", "calls"] == 2


def test_a_rank_that_is_missing_is_named_and_not_imagined(folder):
    (folder / "1.pt.trace.json.gz").unlink()
    seen = ek.load(folder)
    assert seen.provenance["missing_ranks"] == [1]
    assert "ranks 1 were not recorded" in repr(seen)
    assert "ranks 1 were not recorded" in seen.communication().attrs["notes"][0]
    assert set(seen.collectives()["rank"]) == set(seen.clocks().index) == {0, 2}


def test_folders_lists_and_single_paths(folder, tmp_path):
    one = folder / "0.pt.trace.json.gz"
    assert not isinstance(ek.load(one), fleet.Fleet)
    assert list(ek.load([one]).provenance["files"]) == ["0"]
    write(folder / "notes.md", b"not a recording, and not looked at")
    same(panes(ek.load(folder)), panes(ek.load([one, *sorted(folder.glob("[12]*"))])))
    same(panes(ek.load([folder])), panes(ek.load(str(folder))))


def test_nothing_there(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    partly = [folder / "0.pt.trace.json.gz", tmp_path / "absent.json"]
    for path in (tmp_path / "absent", tmp_path / "empty", [], partly):
        with pytest.raises(FileNotFoundError, match=r"no capture at .*: give the path of"):
            ek.load(path)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"\x89PNG\r\n\x1a\n", "no traceEvents"), (b'{"distributedInfo": 3, "traceEvents": []}', "distributedInfo"),
     (b'{"distributedInfo": {"a":' + b"[" * 9999, "not a profiler trace"), (b"", "no traceEvents"),
     (b'{"traceEvents": [{"ts": "x"}]}', r"traceEvents\[0\]"), (b'{"traceEvents": [', "malformed|truncated")],
)  # fmt: skip
def test_a_bad_file_among_the_ranks_is_named(folder, content, words):
    write(folder / "7.pt.trace.json", content)
    with pytest.raises(ValueError, match=rf"(?s)7\.pt\.trace\.json.*({words})"):
        ek.load(folder).overview()


def test_a_damaged_compression_among_the_ranks_is_named(folder):
    path = folder / "1.pt.trace.json.gz"
    path.write_bytes(path.read_bytes()[:-8] + b"checksum")
    with pytest.raises(ValueError, match=r"1\.pt\.trace\.json\.gz: .*its compression is damaged"):
        ek.load(folder).overview()


def test_a_file_that_is_listed_twice_is_no_second_rank(folder, tmp_path):
    one = folder / "0.pt.trace.json.gz"
    (tmp_path / "link.json.gz").symlink_to(one)
    for paths in ([one, one], [folder, one], [one, tmp_path / "link.json.gz"], [one, folder / ".." / "run" / one.name]):
        with pytest.raises(ValueError, match=r"json\.gz is listed twice: give the file of each rank once"):
            ek.load(paths)


def test_events_in_two_parts_are_read_and_halves_not_dropped_in_silence(tmp_path):
    pairs = [{"ph": phase, "name": "a", "pid": 1, "tid": 1, "ts": ts} for phase, ts in (("B", 1), ("E", 2))] * 3
    seen = ek.load(write(tmp_path / "a.json", {"traceEvents": pairs}))
    assert seen.events["dur_ns"].tolist() == [1000] * 3
    assert "left_out" not in seen.provenance
    seen = ek.load(write(tmp_path / "b.json", {"traceEvents": [*pairs, *pairs[::2]]}))
    assert len(seen.events) == 3
    assert "left out: 3 begins or ends of events of which the other is not there (phases B and E)" in repr(seen)


def python(code: str, *arguments: object) -> str:
    done = subprocess.run([sys.executable, *map(str, (code, *arguments))], capture_output=True, text=True, timeout=120,
                          check=False, env=os.environ | {"PYTHONPATH": str(Path(ek.__file__).parents[1])})  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_neither_torch_nor_transformers_is_needed(folder, tmp_path):
    write(tmp_path / "snapshot.pickle", snapshot())
    script = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import effkit as ek
run, one, memory = (ek.load(path) for path in sys.argv[1:])
for seen in (run, one):
    for pane in {PANES}:
        getattr(seen, pane)()
    print(seen.memory().total, len(seen.memory_timeline()) > 0)
print(memory.memory().total)
"""
    out = python("-c", script, folder, folder / "0.pt.trace.json.gz", tmp_path / "snapshot.pickle")
    assert out.split() == [str(3 * 4096), "True", str(4096), "True", "100"]


def test_a_long_load_shows_its_progress_and_a_short_one_does_not(kineto, tmp_path, monkeypatch, capsys):
    path = tmp_path / "long.json"
    path.write_bytes(kineto)
    monkeypatch.setattr(progress_bar, "tqdm", partial(progress_bar.tqdm, file=sys.stderr))
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    ek.load(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_bar, "SLOW_S", -1.0)
    ek.load(path)
    assert f" of {path.stat().st_size:,}, 0 s (Ctrl-C stops it)" in (said := capsys.readouterr().err)
    assert "Reading long.json, 65,536" in said


def test_a_folder_of_folders_is_not_searched_but_they_are_named(tmp_path):
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"for instance of .*run"):
        ek.load(tmp_path)


def test_what_is_no_path_is_refused_in_a_sentence():
    with pytest.raises(TypeError, match="load\\(\\) takes a path or a list of paths; given: 3"):
        ek.load(3)
