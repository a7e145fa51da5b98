"""measure() on two real ranks: rows against wall time, exact counts, barriers, traces, runs started elsewhere."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

import effkit as ek
from effkit import moe
from effkit.moe import routing

ROOT = Path(__file__).resolve().parents[1]
SETTING = moe.Setting(num_tokens=256, hidden=128, ffn=256, num_clusters=24)
QUICK = {"num_rounds": 2, "num_steps": 2, "timeout_s": 120}


@pytest.fixture(scope="module")
def traces(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


@pytest.fixture(scope="module")
def base(traces):
    return moe.measure(SETTING, levers=("lsh",), profile=traces, **QUICK)


def test_rows_explain_the_slowest_ranks_wall_time(base):
    # the ledger's figure is below 2%; here others may use the machine
    assert abs(base.residual) < 0.15 * base.total, base
    assert {"gate", "permute", "experts", "dispatch moving", "combine moving", "unpermute"} <= set(base.frame.index)
    assert (base.frame["value"] >= 0).all()
    assert set(base.frame["basis"]) == {"measured"}
    assert "2 ranks on cpu, gloo" in base.source or "cuda" in base.source


def test_bytes_and_copies_are_those_of_the_routing(base):
    guess = moe.predict(base, num_tokens=200, capacity_factor=0.9)
    found = moe.measure(base=base, num_tokens=200, capacity_factor=0.9, num_rounds=1)
    receipt = ek.Receipt(guess, found)
    exact = receipt.frame[receipt.frame["unit"].isin(["bytes", "tokens"])]
    assert (exact["error"] == 0).all(), receipt
    assert found.companions[2].frame.loc["dropped", "value"] > 0
    assert 0.4 < guess.total / found.total < 2.5
    assert moe.predict(found) is found, "at rest a prediction is what was measured"
    assert moe.predict(found, num_tokens=150).setting == found.setting | {"num_tokens": 150}
    assert "relative to the base" in found.source


def test_the_loads_are_kept_by_step_rank_and_expert(base):
    known = base.calibration
    assert known.loads.shape == (2, 2, 8)
    for step in range(2):
        assert (known.loads[step] == routing.traffic(SETTING, 2, step).kept).all()
    assert moe.imbalance(base).loc["rank", "max_over_mean"] >= 1


def test_barriers_tell_waiting_by_force(base):
    for second_look in range(2):  # where something else ran beside the first, or beside the base
        base = moe.measure(SETTING, **QUICK) if second_look else base
        met = moe.measure(SETTING, barriers=True, **QUICK)
        moving, forced = (one.frame["value"].filter(like="moving").sum() for one in (base, met))
        if 0.2 < forced / moving < 5:  # on loopback a meeting costs as much as what is moved
            break
    else:
        raise AssertionError(f"moving takes {forced / moving:.1f} times as long with barriers")
    assert met.calibration is None
    assert met.frame.loc["dispatch waiting", "value"] > 0


def test_the_profilers_trace_of_the_same_ranks_gives_the_same_account(base, traces):
    seen = ek.load(traces)
    account = moe.account(seen)
    sent = seen.collectives().query("collective == 'all_to_all'")
    # 2 steps under the profiler, each with 4 all-to-alls on 2 ranks
    assert len(sent) == 16
    rows = sum(routing.traffic(SETTING, 2, step).rows.sum() for step in range(2))
    assert sent["size_bytes"].sum() == 4 * rows * SETTING.hidden * 4
    assert account.frame.loc["dispatch moving", "value"] > 0
    assert account.frame.loc["combine moving", "value"] > 0
    hidden = account.companions[0].frame["value"].filter(like="hidden").sum()
    assert hidden < 0.2 * account.companions[0].total, "nothing overlaps in one piece"


def test_the_button_runs_ranks_and_shows_the_receipt(base):
    panel = moe.whatif(base, num_rounds=1)
    panel.controls["num_tokens"].value = 192
    receipt = panel.measure()
    assert receipt.frame.loc["Bytes between ranks in one step", "error"] == 0
    assert "Receipt: predicted" in panel.shown()
    assert len(routers()) == 1, "it stays up for the next press"
    panel.measure()
    assert len(routers()) == 1
    panel.close()
    assert not routers()


def routers():
    """Processes of this one that fork ranks."""
    return [child for child in psutil.Process().children() if "effkit.ranks.forking" in child.cmdline()]


def test_a_run_that_was_prepared_is_started_elsewhere_and_read(tmp_path):
    folder = tmp_path / "run"
    command = moe.prepare(folder, SETTING, num_ranks=2, num_rounds=1, num_steps=1)
    assert command.startswith("torchrun --nnodes 1 --nproc-per-node 2 -m effkit.moe.rank ")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", *shlex.split(command)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    account = moe.account(folder)
    assert account.setting["num_tokens"] == 256
    assert moe.predict(account, num_tokens=300).predicted
    (folder / "rank1.json").unlink()
    with pytest.raises(ValueError, match="lacks what rank 1 recorded"):
        moe.account(folder)
    with pytest.raises(ValueError, match="num_ranks is a multiple of num_nodes; given: 3 and 2"):
        moe.prepare(folder, num_ranks=3, num_nodes=2)


@pytest.mark.skipif(bool(moe.why_no_links()), reason=f"no slow link can be made here: {moe.why_no_links()}")
def test_on_a_slow_link_bytes_take_the_time_that_they_should():
    base = moe.measure(SETTING, link_bytes_per_s=20e6, **QUICK)
    moving = base.frame["value"].filter(like="moving").sum()
    sent = base.companions[1].total
    # an exchange takes its bytes over the rate, but who receives first leaves first
    assert 0.5 * sent / 20e6 < moving / 1e9 < 1.3 * sent / 20e6
    assert "a link of 20 MB/s" in base.source
    known = base.calibration.costs.moving
    assert known[1] == pytest.approx(1e9 / 20e6, rel=0.3), (
        "ns per byte: messages of 130 KB, of which a start-up is a part"
    )


def test_the_recording_that_comes_with_the_project_tells_waiting_from_moving():
    path = next((ROOT / "data" / "captures").glob("moe_*.zip"))
    account = moe.account(ek.load(path))
    assert abs(account.residual) < 0.05 * account.total, account
    shares = account.share
    assert shares[["dispatch moving", "combine moving"]].min() > 0.1
    assert shares[["dispatch waiting", "combine waiting"]].min() > 0.01
    assert shares["computing"] > 0.1
