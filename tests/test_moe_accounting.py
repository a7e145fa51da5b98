"""Where a recorded step of many ranks goes: exposed time alone, waiting told from moving, absent things absent."""

import gzip
import itertools
import json
import os
import statistics
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pandas as pd
import pytest
from made_traces import event, launched, note, op, written

import effkit as ek
from effkit.moe.accounting import UNSEEN, account

RECORDED = Path(os.environ.get("EFFKIT_RECORDED", Path(__file__).resolve().parents[2] / "shared" / "data"))
DLRM = RECORDED / "traces" / "dlrm_4_of_8_ranks"
OWN = next((Path(__file__).resolve().parents[1] / "data" / "captures").glob("alltoall_*.zip"))
COMMUNICATION = ("dispatch", "combine", "all-to-all", "other")
MOVING, WAITING = ([f"{kind} {phase}" for kind in ("all-to-all", "other collectives")]
                   for phase in ("moving", "waiting"))  # fmt: skip


def rows(given, unit_ns: int = 1000) -> dict[str, float]:
    """Its rows in microseconds."""
    return {name: value / unit_ns for name, value in given.frame["value"].items()}


def nccl(kind: str, arrives: float, ends: float, at: int, *, around: str = "") -> list[dict]:
    """One call of c10d: annotation (in another one), launch and kernel."""
    call = arrives - 5 if around else arrives
    kernel = {"all_to_all": "SendRecv", "all_reduce": "AllReduce_Sum_f32"}[kind]
    return [
        *([note(around, call - 3, call + 3)] if around else []),
        note(f"nccl:{kind}", call - 1, call + 2),
        *launched(f"ncclDevKernel_{kernel}(ncclDevKernelArgsStorage<4096ul>)", call, arrives, ends, correlation=at),
    ]


def step(number: int, start: float, end: float) -> dict:
    return note(f"ProfilerStep#{number}", start, end)


def folder_of(tmp_path: Path, *ranks: list, world: int | None = None) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    for rank, events in enumerate(ranks):
        flat = [one for given in events for one in (given if isinstance(given, list) else [given])]
        written(folder / f"rank{rank}.json", flat, rank=rank, world=world or len(ranks))
    return folder


def layer(late: float, ahead: float = 0) -> list:
    """A step of 1,000 us: dispatch 100..200, experts 150..300, combine 300..400 (``late`` more on its way), reduce."""
    a = ahead
    return [
        step(0, a, 1000 + a),
        nccl("all_to_all", 100 + late + a, 200 + a, 1, around="MoELayer.Dispatch"),
        launched("gemm", 110 + a, 150 + a, 300 + a, correlation=2),
        nccl("all_to_all", 300 + a, 400 + a, 3, around="combine"),
        event("gpu_memcpy", "Memcpy DtoD", 400 + a, 420 + a, correlation=9, bytes=8),
        nccl("all_reduce", 500 + a, 530 + a, 4),
    ]


def test_the_rows_are_exposed_time_and_close(tmp_path):
    seen = account(ek.load(folder_of(tmp_path, layer(0), layer(40, ahead=5_000))))
    # dispatch: rank 0 waits 40, then 60 move; 50 of them under the gemm. Rank 1 waits for nobody
    assert rows(seen) == {
        "dispatch waiting": 20, "dispatch moving": 10, "combine waiting": 0, "combine moving": 100,
        "other collectives waiting": 0, "other collectives moving": 30, "computing": 150, "copies": 20,
        "host and idle": 670, "not visible": 0, "step not begun or over": 0,
    }  # fmt: skip
    assert seen.closed().total == 1_000_000
    assert (seen.frame["basis"]["dispatch waiting"], seen.frame["basis"]["computing"]) == ("derived", "measured")
    assert rows(seen.companions[0]) == {
        "dispatch exposed": 30, "dispatch hidden": 50, "combine exposed": 100, "combine hidden": 0,
        "other collectives exposed": 30, "other collectives hidden": 0,
    }  # fmt: skip
    assert seen.companions[0].closed().total == 210_000
    assert seen.setting == {"num_ranks": 2, "world_size": 2, "missing_ranks": (), "num_steps": 1, "slowest_rank": 0,
                            "clock_spread_ns": 0, "notes": ()}  # fmt: skip
    assert seen.source == "the profiler's step marks, of rank 0, the slowest"


def test_what_hides_a_wait_is_taken_from_the_wait(tmp_path):
    early = [step(0, 0, 500), nccl("all_to_all", 100, 300, 1), launched("gemm", 90, 120, 180, correlation=2)]
    late = [step(0, 0, 500), nccl("all_to_all", 250, 300, 1)]
    seen = account(ek.load(folder_of(tmp_path, early, late)))
    assert rows(seen)["all-to-all waiting"] == (150 - 60) / 2
    assert rows(seen)["all-to-all moving"] == 50
    assert rows(seen.companions[0])["all-to-all hidden"] == 60 / 2


def test_a_moment_counts_once_and_moving_comes_before_waiting(tmp_path):
    ranks = [[step(0, 0, 500), nccl("all_to_all", 100, 200, 1), nccl("all_reduce", second, 300, 2)]
             for second in (150, 250)]  # fmt: skip
    seen = account(ek.load(folder_of(tmp_path, *ranks)))
    # rank 0: all-to-all moves 100..200, the other one waits 150..250 (of which 200..250 shows), moves 250..300
    assert {name: rows(seen)[name] for name in list(rows(seen))[:4]} == {
        "all-to-all waiting": 0, "all-to-all moving": 100, "other collectives waiting": 25,
        "other collectives moving": 50,
    }  # fmt: skip
    assert seen.closed().companions[0].closed()


def test_clocks_are_aligned_whether_files_are_read_one_by_one_or_as_one(tmp_path):
    folder = folder_of(tmp_path, layer(0), layer(40, ahead=5_000))
    parts = [ek.load(path) for path in sorted(folder.iterdir())]
    events = [one.events.assign(rank=rank) for rank, one in enumerate(parts)]
    together = ek.Capture(pd.concat(events, ignore_index=True), None, {"world_size": 2})
    assert rows(account(together)) == rows(account(ek.load(folder)))
    assert rows(account(ek.load(ek.load(folder).save(tmp_path / "saved.zip")))) == rows(account(ek.load(folder)))


def test_several_steps_give_their_mean_and_the_slowest_rank_is_slowest_on_average(tmp_path):
    events = [step(1, 0, 300), nccl("all_to_all", 10, 300, 1), step(2, 300, 600), nccl("all_to_all", 350, 600, 2)]
    # the host of rank 0 runs ahead: its first step lasts until what it launched has run
    seen = account(ek.load(folder_of(tmp_path, [step(1, 0, 100), *events[1:]], events)))
    assert seen.setting["num_steps"] == 2
    assert (seen.total, seen.residual) == (300_000, 0)
    assert rows(seen)["all-to-all moving"] == (290 + 250) / 2
    one = account(ek.load(tmp_path / "run"), step="ProfilerStep#2")
    assert rows(one)["all-to-all moving"] == 250
    assert one.source.startswith("the annotation “ProfilerStep#2”, of rank ")


def test_ranks_that_recorded_unlike_numbers_of_steps_are_said_so(tmp_path):
    calls = [nccl("all_to_all", 10, 90, 1), nccl("all_to_all", 110, 190, 2)]
    seen = account(
        ek.load(folder_of(tmp_path, [step(0, 0, 100), step(1, 100, 200), *calls], [step(0, 0, 100), *calls]))
    )
    assert any("unlike numbers of steps, 1 to 2" in said for said in seen.setting["notes"])
    assert "step not begun or over" not in rows(seen)


def test_clocks_that_hardly_agree_are_said_so(tmp_path):
    ranks = [[step(0, 0, 400), *(nccl("all_to_all", at, at + 80 + rank * late, i) for i, (at, late) in
              enumerate(((10, 0), (110, 18), (210, -18))))] for rank in (0, 1)]  # fmt: skip
    assert "the ranks' clocks agree to within 18.0 us only" in account(ek.load(folder_of(tmp_path, *ranks))).source


def test_a_rank_whose_step_begins_later_is_not_called_idle(tmp_path):
    late = [step(0, 400, 1000), nccl("all_to_all", 500, 600, 1)]
    early = [step(0, 0, 1000), nccl("all_to_all", 100, 600, 1)]
    seen = account(ek.load(folder_of(tmp_path, early, late)))
    assert rows(seen)["step not begun or over"] == 200
    assert rows(seen)["all-to-all waiting"] == 200
    assert (seen.total, seen.residual) == (1_000_000, 0)


def test_one_rank_shows_nobodys_waiting(tmp_path):
    seen = account(ek.load(folder_of(tmp_path, layer(0), world=4) / "rank0.json"))
    assert not any(name.endswith(("waiting", "moving")) for name in rows(seen))
    assert rows(seen)[f"dispatch {UNSEEN}"] == 50
    assert rows(seen)[f"combine {UNSEEN}"] == 100
    assert "only rank 0 was recorded: who waits for whom is not visible" in seen.source
    assert seen.setting["missing_ranks"] == (1, 2, 3)
    assert "step not begun or over" not in rows(seen)
    assert seen.closed().residual == 0


def test_calls_and_ranks_that_are_missing_are_said_so(tmp_path):
    more = [*layer(0), nccl("all_reduce", 700, 750, 6)]
    seen = account(ek.load(folder_of(tmp_path, more, layer(40), world=4)))
    assert rows(seen)[f"other collectives {UNSEEN}"] == (30 + 50 + 30) / 2
    assert "other collectives waiting" not in rows(seen)
    assert rows(seen)["dispatch waiting"] == 20
    assert any("could not be matched" in said for said in seen.setting["notes"])
    assert "ranks 2, 3 were not recorded: waiting for them counts as moving" in seen.source


def deep_ep(late: float) -> list:
    """DeepEP: its ranks wait for one another in the kernels that notify; c10d knows nothing of it."""
    names = [
        ("void deep_ep::layout::get_dispatch_layout<256, 32, 8>(long const*, int*)", 50, 60),
        ("void deep_ep::intranode::notify_dispatch<8>(int const*, int*)", 100 + late, 200),
        ("void deep_ep::intranode::dispatch<8, 768, 8192>(int4*, float*)", 200, 260),
        ("void deep_ep::internode::cached_notify<false>(int, int)", 300 + late, 400),
        ("void deep_ep::internode::combine<false, 8, __nv_bfloat16>(int4*)", 400, 480),
        ("void deep_ep::intranode::cached_notify_combine<8>(void**)", 500, 510),
    ]
    return [step(0, 0, 1000),
            *(launched(name, at - 5, at, end, correlation=at) for name, at, end in names)]  # fmt: skip


def test_deep_ep_waits_where_it_notifies(tmp_path):
    seen = account(ek.load(folder_of(tmp_path, deep_ep(0), deep_ep(60))))
    assert rows(seen) == {
        "dispatch waiting": 30, "dispatch moving": 40 + 60, "combine waiting": 30, "combine moving": 40 + 80 + 10,
        "computing": 10, "copies": 0, "host and idle": 700, "not visible": 0, "step not begun or over": 0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kernel", "around", "kind"),
    [
        ("void uccl::internode_ll::combine<true>(void*)", "", "combine"),
        ("void tensorrt_llm::kernels::moe_comm::moeA2ADispatchKernel<8>(int)", "", "dispatch"),
        ("void nvshmemi_alltoall_on_stream_kernel(int)", "", "all-to-all"),
        ("void nvshmemi_alltoall_on_stream_kernel(int)", "moe_combine", "combine"),
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "", "other collectives"),  # or of a pipeline
        ("ncclDevKernel_SendRecv(ncclDevKernelArgsStorage<4096ul>)", "token_dispatcher.token_dispatch", "dispatch"),
        ("void deep_ep::internode_ll::dispatch<true, 7168>(void*)", "combine", "dispatch"),  # the kernel knows better
        ("void nvshmemi_alltoall_on_stream_kernel(int)", "dispatch_and_combine", "all-to-all"),
    ],
)
def test_kernels_tell_their_direction_by_name_or_by_the_annotation_around_the_launch(tmp_path, kernel, around, kind):
    events = [step(0, 0, 100), *([note(around, 5, 30)] if around else []), launched(kernel, 10, 20, 60, correlation=1)]
    seen = account(ek.load(folder_of(tmp_path, events)))
    assert [name for name in rows(seen) if name.startswith(COMMUNICATION)] == [f"{kind} {UNSEEN}"]
    assert rows(seen)[f"{kind} {UNSEEN}"] == 40


def test_on_a_host_operators_compute(tmp_path):
    """Gloo works on a thread of its own, under the operators of the main one."""
    main = [step(0, 0, 100), note("dispatch", 5, 12), op("c10d::alltoall_base_", 6, 8), op("aten::mm", 40, 90)]
    ranks = [[*main, note("gloo:all_to_all", arrives, 60, thread=5)] for arrives in (7, 27)]
    seen = account(ek.load(folder_of(tmp_path, *ranks)))
    assert rows(seen) == {"dispatch waiting": 10, "dispatch moving": 13, "computing": 50, "host and idle": 27,
                          "step not begun or over": 0}  # fmt: skip
    assert seen.closed().residual == 0
    assert rows(seen.companions[0]) == {"dispatch exposed": 23, "dispatch hidden": 20}


def test_errors_say_what_to_do(tmp_path):
    alone = ek.load(written(tmp_path / "a.json", [op("aten::mm", 0, 1)]))
    with pytest.raises(ValueError, match=r"no collective is in this capture.*load the files of all of them"):
        account(alone)
    with pytest.raises(ValueError, match=r"2 collectives .* the kernels of none.*ProfilerActivity.CUDA"):
        account(ek.load(folder_of(tmp_path, *[[note("nccl:all_to_all", 0, 9)]] * 2)))
    with pytest.raises(TypeError, match=r"account\(\) takes a Capture.*given: int"):
        account(3)
    with pytest.raises(ValueError, match="no annotation is called “layer”"):
        account(ek.load(OWN), step="layer")


def test_a_device_on_some_ranks_only_is_refused(tmp_path):
    host = [step(0, 0, 1000), note("gloo:all_to_all", 0, 9)]
    with pytest.raises(ValueError, match="rank 1 recorded no device activity"):
        account(ek.load(folder_of(tmp_path, layer(0)[1:], host)))


def test_the_recording_of_the_project():
    capture = ek.load(OWN)
    seen = account(capture)
    marks = capture.steps.groupby("rank")["dur_ns"].mean()
    assert seen.total == round(marks.max())
    assert seen.closed(0.05).share["dispatch waiting"] > 2 * seen.share["dispatch moving"], (
        "rank 1 has three times the work"
    )
    calls = capture.collectives()
    assert Counter(calls["annotations"]) == {"dispatch": 6, "combine": 6, "": 6}
    per_step = calls["exposed_ns"].sum() / 6
    assert sum(value for name, value in rows(seen, 1).items() if name.startswith(COMMUNICATION)) == (
        pytest.approx(per_step, abs=9)
    )
    assert seen.companions[0].closed(1e-6)


@pytest.mark.skipif(not DLRM.is_dir(), reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")
def test_dlrm_by_hand_from_the_raw_events():
    """The same rows from plain JSON, moment by moment; of effkit only where the steps begin and end."""
    capture, calls, others = ek.load(DLRM), {}, {}
    for path in sorted(DLRM.iterdir()):
        trace = json.loads(gzip.decompress(path.read_bytes()), parse_float=Decimal)
        on_device = [
            (round(1000 * one["ts"]), round(1000 * (one["ts"] + one["dur"])), one["name"], one["cat"] == "kernel")
            for one in sorted(trace["traceEvents"], key=lambda one: one.get("ts", 0))
            if one["ph"] == "X" and one["cat"] in ("kernel", "gpu_memcpy", "gpu_memset")
        ]
        rank = trace["distributedInfo"]["rank"]
        calls[rank] = [one for one in on_device if "nccl" in one[2].lower()]
        others[rank] = [one for one in on_device if "nccl" not in one[2].lower()]
    order = ["computing", *MOVING, *WAITING, "copies"]  # to which of them a moment belongs
    ahead = {rank: round(statistics.median(one[1] - first[1] for one, first in zip(own, calls[0], strict=True)))
             for rank, own in calls.items()}  # fmt: skip
    last = [max(own[i][0] - ahead[rank] for rank, own in calls.items()) for i in range(len(calls[0]))]
    sums: Counter[str] = Counter()
    for rank, row in capture.overview()[["start_ns", "dur_ns"]].droplevel("step").iterrows():
        begin, end = row["start_ns"], row["start_ns"] + row["dur_ns"]
        spans = [("computing" if kernel else "copies", start, stop) for start, stop, _, kernel in others[rank]]
        for (start, stop, name, _), late in zip(calls[rank], last, strict=True):
            kind = "SendRecv" not in name
            turn = min(max(late + ahead[rank], start), stop)
            spans += [(MOVING[kind], turn, stop), (WAITING[kind], start, turn)]
        spans = [(name, start - ahead[rank], stop - ahead[rank]) for name, start, stop in spans]
        edges = sorted({begin, end} | {min(max(edge, begin), end) for _, *pair in spans for edge in pair})
        for left, right in itertools.pairwise(edges):
            if there := {name for name, start, stop in spans if start <= left and right <= stop}:
                sums[min(there, key=order.index)] += right - left
    seen = account(capture)
    assert {name: seen.frame["value"][name] for name in order} == pytest.approx(
        {name: sums[name] / 4 for name in order}, abs=2
    )
    assert seen.closed(0.05).share["all-to-all waiting"] > 0.2
    assert seen.setting["missing_ranks"] == (4, 5, 6, 7)
