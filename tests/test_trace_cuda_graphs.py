"""Kernels that a CUDA graph launched bear what torch's own tool wrote into the trace: modules, or words."""

import json

import pandas as pd
import pytest
from made_traces import event, launched, note, op
from torch.cuda._annotate_cuda_graph_trace import annotate_trace

import effkit as ek
from effkit import trace


def graphed(name, start, end, node, **args):
    return event("kernel", name, start, end, correlation=9, **{"graph node id": node, "graph id": 3, **args})


RUN = [
    note("ProfilerStep#0", 0, 100),
    op("aten::mm", 1, 4),
    *launched("gemm", 2, 5, 8, correlation=8, **{"graph node id": 0}),
    event("cuda_runtime", "cudaGraphLaunch", 10, 12, correlation=9),
    graphed("gemm", 20, 30, 101),
    graphed("gemm", 30, 45, 102),
    graphed("gemm", 45, 65, 103),
    graphed("softmax", 65, 70, 104),
    graphed("copy", 70, 71, 105),
    graphed("gemm", 71, 72, 106),
]
CAPTURED = {
    101: [{"module_fqn": "model.layers.0.attention.wq", "name": "ignored"}],
    102: [{"module_fqn": "model.layers.11.attention.wq", "stream": 7}],
    103: [{"name": "feed forward", "dtype": "bf16"}],
    104: [{"str": "phase A"}],
    106: ["bare words"],
}


@pytest.fixture
def path(tmp_path):
    run = json.loads(json.dumps({"traceEvents": RUN}))
    assert annotate_trace(run, CAPTURED) == len(CAPTURED)
    (tmp_path / "trace.json").write_text(json.dumps(run))
    return tmp_path / "trace.json"


def test_each_kernel_of_a_graph_bears_its_annotation(path):
    kernels = ek.load(path).events.query("category == 'kernel'")
    assert kernels["annotation"].fillna("none").tolist() == [
        "none", "model.layers.0.attention.wq", "model.layers.11.attention.wq", "feed forward", "phase A", "not visible",
        "bare words",
    ]  # fmt: skip


def test_kernels_tell_their_annotations_layers_together_and_most_time_first(path):
    table = ek.load(path).kernels()
    assert table.loc["gemm", ["calls", "total_ns", "min_ns"]].tolist() == [5, 49_000, 1_000]
    assert table["annotation"].to_dict() == {
        "gemm": "model.layers.*.attention.wq, feed forward, bare words", "softmax": "phase A", "copy": "not visible",
    }  # fmt: skip


def test_ranks_with_and_without_graphs_are_one_table(path, tmp_path):
    (tmp_path / "run").mkdir()
    path.rename(tmp_path / "run" / "rank0.json")
    plain = [each for each in RUN if "graph node id" not in each["args"]]
    (tmp_path / "run" / "rank1.json").write_text(json.dumps({"traceEvents": [*plain, *launched("new", 2, 5, 8, 8)]}))
    table = ek.load(tmp_path / "run").kernels()
    assert table.loc["softmax", "annotation"] == "phase A"
    assert pd.isna(table.loc["new", "annotation"])


def test_nothing_is_said_of_annotations_where_no_graph_ran(tmp_path):
    plain = [op("aten::mm", 1, 4), *launched("gemm", 2, 5, 8, correlation=8, **{"graph node id": 0})]
    plain[-1]["args"]["name"] = "of something else"
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": plain}))
    seen = ek.load(tmp_path / "trace.json")
    assert "annotation" not in seen.events
    assert "annotation" not in seen.kernels()


def test_annotations_last_in_saved_captures_and_written_traces(path, tmp_path):
    seen = ek.load(path)
    for again in (ek.load(seen.save(tmp_path / "a.zip")), ek.load(seen.trace(tmp_path / "again.json"))):
        pd.testing.assert_series_equal(again.events["annotation"], seen.events["annotation"])


def test_a_mark_that_is_no_text_is_none():
    run = {"traceEvents": [graphed("gemm", 1, 2, 5, module_fqn=[1]), graphed("gemm", 2, 3, "0x5", str=7)]}
    assert tuple(trace.read(json.dumps(run).encode(), details=["annotation"]).events) == trace.EVENT_COLUMNS
