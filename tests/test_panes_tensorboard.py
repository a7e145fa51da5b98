"""The run folder for the TensorBoard plugin shows, through the plugin's own parser, what our panes show."""

import json
import logging

import pandas as pd
import pytest
from made_traces import capture_of, event, launched, note, op

import effkit as ek

profiler_data = pytest.importorskip("torch_tb_profiler.profiler.data")
KERNEL, MEMCPY, COMMUNICATION, DATALOADER, TOTAL = 0, 1, 3, 5, 8  # torch_tb_profiler's ProfileRole


@pytest.fixture
def today(tmp_path):
    """A trace in the words of today's profiler, of which the plugin understands little."""
    moved = {"Input Dims": [[64]], "Input type": ["float"]}
    return capture_of(
        tmp_path,
        note("ProfilerStep#4", 0, 100),
        event("gpu_user_annotation", "ProfilerStep#4", 20, 90),
        note("enumerate(DataLoader)#_SingleProcessDataLoaderIter.__next__", 0, 8),
        op("aten::linear", 10, 40),
        op("aten::addmm", 11, 39),
        launched("gemm", 12, 20, 50, correlation=1),
        note("nccl:_all_gather_base", 41, 45, **moved),
        launched("ncclDevKernel_AllGather", 42, 50, 70, correlation=2),
        note("nccl:all_to_all", 46, 49, **moved),
        launched("ncclDevKernel_SendRecv", 47, 75, 80, correlation=3),
        event("gpu_memcpy", "Memcpy DtoH", 85, 90, correlation=9),
    )


def parsed(folder, rank=0):
    """What the plugin makes of a file."""
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    content = json.loads((folder / f"rank{rank}.pt.trace.json").read_text())
    return profiler_data.RunProfileData.from_json(f"rank{rank}", "1", content)


def test_step_breakdown(today, tmp_path):
    written = today.tensorboard(tmp_path / "run")
    costs = parsed(written.path).steps_costs[0].costs
    ours = today.overview().iloc[0] // 1000
    assert costs[TOTAL] == ours["dur_ns"] == 100
    # the kernels of an all-to-all, which the plugin has no word for, count as computation there
    assert costs[KERNEL] == ours["kernel_ns"] + 5
    assert costs[COMMUNICATION] == ours["exposed_communication_ns"] - 5 == 20
    assert costs[MEMCPY] == ours["memcpy_ns"] == 5
    assert costs[DATALOADER] == ours["dataloader_ns"] == 8
    assert written.not_shown[0].startswith("all_to_all: the plugin has no such collective")


def test_operators_have_their_device_time_again(today, tmp_path):
    table = {row.name: row for row in parsed(today.tensorboard(tmp_path / "run").path).op_list_groupby_name}
    ours = today.operators()
    for name in ("aten::addmm", "aten::linear"):
        theirs = table[name]
        assert theirs.device_duration * 1000 == ours.loc[name, "device_total_ns"] == 30_000
        assert theirs.self_device_duration * 1000 == ours.loc[name, "device_self_ns"]
        assert theirs.self_host_duration * 1000 == ours.loc[name, "host_self_ns"]


def test_the_plugin_misreads_the_trace_as_the_profiler_wrote_it(today, tmp_path):
    """What the folder is for; when this fails the plugin has learnt and the folder can go."""
    raw = json.loads((tmp_path / "trace.json").read_text())
    table = {row.name: row for row in profiler_data.RunProfileData.from_json("a", "1", raw).op_list_groupby_name}
    assert table["aten::addmm"].device_duration == 0


def test_a_file_for_each_rank_written_whole(today, tmp_path):
    both = ek.Capture(pd.concat([today.events, today.events.assign(rank=1)]))
    folder = both.tensorboard(tmp_path / "run").path
    assert sorted(path.name for path in folder.iterdir()) == ["rank0.pt.trace.json", "rank1.pt.trace.json"]
    assert parsed(folder, 1).steps_costs[0].costs[TOTAL] == 100


def test_ranges_that_the_plugin_leaves_out_are_said(tmp_path):
    capture = capture_of(tmp_path, note("ProfilerStep#4", 0, 100), note("forward", 5, 60), op("aten::mm", 10, 40))
    assert (
        "1 ranges of record_function: trace() keeps them, for Perfetto"
        in capture.tensorboard(tmp_path / "run").not_shown
    )
