"""Two real ranks compute what one would, and send what was counted."""

import json
import time

import numpy as np
import pytest
import torch

from effkit import models
from effkit.moe import rank as rank_module
from effkit.moe import routing
from effkit.moe.live import WORK, run_settings
from effkit.moe.recorded import read
from effkit.moe.setting import Setting
from effkit.ranks.launching import Ranks

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


@pytest.fixture(scope="module")
def run():
    with Ranks(NUM_RANKS, WORK) as ranks:
        return run_settings(ranks, list(SETTINGS.values()), num_rounds=1, num_steps=NUM_STEPS)


@pytest.fixture(scope="module")
def computed():
    """What each rank computed, by setting and step."""
    jobs = [{"setting": setting.plain()} for setting in SETTINGS.values()]
    with Ranks(NUM_RANKS, "moe_check_work") as ranks:  # beside this file
        folder = ranks.run({"jobs": jobs, "num_steps": NUM_STEPS})
        seen = [json.loads((folder / f"rank{rank}.json").read_text())["seen"] for rank in range(NUM_RANKS)]
    return list(zip(*seen, strict=True))


# what the ranks did


@pytest.mark.parametrize("name", NAMES)
def test_counts_are_those_of_the_routing(run, name):
    job, setting = NAMES.index(name), SETTINGS[name]
    for step in range(NUM_STEPS):
        expected = routing.traffic(setting, NUM_RANKS, step)
        assert np.array_equal(run.kept[job, step], expected.kept)
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
def test_two_ranks_compute_what_one_does(computed, name):
    setting = SETTINGS[name]
    for step in range(NUM_STEPS):
        seen = computed[NAMES.index(name) * NUM_STEPS + step]
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


def test_one_start_is_enough_for_several_runs():
    with Ranks(2, WORK) as ranks:
        first = run_settings(ranks, [BASE], num_rounds=1, num_steps=1)
        again = run_settings(ranks, [SETTINGS["pieces"], BASE], num_rounds=2, num_steps=1)
    assert (first.kept[0, 0] == again.kept[1, 0]).all()
    assert [step.job for step in again.steps] == [0, 1, 0, 1]


# what cannot be


@pytest.mark.parametrize(
    ("num_ranks", "said"), [(3, "8 experts cannot be shared equally by 3 ranks"), (9, "num_ranks is 2 to 8")]
)
def test_ranks_that_cannot_share_the_experts_are_not_started(num_ranks, said, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(ValueError, match=said) as error, Ranks(num_ranks, WORK) as ranks:
        run_settings(ranks, [BASE])
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


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
