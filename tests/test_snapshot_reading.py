"""CUDA memory snapshots are replayed byte for byte, from honest little allocators and from real recordings."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_snapshots import ACTS, Allocator, alive_at_each, dump, lived

from effkit import snapshot
from effkit.snapshot.lifetimes import distinct
from effkit.snapshot.stacks import Stacks

RECORDED = Path(os.environ.get("EFFKIT_RECORDED", Path(__file__).resolve().parents[2] / "shared" / "data"))
FILES = sorted(RECORDED.glob("snapshots/*.pickle"))


@given(ACTS, st.floats(0, 1), st.sampled_from([2, 3, 4, 5]))
def test_replaying_a_ring_that_was_cut_anywhere_gives_the_truth(acts, fraction, protocol):
    allocator = lived(acts)
    cut = int(fraction * len(allocator.trace))
    trace, levels, reserved = allocator.trace[cut:], allocator.levels[cut:], allocator.reserved[cut:]
    if not trace and not allocator.segments:
        return
    found = snapshot.read(dump(trace, segments=allocator.final(), protocol=protocol))
    facts = found.facts["devices"]["device0"]
    assert facts["num_events"] == found.facts["num_events"] == len(trace)
    assert facts["peak_bytes"] == max(levels)
    assert facts["before_bytes"] == levels[0]
    assert facts["requested_bytes"] == levels[-1]
    assert facts["peak_reserved_bytes"] == max(reserved)
    assert facts["reserved_bytes"] == reserved[-1]
    times = distinct(np.array([event["time_us"] for event in trace], dtype="int64") * 1000).tolist()
    assert len(set(times)) == len(times)
    assert alive_at_each(found.allocations, times) == levels[1:]
    assert alive_at_each(found.segments, times) == reserved[1:]
    births = sum(event["action"] == "alloc" for event in trace)
    assert found.allocations["alloc_ns"].notna().sum() == births
    assert found.allocations["alloc_ns"].isna().is_monotonic_decreasing, "what was there before comes first"
    if len(found.allocations):
        assert alive_at_each(found.allocations, [facts["peak_ns"] or 0]) == [max(levels)]
        ledger = snapshot.account(found.allocations, peak_bytes=max(levels), source="truth", device="device0",
                                  segments=found.segments)  # fmt: skip
        assert ledger.residual == 0
        assert all(companion.residual == 0 for companion in ledger.companions)


@given(ACTS, ACTS)
def test_devices_are_kept_apart(first, second):
    one, two = lived(first), lived(second)
    cut = len(two.trace) // 2
    if not (one.trace and two.trace):
        return
    found = snapshot.read(dump(one.trace, [], two.trace[cut:], segments=two.final(2) + one.final(0)), rank=3)
    assert set(found.facts["devices"]) == {"device0", "device2"}
    for name, allocator, begin in (("device0", one, 0), ("device2", two, cut)):
        assert found.facts["devices"][name]["peak_bytes"] == max(allocator.levels[begin:])
        rows = found.allocations[found.allocations["device"] == name]
        assert rows["alloc_ns"].notna().sum() == sum(event["action"] == "alloc" for event in allocator.trace[begin:])
    assert found.allocations["alloc_ns"].isna().is_monotonic_decreasing, "what was there before comes first"
    assert found.allocations["alloc_ns"].dropna().is_monotonic_increasing
    assert set(found.allocations["rank"]) <= {3}


def some() -> Allocator:
    return lived([(0, 600), (0, 100), (0, 5000), (4, 1), (6, 0), (0, 50), (4, 0)])


def test_the_columns_are_those_of_live_events():
    found = snapshot.read(dump(some().trace, segments=some().final()))
    live = snapshot.from_events(
        pd.DataFrame(
            {"time_ns": [1], "address": [1], "size_bytes": [1], "total_bytes": [1], "device": ["cpu"], "rank": [0]}
        ),
        stacks=pd.Series([pd.NA], dtype="str"),
    )
    assert tuple(found.allocations) == snapshot.ALLOCATION_COLUMNS == tuple(live)
    assert found.allocations.dtypes.astype(str).to_dict() == live.dtypes.astype(str).to_dict()
    assert found.allocations.index.name == "allocation"
    assert tuple(found.segments) == snapshot.SEGMENT_COLUMNS
    assert found.segments.dtypes.astype(str).to_dict() == live[list(found.segments)].dtypes.astype(str).to_dict()


def test_memory_awaiting_its_free_is_active_and_no_longer_allocated():
    facts = snapshot.read(dump(some().trace, segments=some().final())).facts["devices"]["device0"]
    assert facts["active_bytes"] - facts["allocated_bytes"] == 1024  # 600 bytes, in a block of 1024
    assert facts["requested_bytes"] == 600 + 5000 + 50


def test_skipping_free_requested_loses_nothing():
    trace = [event for event in some().trace if event["action"] != "free_requested"]
    found = snapshot.read(dump(trace, segments=some().final()))
    assert found.facts["devices"]["device0"]["peak_bytes"] == max(some().levels)


@pytest.mark.parametrize("action", ["alloc", "free_completed"])
def test_a_trace_that_leaves_out_what_is_needed_is_refused(action):
    allocator = lived([(0, 600), (4, 0), (6, 0), (0, 1500), (0, 900), (4, 0), (6, 0), (0, 1500), (4, 1), (6, 0)])
    trace = [event for event in allocator.trace if event["action"] != action]
    with pytest.raises(ValueError, match=r"lead to its final segments|more than was reserved"):
        snapshot.read(dump(trace, segments=allocator.final()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda trace, segments: trace[0].update(size=599),
        lambda trace, segments: trace.append(trace[0]),
        lambda trace, segments: trace.extend(event for event in trace[:] if event["action"] == "free_completed"),
        lambda trace, segments: segments[0]["blocks"][0].update(requested_size=1),
        lambda trace, segments: segments[0]["blocks"].pop(),
        lambda trace, segments: segments.clear(),
        lambda trace, segments: trace[2].update(size=10**6),
        lambda trace, segments: trace[0].update(size=2**60),
        lambda trace, segments: trace[0].update(size=-5),
        lambda trace, segments: trace[0].update(size="600"),
        lambda trace, segments: trace[0].update(size=600.5),
        lambda trace, segments: trace[0].update(addr=None),
        lambda trace, segments: trace[0].update(time_us=2**62),
        lambda trace, segments: trace[0].update(frames=[3]),
        lambda trace, segments: trace[0].update(frames=[{"name": "f", "line": 3}]),
        lambda trace, segments: trace[0].pop("action"),
        lambda trace, segments: segments[0].pop("blocks"),
    ],
)
def test_what_does_not_add_up_is_refused(spoil):
    allocator = some()
    trace, segments = allocator.trace[1:], allocator.final()  # the first segment is older: there is room for mistakes
    assert [event["action"] for event in trace[:3]] == ["alloc", "alloc", "segment_alloc"]
    snapshot.read(dump(trace, segments=segments))
    spoil(trace, segments)
    with pytest.raises(ValueError, match=r"^not a memory snapshot that can be replayed: .+; expected"):
        snapshot.read(dump(trace, segments=segments))


def test_more_allocated_than_reserved_is_refused():
    block = {"address": 0, "size": 2048, "requested_size": 9, "state": "inactive"}
    frees = [{"action": "free_completed", "addr": address, "size": 1500, "time_us": 1} for address in (0, 512)]
    segments = [{"address": 0, "total_size": 2048, "blocks": [block]}]
    assert len(snapshot.read(dump(frees[:1], segments=segments)).allocations) == 1
    with pytest.raises(ValueError, match="allocates more than was reserved"):
        snapshot.read(dump(frees, segments=segments))


def test_what_is_freed_twice_is_refused():
    block = {"address": 0, "size": 2048, "requested_size": 9, "state": "inactive"}
    segments = [{"address": 0, "total_size": 2048, "blocks": [block]}]
    alloc, free = ({"action": action, "addr": 0, "size": 100, "time_us": 1} for action in ("alloc", "free_completed"))
    assert len(snapshot.read(dump([free, alloc, free], segments=segments)).allocations) == 2
    with pytest.raises(ValueError, match="does not lead to its final segments"):
        snapshot.read(dump([alloc, free, free], segments=segments))


def test_final_state_alone():
    for content in (pickle.dumps(some().final()), dump([], segments=some().final()), dump(segments=some().final())):
        found = snapshot.read(content)
        facts = found.facts["devices"]["device0"]
        assert found.allocations["size_bytes"].sum() == facts["peak_bytes"] == facts["before_bytes"] == 5650
        assert found.allocations[["alloc_ns", "free_ns"]].isna().all(axis=None)
        assert facts["peak_ns"] is None
        assert "not visible" in facts["peak_source"]
        assert facts["oom"] is None


def test_the_form_of_torch_2_0():
    allocator = some()
    frames = [{"filename": "/home/me/code/train.py", "line": 3, "name": "main"}]
    trace = [{key: value for key, value in event.items() if key != "time_us"} for event in allocator.trace]
    segments = allocator.final()
    for segment in segments:
        for block in segment["blocks"]:
            requested = block.pop("requested_size")
            del block["address"]
            block["state"] = block["state"].replace("awaiting", "pending")
            if block["state"] != "inactive":
                block["history"] = [{"addr": 0, "real_size": requested, "frames": frames}]
    found = snapshot.read(dump(trace[2:], segments=segments))
    assert found.facts["devices"]["device0"]["peak_bytes"] == max(allocator.levels)
    assert found.allocations["alloc_ns"].dropna().max() < len(trace), "without times, events are counted"
    before = found.allocations.iloc[0]
    assert (before["size_bytes"], before["stack"]) == (600, "code/train.py:3 main")


def test_expandable_segments_grow_and_shrink_by_pieces():
    def step(action, address, size, time):
        return {"action": action, "addr": address, "size": size, "time_us": time}

    block = {"address": 0, "size": 20, "requested_size": 0, "state": "inactive"}
    trace = [
        step("segment_map", 0, 10, 1), step("segment_map", 10, 20, 2), step("segment_map", 30, 10, 3),
        step("segment_unmap", 20, 15, 4), step("segment_unmap", 35, 5, 5),
    ]  # fmt: skip
    found = snapshot.read(dump(trace, segments=[{"address": 0, "total_size": 20, "blocks": [block]}])).segments
    assert found["size_bytes"].tolist() == [10, 10, 10, 5, 5]
    assert found.fillna(0)["free_ns"].sort_values().tolist() == [0, 0, 4000, 4000, 5000]
    assert alive_at_each(found, [1000, 2000, 3000, 4000, 5000]) == [10, 30, 40, 25, 20]
    with pytest.raises(ValueError, match="segment events"):
        snapshot.read(dump([*trace, step("segment_unmap", 15, 5, 6)], segments=[
            {"address": 0, "total_size": 20, "blocks": [block]}]))  # fmt: skip


def test_running_out_of_memory_is_told():
    allocator = some()
    frames = [{"filename": "/x/site-packages/torch/nn/functional.py", "line": 9, "name": "linear"}]
    oom = {"action": "oom", "size": 2**50, "device_free": 77, "stream": 0, "time_us": allocator.time_us + 5}
    found = snapshot.read(dump([*allocator.trace, oom | {"frames": frames}], segments=allocator.final()))
    assert found.facts["devices"]["device0"]["oom"] == {
        "asked_bytes": 2**50,
        "device_free_bytes": 77,
        "time_ns": (allocator.time_us + 5) * 1000,
        "stack": "torch/nn/functional.py:9 linear",
    }
    assert found.facts["devices"]["device0"]["peak_bytes"] == max(allocator.levels)


def test_a_snapshot_is_read_where_torch_is_absent(tmp_path):
    (tmp_path / "snapshot.pickle").write_bytes(dump(some().trace, segments=some().final()))
    code = (
        "import sys, pathlib; sys.modules['torch'] = None\n"
        "import effkit.snapshot\n"
        "assert len(effkit.snapshot.read(pathlib.Path(sys.argv[1]).read_bytes()).allocations) == 4"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "snapshot.pickle")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr


def test_facts_are_plain_data():
    facts = snapshot.read(dump(some().trace, segments=some().final())).facts
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.skipif(not FILES, reason=f"no recordings of others under {RECORDED.name}/snapshots")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_real_recordings_replay_byte_for_byte(file):
    raw = pickle.loads(file.read_bytes())
    found = snapshot.read(file.read_bytes())
    facts = found.facts["devices"]["device0"]
    signs = {"alloc": 1, "free_completed": -1}
    steps = [signs.get(event["action"], 0) * event["size"] for event in raw["device_traces"][0]]
    final = sum(segment["requested_size"] for segment in raw["segments"])
    levels = final - sum(steps) + np.cumsum([0, *steps])
    assert facts["peak_bytes"] == levels.max()
    assert facts["requested_bytes"] == final
    for name in ("allocated", "active"):
        assert facts[f"{name}_bytes"] == sum(segment[f"{name}_size"] for segment in raw["segments"])
    assert facts["reserved_bytes"] == sum(segment["total_size"] for segment in raw["segments"])
    assert facts["peak_bytes"] <= facts["peak_reserved_bytes"]
    alive = snapshot.at(found.allocations, facts["peak_ns"])
    assert alive["size_bytes"].sum() == facts["peak_bytes"]
    at_peak, then = (
        snapshot.account(found.allocations, peak_bytes=1, source="x", device="device0", by="stack", at_ns=at_ns).frame
        for at_ns in (None, facts["peak_ns"])
    )
    assert at_peak.equals(then)
    assert snapshot.timeline(found.allocations, found.segments)["allocated_bytes"].max() == facts["peak_bytes"]
    assert (found.allocations["category"] == "unknown").eq(found.allocations["known_by"] == "not recorded").all()


@pytest.mark.skipif(not FILES, reason=f"no recordings of others under {RECORDED.name}/snapshots")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_nearly_all_that_has_a_stack_has_a_category_at_the_peak(file):
    found = snapshot.read(file.read_bytes())
    alive = snapshot.at(found.allocations, found.facts["devices"]["device0"]["peak_ns"]).dropna(subset="stack")
    unknown = alive.loc[alive["category"] == "unknown", "size_bytes"].sum()
    assert unknown <= 0.25 * alive["size_bytes"].sum(), (
        "98% of it in recordings of a forward alone, until these had a name"
    )


@pytest.mark.skipif(not FILES, reason=f"no recordings of others under {RECORDED.name}/snapshots")
def test_categories_of_a_real_training_step():
    (file,) = [file for file in FILES if file.stem.startswith("medium_128_training")]
    found = snapshot.read(file.read_bytes()).allocations
    held = found.groupby("category")["size_bytes"].sum()
    # AdamW keeps two numbers per parameter, and each parameter has one gradient; 4 bytes are the loss's own
    assert held["optimizer state"] == 2 * (held["gradient"] - 4)
    assert (found["category"] == "optimizer state").sum() == 2 * ((found["category"] == "gradient").sum() - 1)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("/usr/lib/python3/dist-packages/torch/functional.py", "torch/functional.py"),
        ("/home/me/code/train.py", "code/train.py"),
        ("/opt/venv/lib/python3.12/site-packages/accelerate/hooks.py", "site-packages/accelerate/hooks.py"),
    ],
)
def test_a_path_is_told_from_its_package_on_or_by_its_last_two_parts(file, told):
    stacks = Stacks()
    stacks.number([{"filename": file, "name": "hook", "line": 7}])
    assert stacks.texts == [f"{told}:7 hook"]
