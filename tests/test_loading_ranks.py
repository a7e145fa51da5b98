"""Many ranks are one Capture: its panes are those of all their events, wherever they were read, and it holds none."""

import pickle
from pathlib import Path

import pandas as pd
import pytest
from test_loading import RANKS, ROUNDS, folder_of_ranks, panes, python, same, trace_of, write

import effkit as ek
from effkit.loading import files, fleet


@pytest.fixture
def folder(tmp_path) -> Path:
    return folder_of_ranks(tmp_path / "run")


def test_the_panes_of_ranks_are_those_of_all_their_events(folder):
    seen = ek.load(folder)
    together = ek.Capture(seen.events, None, seen.provenance)
    same(panes(together), panes(seen))
    assert seen.overview().attrs == together.overview().attrs
    assert len(seen.overview()) == len(seen.steps) == len(RANKS) * ROUNDS
    assert len(seen.events) == sum(event["ph"] == "X" for rank in RANKS for event in trace_of(rank)["traceEvents"])
    for options in ({"by_shape": True}, {"by_shape": False}):
        pd.testing.assert_frame_equal(seen.operators(**options), together.operators(**options))
    assert len(seen.operators(by_shape=True)) == len(seen.operators()) + 2
    for step in ("ProfilerStep#1", "ProfilerStep#[01]"):
        pd.testing.assert_frame_equal(seen.overview(step), together.overview(step))
    with pytest.raises(ValueError, match="no annotation is called “forward”"):
        seen.overview("forward")


def test_waiting_is_for_the_last_and_bytes_are_those_of_the_splits(folder):
    calls = ek.load(folder).collectives()
    reduces = calls[calls["collective"] == "all_reduce"]
    assert (reduces["call"].groupby(reduces["call"]).size() == len(RANKS)).all()
    assert reduces.groupby("rank")["waiting_ns"].unique().map(list).to_dict() == {0: [10**6], 1: [500_000], 2: [0]}
    assert (reduces["size_bytes"] == 256 * 2 * 4).all()
    pairs = ek.load(folder).rank_pairs().set_index(["sender", "receiver"])
    assert pairs.loc[1, "size_bytes"].tolist() == [ROUNDS * 2048 // 8 * part for part in (1, 2, 5)]
    assert set(pairs["basis"]) == {"measured"}


def test_a_clock_that_is_ahead_is_found_and_set(folder):
    straight, ahead_ns = ek.load(folder).events, 7_777_777_000
    write(folder / "1.pt.trace.json.gz", trace_of(1, ahead_us=ahead_ns // 1000))
    seen = ek.load(folder)
    clock = seen.clocks().loc[1]
    assert clock["num_matched"] == 2 * ROUNDS
    assert abs(clock["offset_ns"] - ahead_ns) <= clock["spread_ns"] == 1000
    assert seen.clocks().loc[0].tolist() == [0, 0, 0]
    moved = (seen.events.groupby("rank")["start_ns"].min() - straight.groupby("rank")["start_ns"].min()).abs()
    assert moved.max() <= 1000, "events are on the clock of the first rank"
    together = ek.Capture(seen.events, None, seen.provenance)
    assert (together.clocks()["offset_ns"] == 0).all()
    same(panes(together) | {"clocks": None}, panes(seen) | {"clocks": None})


@pytest.fixture(scope="module")
def client():
    distributed = pytest.importorskip("dask.distributed")
    with (
        distributed.LocalCluster(n_workers=1, processes=False, dashboard_address=None) as cluster,
        distributed.Client(cluster) as client,
    ):
        yield client


def test_here_in_processes_and_on_a_cluster_are_the_same(folder, client, monkeypatch):
    here = panes(ek.load(folder))
    same(panes(ek.load(folder, client=client)), here)
    monkeypatch.setattr(fleet, "_ALONE_BYTES", 0)
    same(panes(ek.load(folder)), here)
    write(folder / "1.pt.trace.json.gz", trace_of(1) | {"traceEvents": [{"ts": "x"}]})
    for options in ({}, {"client": client}):
        with pytest.raises(ValueError, match=r"1\.pt\.trace\.json\.gz: not a profiler trace"):
            ek.load(folder, **options).overview()


def test_many_small_files_are_read_in_processes_too(tmp_path, monkeypatch):
    used = []
    monkeypatch.setattr("joblib.Parallel", lambda n_jobs, **_: used.append(n_jobs) or list)
    monkeypatch.setattr(fleet.os, "cpu_count", lambda: 2)
    for rank in range(40):
        write(tmp_path / f"rank{rank}.json", {"traceEvents": []})
    for paths in (tmp_path, [tmp_path / f"rank{rank}.json" for rank in range(8)]):
        assert len(ek.load(paths)._map(fleet.digest)) in (40, 8)
    assert used == [2, 1], "starting processes costs more than eight small files"


def test_a_plain_script_works_with_processes(folder, tmp_path):
    script = "import sys, effkit as ek\nfrom effkit.loading import fleet\nfleet._ALONE_BYTES = 0\n"
    script += "print(len(ek.load(sys.argv[1]).overview()))\n"
    out = python(write(tmp_path / "script.py", script.encode()), folder)
    assert out.split() == [str(len(RANKS) * ROUNDS)], "printed once: no worker runs the script again"


def test_saved_and_loaded_again_the_panes_are_the_same(folder, tmp_path):
    seen = ek.load(folder)
    again = ek.load(seen.save(tmp_path / "run.zip"))
    same(panes(again), panes(seen))
    assert again.provenance["files"] == seen.provenance["files"]
    for rank in RANKS:
        pd.testing.assert_frame_equal(again.memory(rank=rank).frame, seen.memory(rank=rank).frame)
        assert seen.memory(rank=rank).total == 4096 * (rank + 1)
    assert seen.memory().total == 4096 * len(RANKS), "the fullest rank"


def test_saved_captures_are_ranks_like_any_others(tmp_path):
    for rank in RANKS:
        one = ek.load(write(tmp_path / "run" / f"rank{rank}.json", trace_of(rank, info={})))
        one.save(tmp_path / "saved" / f"rank{rank}.zip")
    seen, again = ek.load(tmp_path / "run"), ek.load(tmp_path / "saved")
    same(panes(again), panes(seen))
    assert [again.memory(rank=rank).total for rank in RANKS] == [seen.memory(rank=rank).total for rank in RANKS]
    seen.save(tmp_path / "saved" / "rank3.zip")
    with pytest.raises(ValueError, match=r"rank3\.zip holds several ranks already"):
        ek.load(tmp_path / "saved").overview()


def test_no_event_stays_in_memory_for_the_panes(folder):
    seen = ek.load(folder)
    panes(seen)
    seen.memory()
    seen.memory_timeline()
    assert not {"events", "allocations", "segments", "_whole"} & set(vars(seen))
    assert len(pickle.dumps(vars(seen))) < 200_000, "what stays does not grow with the traces"
    assert len(seen.allocations) == len(RANKS) * ROUNDS
    assert seen.segments is None
    assert set(vars(seen)) > {"allocations", "_whole"}, "and they come when asked for"


def test_each_file_is_read_once_for_all_panes(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(fleet, "load_file", lambda path, *more: opened.append(path) or files.load_file(path, *more))
    seen = ek.load(folder)
    assert opened == []
    panes(seen)
    seen.plot("overview")
    assert len(opened) == len(RANKS)
    other = ek.load(folder)
    other.overview("ProfilerStep#*")
    panes(other)
    assert len(opened) == 3 * len(RANKS), "and once more for steps of another name"
