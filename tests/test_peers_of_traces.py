"""Our panes against Holistic Trace Analysis and torch-tb-profiler, on recordings that other people made.

Both answer in microseconds. HTA's window is all that the device did in a file, from its first event to its last; ours
is the steps. Where the two see different things, a test names the cause and takes it away.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from decimal import Decimal
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from peers import RECORDED, ask, end_all, why_not

import effkit as ek

DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
OLD_DEVICE = {"Kernel", "Memcpy", "Memset"}  # as torch before 1.13 called them
BUSY = ["kernel_ns", "exposed_communication_ns", "memcpy_ns"]
ALL_STEPS = ("--last-step", "--unrounded")  # HTA, by default, drops the last step and rounds inwards to microseconds
POINT = 0.01

RESNET, GLOO = "worker0", "rank-34"
DLRM = [f"worker{rank}_step_12" for rank in range(4)]
SEVERAL_STEPS = [RESNET, "rank-0", "sampled_rank-0", "sampled_rank-1"]
NANOSECONDS = ["google_owlv2-large-patch14-ensemble__1016001", "rank-0", "sglang_Qwen3-8B_decode",
               "sglang_Qwen3-8B_prefilldecode"]  # fmt: skip
QWEN = "Qwen_Qwen1"
EARLIER_WORK = [DLRM[1], DLRM[3], QWEN]
ON_DEVICE = [*DLRM, *SEVERAL_STEPS, *NANOSECONDS[:1], *NANOSECONDS[2:], QWEN]
TODAYS = [name for name in ON_DEVICE if name != RESNET]

pytestmark = [pytest.mark.slow, pytest.mark.skipif(why_not() is not None, reason=str(why_not()))]


@pytest.fixture(scope="module", autouse=True)
def peers_end():
    yield
    end_all()


@cache
def find(name: str) -> Path:
    (path,) = (RECORDED / "traces").rglob(f"{name}.*")
    return path


@cache
def load(name: str) -> ek.Capture:
    return ek.load(find(name))


@cache
def once(peer: str, path: Path, *options: str) -> dict:
    return ask(peer, path, *options)


def hta(name: str, *options: str) -> dict:
    return once("hta", find(name), *options)


def tb(name: str) -> dict:
    return once("tb", find(name))


def covered(starts, ends) -> int:
    """The time that the stretches cover together."""
    order = np.argsort(starts, kind="stable")
    starts, ends = np.asarray(starts)[order], np.asarray(ends)[order]
    first = np.flatnonzero(np.append(True, starts[1:] > np.maximum.accumulate(ends)[:-1]))
    return int((np.maximum.reduceat(ends, first) - starts[first]).sum())


def device(name: str) -> pd.DataFrame:
    events = load(name).events
    events = events[events["category"].isin(DEVICE)]
    return events.assign(end_ns=events["start_ns"] + events["dur_ns"])


def before_the_steps(name: str) -> pd.Series:
    """Which device events are work of a step before the first that was recorded."""
    return device(name)["end_ns"] <= load(name).overview()["start_ns"].min()


def read(name: str, **options) -> dict:
    return json.loads(gzip.decompress(find(name).read_bytes()), **options)


def rewritten(name: str, folder: Path, change) -> Path:
    """A copy of a recording of which every event has gone through ``change``; what it makes ``None`` is left out."""
    trace = read(name, parse_float=Decimal)
    trace["traceEvents"] = [event for each in trace["traceEvents"] if (event := change(each)) is not None]
    (folder / f"{name}.json").write_text(json.dumps(trace, default=float))
    return folder / f"{name}.json"


def without_earlier_work(name: str, folder: Path) -> Path:
    if not before_the_steps(name).any():
        return find(name)
    earlier = set(device(name).loc[before_the_steps(name), "correlation"])

    def kept(event):
        gone = event.get("cat") in DEVICE | OLD_DEVICE and event["args"]["correlation"] in earlier
        return None if gone else event

    return rewritten(name, folder, kept)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_idle_compute_and_overlap_are_those_of_hta(name, tmp_path):
    theirs = once("hta", without_earlier_work(name, tmp_path), *ALL_STEPS)
    (times,), (overlap,) = theirs["temporal"], theirs["overlap"]
    overview = load(name).overview().sum()
    here = device(name)[~before_the_steps(name)]
    window = here["end_ns"].max() - here["start_ns"].min()
    total_us = times["kernel_time(us)"]
    assert window == pytest.approx(1e3 * total_us, abs=1000)
    assert 1 - overview[BUSY].sum() / window == pytest.approx(times["idle_time(us)"] / total_us, abs=POINT / 100)
    assert overview["kernel_ns"] / window == pytest.approx(times["compute_time(us)"] / total_us, abs=POINT / 100)
    hidden, exposed = overview["hidden_communication_ns"], overview["exposed_communication_ns"]
    if hidden + exposed == 0:
        assert overlap["comp_comm_overlap_pctg"] is None
    else:
        theirs = overlap["comp_comm_overlap_pctg"] / 100
        assert hidden / (hidden + exposed) == pytest.approx(theirs, abs=POINT / 100)


@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_hta_sees_besides_is_work_of_an_earlier_step(name):
    """The device still runs what was launched before the first mark. We count from the mark on."""
    (times,) = hta(name, *ALL_STEPS)["temporal"]
    ours_ns = load(name).overview()[BUSY].sum().sum()
    earlier = device(name)[before_the_steps(name)]
    besides_ns = covered(earlier["start_ns"], earlier["end_ns"]) if len(earlier) else 0
    assert (name in EARLIER_WORK) == (besides_ns > 0)
    theirs_ns = 1e3 * (times["kernel_time(us)"] - times["idle_time(us)"])
    assert theirs_ns - ours_ns == pytest.approx(besides_ns, abs=1000)


@pytest.mark.parametrize("name", SEVERAL_STEPS)
def test_hta_leaves_out_the_last_step_unless_told(name):
    (times,) = hta(name, "--unrounded")["temporal"]
    overview = load(name).overview()
    ours = overview[BUSY].sum(axis="columns").iloc[:-1].sum(), overview["kernel_ns"].iloc[:-1].sum()
    assert 1e3 * (times["kernel_time(us)"] - times["idle_time(us)"]) == pytest.approx(ours[0], abs=1000)
    assert 1e3 * times["compute_time(us)"] == pytest.approx(ours[1], abs=1000)


def rounded_inwards_us(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of what the device did, as HTA has them: doubles, rounded up and down."""
    events = [event for event in read(name)["traceEvents"] if event.get("cat") in DEVICE]
    starts, lengths = (np.array([event[key] for event in events], dtype="float64") for key in ("ts", "dur"))
    return np.ceil(starts), np.floor(starts + lengths)


@pytest.mark.parametrize("name", NANOSECONDS)
def test_hta_rounds_kernels_inwards(name):
    """Up to a whole point of idle time that is not there, for kernels of a few microseconds."""
    (times,) = hta(name, "--last-step")["temporal"]
    theirs_us = times["kernel_time(us)"] - times["idle_time(us)"]
    assert theirs_us == covered(*rounded_inwards_us(name))
    too_little_us = load(name).overview()[BUSY].sum().sum() / 1e3 - theirs_us
    assert 0 < too_little_us < POINT * times["kernel_time(us)"]


def test_hta_crashes_on_a_kernel_that_it_rounds_to_less_than_nothing():
    assert hta(QWEN)["temporal"]["error"].startswith("AssertionError")
    starts, ends = rounded_inwards_us(QWEN)
    assert (ends < starts).any()


def test_hta_sees_no_communication_of_gloo():
    """Nothing at all of a run without a device, of which torch-tb-profiler and we see the gloo calls."""
    theirs = hta(GLOO)
    assert "error" in theirs["temporal"]
    assert theirs["overlap"][0]["comp_comm_overlap_pctg"] is None
    (step,), (_, ours) = tb(GLOO)["steps"], next(load(GLOO).overview().iterrows())
    assert ours["exposed_communication_ns"] == pytest.approx(1e3 * step["Communication"], abs=1)
    assert ours["idle_ns"] == pytest.approx(1e3 * step["Other"], abs=1)
    assert pd.isna(ours["kernel_ns"])


def test_the_overlap_of_each_rank_of_a_folder_is_that_of_hta():
    folder = find(DLRM[0]).parent
    overview = ek.load(folder).overview().groupby("rank").sum()
    moving = overview["exposed_communication_ns"] + overview["hidden_communication_ns"]
    theirs = {row["rank"]: row["comp_comm_overlap_pctg"] for row in ask("hta", folder)["overlap"]}
    assert (100 * overview["hidden_communication_ns"] / moving).to_dict() == pytest.approx(theirs, abs=POINT)


def test_the_steps_of_resnet_are_those_of_torch_tb_profiler():
    """To the nanosecond, but for the optimizer: what its operators leave of ``Optimizer.step`` is Python of the host.

    Profilers of that time called annotations operators, so the plugin takes all of it for CPU Exec.
    """
    overview = load(RESNET).overview()
    theirs = 1000 * pd.DataFrame(tb(RESNET)["steps"]).drop(columns=["step", "communication"])
    assert overview["dur_ns"].tolist() == theirs["Total"].tolist()
    assert overview["kernel_ns"].tolist() == theirs["Kernel"].tolist()
    assert overview["memcpy_ns"].tolist() == (theirs["Memcpy"] + theirs["Memset"]).tolist()
    assert overview["dataloader_ns"].tolist() == theirs["DataLoader"].tolist()
    on_the_host = overview["cpu_exec_ns"] + overview["not_visible_ns"]
    optimizer = on_the_host.to_numpy() - (theirs["Runtime"] + theirs["CpuOp"])
    assert (overview["idle_ns"].to_numpy() - theirs["Other"]).tolist() == (-optimizer).tolist()
    assert (-optimizer).tolist() == in_the_optimizer_alone(load(RESNET).events, overview)
    assert (-optimizer / theirs["Total"]).between(0, POINT).all()


def in_the_optimizer_alone(events: pd.DataFrame, overview: pd.DataFrame) -> list[int]:
    """Of each step, the time that nothing but an annotation of the optimizer covers [ns]."""
    counted = events["category"].isin([*DEVICE, "cpu_op", "cuda_runtime"]) | events["name"].str.startswith("enumerate")
    found = []
    for start, length in zip(overview["start_ns"], overview["dur_ns"], strict=True):
        starts = events["start_ns"].clip(start, start + length)
        ends = (events["start_ns"] + events["dur_ns"]).clip(start, start + length)
        either = counted | events["name"].str.startswith("Optimizer.")
        found.append(covered(starts[either], ends[either]) - covered(starts[counted], ends[counted]))
    return found


def operators_beside_theirs(name: str, theirs: dict) -> pd.DataFrame:
    """Our operators and theirs in one frame, times in nanoseconds."""
    peer = pd.DataFrame(theirs["operators"]).T.rename(columns=lambda column: column.removesuffix("_duration"))
    ours = load(name).operators().drop(index="not visible", errors="ignore")
    peer = peer.drop(index=[each for each in peer.index if each.startswith("nccl:")])  # annotations, not operators
    assert set(ours.index) == set(peer.index)
    times = peer.columns.drop("calls")
    return ours.join(peer.assign(**{time: 1000 * peer[time] for time in times}).add_prefix("their_"))


def test_the_operators_of_resnet_are_those_of_torch_tb_profiler():
    both = operators_beside_theirs(RESNET, tb(RESNET))
    for ours, theirs in (("calls", "calls"), *((f"{where}_{what}_ns", f"{where}_{what}") for where in ("host", "device")
                                               for what in ("self", "total"))):  # fmt: skip
        assert both[ours].tolist() == both[f"their_{theirs}"].tolist(), ours


@pytest.mark.parametrize("name", TODAYS)
def test_host_times_of_operators_are_those_of_torch_tb_profiler(name, tmp_path):
    """Given times that a double holds: at 1.7e15 us it resolves a quarter of one, and children outlast parents."""
    earliest = min(event["ts"] for event in read(name)["traceEvents"])
    path = rewritten(name, tmp_path, lambda event: event | {"ts": event["ts"] - int(earliest)})
    both = operators_beside_theirs(name, ask("tb", path))
    assert both["calls"].tolist() == both["their_calls"].tolist()
    assert ((both["host_total_ns"] - both["their_host_total"]).abs() <= 501).all()  # it rounds to microseconds


@pytest.mark.parametrize("name", ON_DEVICE)
def test_kernels_are_those_of_torch_tb_profiler(name):
    ours, theirs = load(name).kernels(), pd.DataFrame(tb(name)["kernels"]).T
    assert set(ours.index) == set(theirs.index)
    both = ours.join(theirs)
    assert both["calls"].tolist() == both["Calls"].tolist()
    assert ((both["total_ns"] - 1000 * both["Total Duration (us)"]).abs() <= 501).all()


@cache
def seen_in_our_folder(name: str) -> dict:
    """What torch-tb-profiler makes of the run folder that we write."""
    with tempfile.TemporaryDirectory() as folder:
        (theirs,) = ask("tb", load(name).tensorboard(folder).path)["workers"].values()
    return theirs


@pytest.mark.parametrize("name", TODAYS)
def test_torch_tb_profiler_is_blind_to_todays_launches_until_we_write_the_folder(name):
    """It knows the category ``Runtime`` and not ``cuda_runtime``, so no operator takes time on the device.

    With our folder it gives operators our times; only kernels of collectives it counts to annotations of c10d.
    """
    assert sum(row["device_self_duration"] for row in tb(name)["operators"].values()) == 0
    theirs = seen_in_our_folder(name)
    both = operators_beside_theirs(name, theirs)
    assert both["their_device_self"].sum() > 0
    apart = both["device_self_ns"] - both["their_device_self"]
    around_collectives = apart.index.str.startswith("c10d::") | (apart.index == "record_param_comms")
    assert (apart[~around_collectives].abs() <= 1000).all()
    annotated = [row for each, row in theirs["operators"].items() if each.startswith("nccl:")]
    theirs_us = sum(row["device_self_duration"] for row in annotated)
    assert apart[around_collectives].sum() == pytest.approx(1000 * theirs_us, abs=1000 * len(both))


@pytest.mark.parametrize("name", [name for name in TODAYS if not name.startswith("sglang")])
def test_steps_in_the_folder_that_we_write_are_ours(name):
    """Where steps are marked. Without marks, the plugin's only step leaves out what the device does beyond the host."""
    overview, theirs = load(name).overview(), pd.DataFrame(seen_in_our_folder(name)["steps"])
    # theirs ends with the first copy on another stream what an earlier step launched: 17 us of that, 2 of them idle
    total, idle = (17_000, 2_000) if name == DLRM[1] else (0, 0)
    assert (overview["dur_ns"] + total).tolist() == pytest.approx((1000 * theirs["Total"]).tolist(), abs=1000)
    assert (overview["idle_ns"] + idle).tolist() == pytest.approx((1000 * theirs["Other"]).tolist(), abs=1000)
