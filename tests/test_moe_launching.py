"""Two real ranks compute what one would and send what was counted; whatever ends them, no process stays behind."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from effkit import models
from effkit.moe import launching, routing
from effkit.moe import rank as rank_module
from effkit.moe.launching import Ranks
from effkit.moe.recorded import read
from effkit.moe.setting import Setting

BASE = Setting(num_tokens=48, hidden=128, ffn=32, num_experts=8, top_k=2, skew=0.8)
SETTINGS = {
    "plain": BASE,
    "pieces": BASE.change(num_chunks=3, num_chunks_backward=2),
    "capacity": BASE.change(capacity_factor=1.0),
    "lsh": BASE.change(compress="lsh", num_clusters=8, num_chunks=2),
    "replicas": BASE.change(num_replicas=2),
    "pad": BASE.change(capacity_factor=1.25, pad=True),
    "float8": BASE.change(message_dtype="float8"),
    "forward": BASE.change(message_dtype="bfloat16", backward=False),
}
NUM_RANKS, NUM_STEPS = 2, 2
NAMES = list(SETTINGS)
LINKS = pytest.param("links", marks=pytest.mark.skipif(bool(launching.why_no_links()), reason=launching.why_no_links()))


def launch(settings, num_ranks, *, link_bytes_per_s=0.0, ranks_per_node=0, slow=None, backend="auto", **run):
    """Ranks for one run."""
    on = {"link_bytes_per_s": link_bytes_per_s, "ranks_per_node": ranks_per_node, "slow": slow, "backend": backend}
    with Ranks(num_ranks, **on) as ranks:
        return ranks.run(settings, **run)


@pytest.fixture(scope="module")
def run():
    return launch(list(SETTINGS.values()), NUM_RANKS, num_rounds=1, num_steps=NUM_STEPS, check=True)


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
    found = {process.pid: process for process in processes_of(folder) if "effkit.moe.forking" in process.cmdline()}
    return next((process for process in found.values() if process.ppid() not in found), None)


def ranks_of(folder: Path) -> dict[int, psutil.Process]:
    try:
        router = router_of(folder)
        ranks = sorted(router.children(), key=lambda process: process.pid) if router else []
        return dict(enumerate(rank for rank in ranks if "effkit.moe.forking" in rank.cmdline()))
    except psutil.Error:
        return {}


def nobody_is_left(folder: Path, patience_s: float = 5.0) -> bool:
    limit = time.monotonic() + patience_s
    while processes_of(folder) and time.monotonic() < limit:
        time.sleep(0.05)
    return not processes_of(folder)


# what the ranks did


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_routing(run, name):
    job, setting = NAMES.index(name), SETTINGS[name]
    for step in range(NUM_STEPS):
        expected = routing.traffic(setting, NUM_RANKS, step)
        assert np.array_equal(run.kept[job, step], expected.kept)
        assert np.array_equal(run.sent[job, step], expected.rows)
        assert np.array_equal(run.dropped[job, step], expected.dropped)
    if name in ("capacity", "pad"):
        assert any(run.dropped[job, step].sum() for step in range(NUM_STEPS))


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_rows_times_their_width(run, name):
    setting = SETTINGS[name]
    full, half, eighth = 4 * setting.hidden, 2 * setting.hidden, setting.hidden + 4
    first, rest = {"same": (full, full), "bfloat16": (half, half), "float8": (eighth, half)}[setting.message_dtype]
    for step in run.of_job(NAMES.index(name)):
        moved = routing.traffic(setting, NUM_RANKS, step.number).moved
        # counts of all experts go to all; backward, gradients go the other way round
        back = moved if setting.backward else np.zeros_like(moved)
        dispatch = 8 * setting.num_experts + moved * first + back.T * rest
        combine = moved.T * rest + back * rest
        for kind, expected in (("dispatch", dispatch), ("combine", combine)):
            sent = [
                np.sum([call.sent_bytes for call in rank.calls if call.kind == kind], axis=0) for rank in step.ranks
            ]
            came = [np.sum([c.received_bytes for c in rank.calls if c.kind == kind], axis=0) for rank in step.ranks]
            assert np.array_equal(sent, expected)
            assert np.array_equal(np.transpose(came), expected)
        pieces = sum(setting.degrees) if setting.backward else setting.degrees[0]
        assert [call.kind for call in step.ranks[0].calls].count("combine") == pieces


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_does(run, name):
    job, setting = NAMES.index(name), SETTINGS[name]
    for step in range(NUM_STEPS):
        seen = run.checks[job, step]
        alone = models.expert_parallel(
            setting.hidden, setting.ffn, setting.num_experts, setting.top_k, capacity_factor=setting.capacity_factor,
            pad=setting.pad, compress=setting.compress, num_hashes=setting.num_hashes,
            message_dtype=setting.message_dtype, device="cpu", seed=setting.seed,
        )  # fmt: skip
        for rank in range(NUM_RANKS):
            x = torch.from_numpy(routing.tokens(setting, rank, step)).requires_grad_(setting.backward)
            y = alone(x, torch.from_numpy(routing.scores(setting, rank, step)))
            assert seen[rank]["output"] == about(y)
            if setting.backward:
                y.sum().backward()
                assert seen[rank]["input_gradient"] == about(x.grad)
        if setting.backward:
            held = {int(e): value for one in seen for e, value in one["expert_gradients"].items()}
            assert sorted(held) == list(range(setting.num_experts))
            for e, value in held.items():
                assert value == about(alone.inner[str(e)].grad, alone.outer[str(e)].grad)


def about(*values: torch.Tensor):
    """Their projection, computed once more here, to what float32 and another order of sums leave uncertain."""
    flats = [value.detach().double().reshape(-1).numpy() for value in values]
    exact = sum(float(flat @ np.cos(np.arange(len(flat)))) for flat in flats)
    return pytest.approx(exact, abs=1e-5 * sum(float(np.linalg.norm(flat)) for flat in flats))


def test_every_step_is_there_on_one_clock(run):
    assert [(s.job, s.number) for s in run.steps] == [(j, n) for j in range(len(NAMES)) for n in range(NUM_STEPS)]
    for step in run.steps:
        begins = [rank.begin_ns for rank in step.ranks]
        assert max(begins) - min(begins) < min(rank.end_ns for rank in step.ranks) - min(begins)
        for rank in step.ranks:
            assert rank.begin_ns < rank.turn_ns <= rank.end_ns
            assert all(call.start_ns <= call.end_ns for call in rank.calls)
    assert (run.num_ranks, run.facts["ranks_per_node"], run.facts["link_bytes_per_s"]) == (2, 2, 0)


# how runs end


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_a_rank_that_is_killed_is_named(folder, kind):
    link = 1e8 if kind == "links" else 0.0

    def kill(done, total):
        if done and 1 in (ranks := ranks_of(folder)):
            ranks[1].kill()

    with pytest.raises(RuntimeError, match=r"rank 1 was ended by signal 9 \(SIGKILL\); the log is ") as error:
        launch([BASE], 2, num_rounds=2000, num_steps=2, link_bytes_per_s=link, progress=kill)
    assert nobody_is_left(folder)
    assert Path(str(error.value).rsplit(" ", 1)[1]).is_file()


def test_a_rank_that_hangs_ends_within_the_limit(folder):
    def stop(done, total):
        if done and 0 in (ranks := ranks_of(folder)):
            ranks[0].suspend()

    with Ranks(2) as ranks:
        ranks.run([BASE], num_rounds=1, num_steps=1)
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="the ranks were not done after 4 s and were ended; the log is "):
            ranks.run([BASE], num_rounds=5000, num_steps=2, timeout_s=4, progress=stop)
    assert time.monotonic() - start < 12
    assert nobody_is_left(folder)


def test_ranks_that_are_done_need_no_goodbye(folder):
    def stop_the_router(done, total):
        if done and (router := router_of(folder)):
            router.suspend()

    seen = launch([BASE], 2, num_rounds=1, num_steps=1, progress=stop_the_router, timeout_s=60)
    assert len(seen.steps) == 1
    assert nobody_is_left(folder)
    assert not list(folder.iterdir()), "the run's files are still there"


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_one_start_is_enough_for_several_runs(folder, kind):
    with Ranks(2, link_bytes_per_s=1e8 if kind == "links" else 0.0) as ranks:
        first = ranks.run([BASE], num_rounds=1, num_steps=1)
        router = router_of(folder)
        again = ranks.run([SETTINGS["pieces"], BASE], num_rounds=2, num_steps=1)
        assert router_of(folder) == router
        assert (first.kept[0, 0] == again.kept[1, 0]).all()
        assert [step.job for step in again.steps] == [0, 1, 0, 1]
        with pytest.raises(ValueError, match="cannot be shared equally by 2 ranks"):
            ranks.run([BASE.change(num_experts=3)])
        assert router_of(folder) == router, "what is refused before anything runs ends nothing"
    assert nobody_is_left(folder)
    assert not list(folder.iterdir())


def test_ranks_that_were_not_closed_end_with_the_interpreter(folder):
    code = ("from effkit.moe.launching import Ranks; from effkit.moe.setting import Setting; ranks = Ranks(2); "
            "ranks.run([Setting(num_tokens=8)], num_rounds=1, num_steps=1); print('done')")  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)}, capture_output=True,
                          text=True, timeout=120)  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
    assert not processes_of(folder)
    assert not list(folder.iterdir())


def test_a_callback_that_raises_ends_the_run(folder):
    def enough(done, total):
        if processes_of(folder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        launch([BASE], 2, progress=enough)
    assert nobody_is_left(folder)
    assert not list(folder.iterdir())


@pytest.mark.parametrize("kind", ["plain", LINKS])
def test_ranks_end_with_the_process_that_started_them(folder, kind):
    """Killed while the ranks are still importing: earlier than any of them could have asked to be told."""
    link = 1e8 if kind == "links" else 0.0
    code = ("from effkit.moe.launching import Ranks; from effkit.moe.setting import Setting; "
            f"Ranks(2, link_bytes_per_s={link}).run([Setting(num_tokens=8)], num_rounds=100000)")  # fmt: skip
    starter = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(folder)})
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
        (1, {}, "num_ranks is 2 to 8"),
        (9, {}, "num_ranks is 2 to 8"),
        (3, {}, "8 experts cannot be shared equally by 3 ranks"),
        (4, {"ranks_per_node": 3}, "ranks_per_node divides num_ranks; given: 3 and 4"),
        (2, {"link_bytes_per_s": -1.0}, "link_bytes_per_s is a rate"),
        (2, {"backend": "mpi"}, "backend is one of auto, gloo, nccl; given: 'mpi'"),
        (2, {"slow": {"sender": 0}}, "slow has bytes_per_s"),
        (2, {"slow": {"rank": 0, "sender": 1, "bytes_per_s": 1e6}}, "slow has bytes_per_s"),
        (2, {"slow": {"sender": 0, "receiver": 0, "bytes_per_s": 1e6}}, "two different ones for a link"),
        (2, {"slow": [None, {"rank": 2, "bytes_per_s": 1e6}]}, "slow names nodes 0 to 1"),
        (2, {"slow": {"rank": 1, "bytes_per_s": 0}}, "a rate above 0"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(folder, num_ranks, given, said):
    with pytest.raises(ValueError, match=said) as error:
        launch([BASE], num_ranks, **given)
    assert "\n" not in str(error.value)
    assert not list(folder.iterdir())


def test_nccl_wants_a_gpu_for_each_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"nccl needs a GPU for each of the 2 ranks; there are 1\. Use gloo"):
        launch([BASE], 2, backend="nccl")


def test_a_link_that_cannot_be_made_is_refused(monkeypatch):
    monkeypatch.setattr(launching, "why_no_links", lambda: "not permitted")
    with pytest.raises(ValueError, match="no slower link can be made here: not permitted"):
        launch([BASE], 2, link_bytes_per_s=1e8)
    with pytest.raises(ValueError, match="no slow link can be made here: not permitted"):
        launch([BASE], 2, slow={"rank": 1, "bytes_per_s": 1e6})


def test_a_folder_without_a_whole_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not hold a run"):
        read(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ValueError, match="lacks what rank 0 recorded"):
        read(tmp_path)
    (tmp_path / "rank0.json").write_text(json.dumps({"rank": 0, "num_ranks": 3}))
    with pytest.raises(ValueError, match=r"lacks what rank 1, 2 recorded \(3 ranks took part\)"):
        read(tmp_path)
    (tmp_path / "rank1.json").write_text("half a fi")
    with pytest.raises(ValueError, match="does not hold a run"):
        read(tmp_path)


class Wire:
    """Two ranks of NCCL, of which this process is one: calls return at once, and a message has arrived when the device
    has been waited for. The other's clock is ``ahead_ns`` ahead of ours, and it answers in ``_TAKES_S``."""

    _TAKES_S = 0.02

    def __init__(self, rank, ahead_ns):
        self.rank, self.ahead_ns, self.arrivals, self.stamps = rank, ahead_ns, [], []

    def get_rank(self):
        return self.rank

    def get_world_size(self):
        return 2

    def barrier(self):
        pass

    def send(self, tensor, _):
        self.stamps.append((int(tensor[0]), time.perf_counter_ns()))

    def recv(self, tensor, _):
        # the other one stamps the message half-way
        self.arrivals.append((tensor, time.perf_counter_ns() + round(self._TAKES_S * 1e9)))

    def synchronize(self):
        for tensor, at_ns in self.arrivals:
            time.sleep(max(0, at_ns - time.perf_counter_ns()) / 1e9)
            tensor[0] = at_ns - round(self._TAKES_S * 1e9 / 2) + self.ahead_ns
        self.arrivals.clear()


@pytest.fixture
def wired(monkeypatch):
    def to(ranks, ahead_ns=0):
        wire = Wire(ranks, ahead_ns)
        monkeypatch.setattr(rank_module, "dist", wire)
        monkeypatch.setattr(rank_module, "synchronize", wire.synchronize)
        monkeypatch.setattr(rank_module, "_PING_REPEATS", 3)
        return wire

    return to


def test_a_clock_is_read_when_a_message_has_arrived(wired):
    wired(1, ahead_ns=10**9)
    _, ahead, took = rank_module.clock_offset(torch.device("cpu"))
    assert took >= 20_000_000, "the round trip of a message that takes 20 ms"
    assert ahead == pytest.approx(-(10**9), abs=3_000_000)


def test_the_first_rank_stamps_a_message_after_it_came(wired):
    wire = wired(0)
    rank_module.clock_offset(torch.device("cpu"))
    begun = time.perf_counter_ns()
    assert len(wire.stamps) == 3
    gaps = [later - earlier for (earlier, _), (later, _) in zip(wire.stamps, wire.stamps[1:], strict=False)]
    assert min(gaps) >= 20_000_000, "each waits for the next message"
    assert all(begun - sent < 1_000_000_000 and sent - stamp < 5_000_000 for stamp, sent in wire.stamps)


def test_a_delay_lasts_until_the_message_is_there(wired, tmp_path):
    wired(1)
    delays = rank_module.probe_delays({"delays": 2, "timeout_s": 1}, tmp_path, torch.device("cpu"))
    assert [(around, sender) for around, sender, *_ in delays] == [(0, 0), (1, 0)]
    assert all(arrived - sent >= 9_000_000 for _, _, sent, arrived in delays), "sent 10 ms before"
