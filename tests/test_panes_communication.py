"""Communication: bytes as recorded, waiting told from moving by the ranks' aligned clocks, absent ranks named."""

import json
from pathlib import Path

import pandas as pd
import pytest
from made_traces import capture_of, event, launched, note, op, written

import effkit as ek

AHEAD_US = 250_000  # by which rank 1's clock is ahead


def all_reduce(arrives: float, ends: float, at: int, *, num: int = 1000, ahead: float = 0) -> list[dict]:
    """One NCCL all-reduce of floats: operator, annotation, launch and kernel."""
    start, end = arrives + ahead, ends + ahead
    return [
        op("record_param_comms", start - 9, start - 2, Collective_name="allreduce", dtype="Float", In_msg_nelems=num,
           Group_size=2, Process_Group_Name="dp"),
        note("nccl:all_reduce", start - 8, start - 3),
        *launched("ncclDevKernel_AllReduce_Sum_f32", start - 7, start, end, correlation=at),
    ]  # fmt: skip


@pytest.fixture
def two_ranks(tmp_path):
    """Rank 1 comes later to the first collective and earlier to the second; its clock is ahead."""
    early = [*all_reduce(100, 200, 1), *all_reduce(300, 350, 2), *all_reduce(500, 560, 3)]
    written(tmp_path / "a.json", early, rank=0, world=2)
    late = [*all_reduce(160, 200, 1, ahead=AHEAD_US), *all_reduce(290, 350, 2, ahead=AHEAD_US),
            *all_reduce(500, 560, 3, ahead=AHEAD_US)]  # fmt: skip
    written(tmp_path / "b.json", late, rank=1, world=2)
    return ek.load(tmp_path)


def test_waiting_is_told_from_moving(two_ranks):
    calls = two_ranks.collectives().set_index(["rank", "call"])
    assert (calls["waiting_ns"] // 1000).tolist() == [60, 0, 0, 0, 10, 0]
    assert (calls["moving_ns"] // 1000).tolist() == [40, 50, 60, 40, 50, 60]
    # bus bandwidth as nccl-tests has it: 2 (n - 1) / n bytes per byte, over the moving time alone
    assert calls.loc[(0, 0), "bus_bandwidth_bytes_per_s"] == pytest.approx(4000 / 40e-6)


def test_clocks_are_aligned_on_the_ends_of_collectives(two_ranks):
    clocks = two_ranks.clocks()
    assert clocks.loc[1].tolist() == [AHEAD_US * 1000, 0, 3]
    ends = two_ranks.collectives().assign(end=lambda c: c["start_ns"] + c["dur_ns"]).groupby("call")["end"]
    assert (ends.nunique() == 1).all()
    kernels = two_ranks.events[two_ranks.events["category"] == "kernel"]
    assert kernels["start_ns"].max() < 1_000_000


def test_the_summary_sums(two_ranks):
    calls, summary = two_ranks.collectives(), two_ranks.communication()
    row = summary.loc[("nccl", "all_reduce", "device")]
    assert row["calls"] == len(calls) == 6
    for name in ("size_bytes", "dur_ns", "waiting_ns", "moving_ns", "exposed_ns"):
        assert row[name] == calls[name].sum()
    assert row["size_bytes"] == 6 * 4000
    assert row["waiting_ns"] + row["moving_ns"] == row["dur_ns"]
    assert summary.attrs["notes"] == []


def test_one_rank_alone_shows_nobodys_waiting(tmp_path):
    seen = ek.load(written(tmp_path / "a.json", all_reduce(100, 200, 1), rank=0, world=4))
    calls = seen.collectives()
    assert calls[["waiting_ns", "moving_ns", "bus_bandwidth_bytes_per_s"]].isna().all(axis=None)
    assert calls["dur_ns"].tolist() == [100_000]
    assert seen.communication()["waiting_ns"].isna().all()


def test_missing_ranks_are_named(tmp_path):
    for rank in (0, 2):
        written(tmp_path / f"{rank}.json", all_reduce(100, 200, 1), rank=rank, world=4)
    seen = ek.load(tmp_path)
    assert seen.communication().attrs["notes"] == ["ranks 1, 3 were not recorded: waiting for them counts as moving"]
    assert "ranks 1, 3 were not recorded" in repr(seen)


def test_ranks_that_disagree_on_the_number_of_calls_are_not_matched(tmp_path):
    written(tmp_path / "a.json", [*all_reduce(100, 200, 1), *all_reduce(300, 350, 2)], rank=0, world=2)
    written(tmp_path / "b.json", all_reduce(100, 200, 1), rank=1, world=2)
    assert ek.load(tmp_path).collectives()["waiting_ns"].isna().all()


def test_a_device_call_without_its_kernels_has_no_time(tmp_path):
    moved = {"Input Dims": [[10]], "Input type": ["c10::Half"]}
    call = capture_of(tmp_path, note("nccl:all_gather", 0, 9, **moved)).collectives()
    assert call["size_bytes"].tolist() == [20]
    assert call[["start_ns", "dur_ns", "exposed_ns"]].isna().all(axis=None)


def test_exposed_is_what_no_kernel_hides(tmp_path):
    seen = capture_of(tmp_path, all_reduce(100, 200, 1), launched("gemm", 90, 150, 180, correlation=9))
    assert seen.collectives()["exposed_ns"].tolist() == [70_000]


@pytest.mark.parametrize(
    ("kernel", "collective"),
    [
        ("ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)", "send_recv"),
        ("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "reduce_scatter"),
        ("void deep_ep::internode::dispatch<false, 4, false>(int4*, float*)", "dispatch"),
        ("void deep_ep::intranode::combine<__nv_bfloat16, 2>(void*)", "combine"),
        ("void nvshmemi_alltoall_on_stream_kernel(int)", "all_to_all"),
        ("two_shot_all_reduce_kernel_inplace", "all_reduce"),
        ("void (anonymous namespace)::multimem_all_reduce_kernel<float>(float*, int)", "all_reduce"),
        ("void vllm::cross_device_reduce_1stage<__nv_bfloat16, 8>(vllm::RankData*)", "all_reduce"),
        ("void uccl::intranode::cached_notify_combine<8>(void**)", "cached_notify_combine"),
        ("void tensorrt_llm::kernels::moe_comm::moeA2ADispatchKernel<8>(int)", "dispatch"),
    ],
)
def test_kernels_of_libraries_that_c10d_knows_nothing_of(tmp_path, kernel, collective):
    seen = capture_of(
        tmp_path, event("kernel", kernel, 0, 10, correlation=1), launched("gemm", 1, 20, 30, correlation=2)
    )
    calls = seen.collectives()
    assert calls["collective"].tolist() == [collective]
    assert calls["size_bytes"].isna().all()
    assert seen.overview()["exposed_communication_ns"].tolist() == [10_000]
    assert seen.overview()["kernel_ns"].tolist() == [10_000]


@pytest.mark.parametrize("room", ["layout", "internode", "intranode"])
def test_a_layout_of_deep_ep_is_computed_and_nothing_travels(room, tmp_path):
    seen = capture_of(tmp_path, event("kernel", f"void deep_ep::{room}::get_dispatch_layout<8>(int*)", 0, 10))
    assert seen.collectives().empty
    assert seen.overview()["kernel_ns"].tolist() == [10_000]


def test_the_stretches_that_nothing_hides_sum_to_the_exposed_time(tmp_path):
    hiding = [launched("gemm", 60, start, end, correlation=start) for start, end in ((90, 110), (150, 160), (190, 240))]
    seen = capture_of(tmp_path, all_reduce(100, 200, 1), *hiding, all_reduce(300, 350, 2))
    calls = seen.collectives()
    spans = [json.loads(text) for text in calls["exposed_spans_ns"]]
    assert spans == [[[10_000, 50_000], [60_000, 90_000]], [[0, 50_000]]]
    assert calls["exposed_ns"].tolist() == [sum(end - start for start, end in one) for one in spans]


def test_a_call_names_the_annotations_around_it(tmp_path):
    seen = capture_of(
        tmp_path,
        note("ProfilerStep#1", 0, 400), note("layer", 80, 98), note("dispatch", 90, 98), all_reduce(100, 200, 1),
        all_reduce(300, 350, 2), note("combine", 360, 369),
        launched("void nvshmemi_alltoall_on_stream_kernel(int)", 365, 370, 380, correlation=3),
    )  # fmt: skip
    assert seen.collectives()["annotations"].tolist() == ["dispatch < layer", "", "combine"]


def test_of_very_many_or_very_long_annotations_the_innermost_are_named(tmp_path):
    nest = [note(f"level {i}", i, 1000 - i) for i in range(40)]
    around = capture_of(tmp_path, nest, all_reduce(100, 200, 1)).collectives()["annotations"]
    assert around.tolist() == [" < ".join([f"level {i}" for i in range(39, 7, -1)] + ["…"])]
    around = capture_of(tmp_path, note("x" * 500, 90, 99), all_reduce(100, 200, 1)).collectives()["annotations"]
    assert around.tolist() == ["x" * 200]


def test_deep_ep_ranks_wait_where_they_notify(tmp_path):
    for rank, arrives in ((0, 100), (1, 130)):
        kernels = [("notify_dispatch", arrives, 150), ("dispatch", 150, 200 + 50 * rank)]
        events = [event("kernel", f"void deep_ep::intranode::{name}<8>(int*)", *times) for name, *times in kernels]
        written(tmp_path / f"{rank}.json", events, rank=rank, world=2)
    seen = ek.load(tmp_path)
    waiting = seen.collectives().set_index(["collective", "rank"])["waiting_ns"]
    assert waiting.to_dict() == {("notify_dispatch", 0): 30_000, ("dispatch", 0): 0, ("notify_dispatch", 1): 0,
                                 ("dispatch", 1): 0}  # fmt: skip
    assert seen.clocks().loc[1].tolist() == [0, 0, 1], "a clock is not set by who has more to receive"


def gloo_all_to_all(rank: int, sent: list[int]) -> list[dict]:
    """Gloo works on a thread of its own; the split sizes stand in c10d's operator."""
    inputs = ["", "", "", "[2, 2]", str(sent), "False"]
    return [
        op("c10d::alltoall_base_", 10, 12, **{"Concrete Inputs": inputs, "Input Dims": [[4, 8], [sum(sent), 8]]}),
        note("gloo:all_to_all", 11, 40, thread=5, **{"Input Dims": [[sum(sent), 8]], "Input type": ["float"]}),
    ]


def test_who_sends_to_whom(tmp_path):
    for rank, sent in enumerate(([1, 3], [2, 2])):
        written(tmp_path / f"{rank}.json", gloo_all_to_all(rank, sent), rank=rank, world=2)
    seen = ek.load(tmp_path)
    pairs = seen.rank_pairs().set_index(["sender", "receiver"])
    assert pairs["size_bytes"].to_dict() == {(0, 0): 32, (0, 1): 96, (1, 0): 64, (1, 1): 64}
    assert set(pairs["basis"]) == {"measured"}
    assert pairs["size_bytes"].sum() == seen.communication()["size_bytes"].sum()


def test_equal_shares_are_said_to_be_assumed(tmp_path):
    moved = {"Input Dims": [[8]], "Input type": ["int"]}
    for rank in (0, 1):
        written(tmp_path / f"{rank}.json", [note("nccl:all_to_all", 0, 9, **moved)], rank=rank, world=2)
    pairs = ek.load(tmp_path).rank_pairs()
    assert pairs["size_bytes"].tolist() == [16] * 4
    assert set(pairs["basis"]) == {"assumed"}


def test_nothing_recorded_gives_empty_tables_with_the_same_columns(tmp_path, two_ranks):
    alone = capture_of(tmp_path, op("aten::mm", 0, 1))
    assert tuple(alone.collectives()) == tuple(two_ranks.collectives())
    assert tuple(alone.communication()) == tuple(two_ranks.communication())
    assert tuple(alone.rank_pairs()) == tuple(two_ranks.rank_pairs())
    assert alone.collectives().empty


def test_the_recording_of_the_project_shows_who_is_waited_for():
    path = next((Path(__file__).resolve().parents[1] / "data" / "captures").glob("alltoall_*.zip"))
    calls = ek.load(path).collectives()
    first = calls[calls["collective"] == "all_to_all"].groupby("rank")["size_bytes"].first()
    assert first[1] == 3 * first[0]
    waiting = calls[calls["collective"] == "all_to_all"].groupby("rank")["waiting_ns"].sum()
    assert waiting[0] > waiting[1]
    assert set(ek.load(path).rank_pairs()["basis"]) == {"measured"}


def test_shapes_of_damaged_traces_are_no_error(tmp_path):
    odd = {"Input Dims": [3, [[]], ["x"]], "Input type": 7}
    inputs = {"Concrete Inputs": {"a": 1}}
    seen = capture_of(tmp_path, note("gloo:all_to_all", 0, 5, **odd), op("c10d::alltoall_base_", 0, 5, **inputs))
    assert seen.collectives()["size_bytes"].isna().all()
    assert seen.rank_pairs().empty
    assert pd.notna(seen.collectives()["dur_ns"]).all()
    assert json.loads(seen.events["shapes"].dropna().iloc[0]) == odd["Input Dims"]


def test_calls_that_do_not_overlap_are_not_the_same_one(tmp_path):
    """Where a recording lost calls, counting them pairs strangers: then nothing is said about their waiting."""
    here = [*all_reduce(100, 200, 1), *all_reduce(300, 350, 2), *all_reduce(500, 600, 3)]
    there = [*all_reduce(150, 200, 1), *all_reduce(310, 350, 2), *all_reduce(900, 950, 3)]
    written(tmp_path / "a.json", here, rank=0, world=2)
    written(tmp_path / "b.json", there, rank=1, world=2)
    seen = ek.load(tmp_path)
    assert seen.collectives().groupby("rank")["waiting_ns"].apply(lambda waits: waits.isna().tolist()).tolist() == [
        [False, False, True], [False, False, True],
    ]  # fmt: skip
    note = "2 of 6 calls could not be matched between the ranks: who waited in them is not visible"
    assert note in seen.communication().attrs["notes"]


def test_files_of_different_jobs_are_not_read_as_one_in_silence(tmp_path):
    for rank, world in ((0, 4), (1, 8)):
        written(tmp_path / f"{rank}.json", all_reduce(100, 200, 1), rank=rank, world=world)
    assert "the files are of different jobs" in repr(ek.load(tmp_path))
