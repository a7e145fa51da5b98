"""Ranks do what they are told, and whatever ends them, no process and no folder stays behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from effkit.ranks import launching
from effkit.ranks.launching import Ranks

WORK = "rank_work"  # beside this file
LINKS = pytest.param("links", marks=pytest.mark.skipif(bool(launching.why_no_links()), reason=launching.why_no_links()))
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parent), *sys.path]))}


def launch(num_meetings=1, num_ranks=2, *, failing=None, timeout_s=120.0, progress=None, **on):
    """Ranks for one run; what they saw, by rank."""
    with Ranks(num_ranks, WORK, **on) as ranks:
        run = {"num_meetings": num_meetings, "failing": failing}
        return seen_in(ranks.run(run, timeout_s=timeout_s, progress=progress))


def seen_in(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("rank*.json"))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where runs keep their files, so that their processes are known by it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path


def processes_of(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if any(str(folder) in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            pass
    return [process for process in found if process.pid != os.getpid()]


def router_of(folder: Path) -> psutil.Process | None:
    """The process that forks the ranks, and has their command line."""
    found = {process.pid: process for process in processes_of(folder) if "effkit.ranks.forking" in process.cmdline()}
    return next((process for process in found.values() if process.ppid() not in found), None)


def ranks_of(folder: Path) -> dict[int, psutil.Process]:
    try:
        router = router_of(folder)
        ranks = sorted(router.children(), key=lambda process: process.pid) if router else []
        return dict(enumerate(rank for rank in ranks if "effkit.ranks.forking" in rank.cmdline()))
    except psutil.Error:
        return {}


def nobody_is_left(folder: Path, patience_s: float = 5.0) -> bool:
    limit = time.monotonic() + patience_s
    while processes_of(folder) and time.monotonic() < limit:
        time.sleep(0.05)
    return not processes_of(folder)


# what ranks do


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_ranks_form_one_group_and_say_who_they_were(folder, kind):
    told = []
    seen = launch(50, 4, ranks_per_node=2, link_bytes_per_s=1e8 if kind == "links" else 0.0,
                  progress=lambda *so_far: told.append(so_far))  # fmt: skip
    assert [one["rank"] for one in seen] == [0, 1, 2, 3]
    assert {one["num_ranks"] for one in seen} == {4}
    assert {one["local_world_size"] for one in seen} == {2}
    assert {one["together"] for one in seen} == {200}
    assert told == sorted(told)
    assert max(done for done, _ in told) <= 50
    assert not list(folder.iterdir())


def test_a_rank_that_raises_is_named_with_its_error(folder):
    with pytest.raises(RuntimeError, match="rank 1 ended the run with ArithmeticError: this rank was told to fail"):
        launch(failing=1)
    assert nobody_is_left(folder)


def test_work_that_cannot_be_imported_is_named(folder):
    with pytest.raises(RuntimeError, match="could not be started: ModuleNotFoundError: No module named 'nowhere'"):
        Ranks(2, "nowhere").run({})
    assert nobody_is_left(folder)


# how runs end


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_a_rank_that_is_killed_is_named(folder, kind):
    link = 1e8 if kind == "links" else 0.0

    def kill(done, total):
        if done and 1 in (ranks := ranks_of(folder)):
            ranks[1].kill()

    with pytest.raises(RuntimeError, match=r"rank 1 was ended by signal 9 \(SIGKILL\); the log is ") as error:
        launch(10**6, link_bytes_per_s=link, progress=kill)
    assert nobody_is_left(folder)
    assert Path(str(error.value).rsplit(" ", 1)[1]).is_file()


def test_a_rank_that_hangs_ends_within_the_limit(folder):
    def stop(done, total):
        if done and 0 in (ranks := ranks_of(folder)):
            ranks[0].suspend()

    with Ranks(2, WORK) as ranks:
        ranks.run({"num_meetings": 1})
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="the ranks were not done after 2 s and were ended; the log is "):
            ranks.run({"num_meetings": 10**6}, timeout_s=2, progress=stop)
    assert time.monotonic() - start < 12
    assert nobody_is_left(folder)


def test_ranks_that_are_done_need_no_goodbye(folder, monkeypatch):
    monkeypatch.setattr(launching, "_GOODBYE_S", 1.0)

    def stop_the_router(done, total):
        if done and (router := router_of(folder)):
            router.suspend()

    seen = launch(2000, progress=stop_the_router, timeout_s=60)
    assert len(seen) == 2
    assert nobody_is_left(folder)
    assert not list(folder.iterdir()), "the run's files are still there"


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_one_start_is_enough_for_several_runs(folder, kind):
    with Ranks(2, WORK, link_bytes_per_s=1e8 if kind == "links" else 0.0) as ranks:
        first = seen_in(ranks.run({"num_meetings": 1}))
        router = router_of(folder)
        again = seen_in(ranks.run({"num_meetings": 3}))
        assert router_of(folder) == router
        assert [rank["together"] for rank in (*first, *again)] == [2, 2, 6, 6]
    assert nobody_is_left(folder)
    assert not list(folder.iterdir())


def test_ranks_that_were_started_are_ready_for_their_first_run(folder):
    with Ranks(2, WORK) as ranks:
        ranks.start(["wave"])
        started = router_of(folder)
        assert started is not None
        ranks.start()
        seen = seen_in(ranks.run({"num_meetings": 1, "failing": None}))
        assert len(seen) == 2
        assert router_of(folder) == started, "it is the one that was started"
    assert processes_of(folder) == []


def test_ranks_that_were_not_closed_end_with_the_interpreter(folder):
    code = ("from effkit.ranks.launching import Ranks; ranks = Ranks(2, 'rank_work'); "
            "ranks.run({'num_meetings': 1}); print('done')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT | {"TMPDIR": str(folder)}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert not processes_of(folder)
    assert not list(folder.iterdir())


def test_a_callback_that_raises_ends_the_run(folder):
    def enough(done, total):
        if processes_of(folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch(progress=enough)
    assert nobody_is_left(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_ranks_end_with_the_process_that_started_them(folder, kind):
    """Killed while the ranks are still importing: earlier than any of them could have asked to be told."""
    link = 1e8 if kind == "links" else 0.0
    code = ("from effkit.ranks.launching import Ranks; "
            f"Ranks(2, 'rank_work', link_bytes_per_s={link}).run({{'num_meetings': 10**9}})")  # fmt: skip
    starter = subprocess.Popen([sys.executable, "-c", code], env=ENVIRONMENT | {"TMPDIR": str(folder)})
    limit = time.monotonic() + 60
    while len(ranks_of(folder)) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    assert len(ranks_of(folder)) == 2
    starter.kill()
    starter.wait()
    assert nobody_is_left(folder)


def test_what_a_rank_said_before_it_could_write_is_found(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text(
        "Traceback (most recent call last):\n  File …\nModuleNotFoundError: No module named 'nowhere'\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError:\n  exitcode  : 1\n=====\n"
    )
    assert launching._why(tmp_path, log).endswith(
        "could not be started: ModuleNotFoundError: No module named 'nowhere'"
    )
    for rank, moment in ((0, 2.0), (1, 1.0)):
        (tmp_path / f"rank{rank}.error").write_text(json.dumps({"time": moment, "said": f"ended the run with {rank}"}))
    assert launching._why(tmp_path, log) == "rank 1 ended the run with 1"


# what cannot be


@pytest.mark.parametrize(
    ("num_ranks", "given", "said"),
    [
        (1, {}, "num_ranks is 2 to 8 on one machine; given: 1. On a cluster, start rank_work with torchrun"),
        (9, {}, "num_ranks is 2 to 8"),
        (4, {"ranks_per_node": 3}, "ranks_per_node divides num_ranks; given: 3 and 4"),
        (2, {"link_bytes_per_s": -1.0}, "link_bytes_per_s is a rate"),
        (2, {"backend": "mpi"}, "backend is one of auto, gloo, nccl; given: 'mpi'"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(folder, num_ranks, given, said):
    with pytest.raises(ValueError, match=said) as error:
        launch(1, num_ranks, **given)
    assert "\n" not in str(error.value)
    assert not list(folder.iterdir())


def test_a_run_that_is_refused_ends_no_ranks(folder, monkeypatch):
    with Ranks(2, WORK) as ranks:
        ranks.run({"num_meetings": 1})
        router = router_of(folder)
        monkeypatch.setattr(launching, "MOST_RANKS", 1)
        with pytest.raises(ValueError, match="num_ranks is 2 to 1"):
            ranks.run({"num_meetings": 1})
        assert router_of(folder) == router


def test_nccl_wants_a_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"nccl needs a GPU for each of the 2 ranks; there are 1\. Use gloo"):
        launch(backend="nccl")


def test_a_link_that_cannot_be_made_is_refused(monkeypatch):
    monkeypatch.setattr(launching, "why_no_links", lambda: "not permitted")
    with pytest.raises(ValueError, match="no slower link can be made here: not permitted"):
        launch(link_bytes_per_s=1e8)
