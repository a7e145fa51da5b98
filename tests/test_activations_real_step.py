"""What is read of a GPU's memory, as recordings of real ones name it: no GPU is needed."""

import gzip
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from effkit import trace
from effkit.activations.real_step import Recording, beyond_tensors
from effkit.snapshot.unpickling import unpickle

RECORDED = Path(os.environ.get("EFFKIT_RECORDED", Path(__file__).resolve().parents[2] / "shared" / "data"))
TRACES = sorted(RECORDED.glob("traces/h100/*.json.gz"))
SNAPSHOTS = sorted(RECORDED.glob("snapshots/*.pickle"))


@pytest.mark.skipif(not TRACES, reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")
def test_the_memory_of_a_gpu_is_found_in_a_recording_of_one():
    content = gzip.decompress(min(TRACES, key=lambda path: path.stat().st_size).read_bytes())
    events = [event for event in json.loads(content)["traceEvents"] if event["name"] == "[memory]"]
    read = trace.read(content)
    for device, kind in ((torch.device("cuda", 0), 1), (torch.device("cpu"), 0)):
        counted = [event["args"]["Total Allocated"] for event in events if event["args"]["Device Type"] == kind]
        found = Recording.of(read, device)
        assert len(found.memory) == len(counted) > 100
        assert found.levels[1:].max() == max(counted)
        assert sorted(found.levels[1:]) == sorted(counted)
    assert len(Recording.of(read, torch.device("cuda", 1)).memory) == 0


@pytest.mark.skipif(not SNAPSHOTS, reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")
def test_blocks_that_are_larger_than_their_tensors_are_told():
    """The allocator's own account of every block: its size, and what was asked for."""
    segments = unpickle((RECORDED / "snapshots" / "medium_512_inference_memory_snapshot.pickle").read_bytes())[
        "segments"
    ]
    blocks = [block for one in segments for block in one["blocks"] if block["state"] == "active_allocated"]
    tensors = [
        SimpleNamespace(layout=torch.strided, untyped_storage=lambda block=block: SimpleNamespace(
            data_ptr=lambda: block["address"], nbytes=lambda: block["requested_size"]))
        for block in blocks
    ]  # fmt: skip
    larger = sum(block["size"] for block in blocks) - sum(block["requested_size"] for block in blocks)
    assert larger > 2**20
    assert beyond_tensors({"parameter": tensors, "input": [torch.ones(4)]}, segments) == {
        "parameter": larger, "input": 0,
    }  # fmt: skip
