"""The memory of a Capture: live, from a trace and from a snapshot, always explained to the byte."""

import pickle
from itertools import pairwise

import pytest
import torch
from made_traces import capture_of, op

import effkit as ek

MIB = 2**20
FRAMES = [{"filename": "/home/me/train.py", "line": 7, "name": "main"}]


def counted(time: float, address: int, size: int, total: int, device: int = 1, **more: int) -> dict:
    """An allocator event as the profiler writes it; device type 0 is the host."""
    args = {name.replace("_", " "): value for name, value in more.items()} | {
        "Total Allocated": total,
        "Bytes": size,
        "Addr": address,
        "Device Id": 0 if device else -1,
        "Device Type": device,
    }
    return {"ph": "i", "name": "[memory]", "pid": 1, "tid": 1, "ts": time, "args": args}


def loaded(tmp_path, trace: list[dict]) -> ek.Capture:
    """A segment of 4 MiB: of it one MiB is used from before the recording, one at its end."""
    used = {"size": MIB, "requested_size": MIB, "state": "active_allocated", "frames": []}
    free = {"size": 2 * MIB, "requested_size": 0, "state": "inactive", "address": 102 * MIB}
    segment = {
        "device": 0, "address": 100 * MIB, "total_size": 4 * MIB, "stream": 0, "segment_type": "large",
        "allocated_size": 2 * MIB, "active_size": 2 * MIB, "requested_size": 2 * MIB,
        "blocks": [used | {"address": 100 * MIB}, used | {"address": 101 * MIB}, free],
    }  # fmt: skip
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": [segment], "device_traces": [trace]}))
    return ek.load(path)


ALLOC = {"action": "alloc", "addr": 101 * MIB, "size": MIB, "stream": 0, "time_us": 10, "frames": FRAMES}


@pytest.fixture
def snapshot(tmp_path):
    """One allocation, and a request that failed."""
    oom = {"action": "oom", "size": 9 * MIB, "stream": 0, "time_us": 20, "device_free": MIB, "frames": FRAMES}
    return loaded(tmp_path, [ALLOC, oom])


def test_a_snapshot_is_explained_to_the_byte(snapshot):
    account = snapshot.memory(by="stack")
    assert account.total == 2 * MIB
    assert account.residual == 0
    assert account.frame["value"].to_dict() == {"not recorded": MIB, "me/train.py:7 main": MIB}
    assert account.companions[0].frame["value"].to_dict() == {
        "allocated": 2 * MIB,
        "reserved but not allocated": 2 * MIB,
    }


def test_out_of_memory_says_what_was_alive_and_what_asked_last(snapshot):
    account = snapshot.out_of_memory()
    assert account.title == "Memory of device0 when 1.0 MiB were free and 9.0 MiB asked for by me/train.py:7 main"
    assert account.total == 2 * MIB
    assert "device0 ran out of memory: see out_of_memory()" in repr(snapshot)


def test_memory_that_ran_out_says_where_ones_own_code_holds_most(tmp_path):
    hook = {
        "filename": "/opt/venv/lib/python3.12/site-packages/accelerate/hooks.py",
        "line": 165,
        "name": "new_forward",
    }
    product = {"filename": "/opt/venv/lib/python3.12/site-packages/torch/functional.py", "line": 7, "name": "einsum"}
    mine = [{"filename": "/home/me/model.py", "line": line, "name": "forward"} for line in range(5)]
    stacks = [
        [product, hook, mine[0], hook, *FRAMES],
        [mine[1]],
        [hook],
        [product, mine[2]],
        [product, mine[0], *FRAMES],
    ]
    segments, trace = [], []
    for number, (size, stack) in enumerate(zip([50, 40, 30, 20, 10], stacks, strict=True), 1):
        block = {
            "address": number * MIB,
            "size": MIB,
            "requested_size": size,
            "state": "active_allocated",
            "frames": stack,
        }
        segments.append({"device": 0, "address": number * MIB, "total_size": MIB, "stream": 0, "blocks": [block]})
        trace.append({"action": "alloc", "addr": number * MIB, "size": size, "time_us": number, "frames": stack})
    trace.append({"action": "oom", "size": 9 * MIB, "time_us": 20, "device_free": MIB, "frames": FRAMES})
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps({"segments": segments, "device_traces": [trace]}))
    account = ek.load(path).memory()
    assert (account.total, account.residual) == (150, 0)
    assert (
        repr(account)
        .splitlines()[-1]
        .endswith(
            "Most is held by 60 B for me/model.py:0 forward, in torch/functional.py:7 einsum; 40 B for "
            "me/model.py:1 forward; 30 B for site-packages/accelerate/hooks.py:165 new_forward"
        )
    )
    del trace[-1]
    path.write_bytes(pickle.dumps({"segments": segments, "device_traces": [trace]}))
    assert "Most is held" not in repr(ek.load(path).memory())


@pytest.mark.parametrize("trace", [[], [{"action": "snapshot", "addr": 0, "size": 0, "stream": 0}]])
def test_of_a_history_in_which_nothing_came_or_went_only_the_end_is_told(trace, tmp_path):
    block = loaded(tmp_path, [ALLOC])  # that both are of the same final state
    account = loaded(tmp_path, trace).memory()
    assert account.title == "Memory of device0 at its end"
    assert "an earlier peak is not visible" in account.source
    assert account.total == block.memory().total == 2 * MIB
    assert block.memory().title == "Memory of device0 at its peak"


def test_where_no_times_were_recorded_the_events_are_the_axis(tmp_path):
    event = {"addr": 102 * MIB, "size": 64, "stream": 0, "frames": []}
    trace = [{"action": action} | event for action in ("alloc", "free_requested", "free_completed")] * 50
    untimed = loaded(tmp_path, trace)
    line = untimed.memory_timeline()
    assert (line.attrs["axis"], line["time_ns"].iloc[-1]) == (("events", 1), 149)
    assert untimed.plot("memory_timeline").get_xlabel() == "events"
    browser = untimed.browse_memory()
    browser.controls["moment"].value = browser.controls["moment"].max
    assert "2.0 MiB allocated after 150.0 events" in browser.shown(), "of the moment before them"
    assert untimed.memory(at_ns=0).title == "Memory of device0 at event 0"
    timed = loaded(tmp_path, [one | {"time_us": 10**15 + 7 * number} for number, one in enumerate(trace)])
    assert timed.plot("memory_timeline").get_xlabel() == "ms"
    assert ek.load(untimed.save(tmp_path / "saved.zip")).plot("memory_timeline").get_xlabel() == "events"


def test_the_most_that_was_reserved_is_exact_in_however_few_points(tmp_path):
    """Reserved memory grows, and is given back, between the moments at which most is allocated."""
    totals = [(1, 6), (2, 6), (3, 9), (2, 7), (3, 7), (4, 8), (3, 5)]
    steps = [1, *(after - before for (before, _), (after, _) in pairwise(totals))]
    seen = capture_of(tmp_path, op("aten::empty", 0, 90), [
        counted(10 * i, 7 + i if size > 0 else 6 + i, size * MIB, total * MIB, Total_Reserved=reserved * MIB)
        for i, (size, (total, reserved)) in enumerate(zip(steps, totals, strict=True))
    ])  # fmt: skip
    line = seen.memory_timeline()
    assert (line["reserved_bytes"] // MIB).tolist() == [6, 6, 9, 7, 7, 8, 5]
    for num_points in (1, 2, 3):
        few = seen.memory_timeline(num_points=num_points)
        assert [few[f"{name}_bytes"].max() for name in ("allocated", "reserved")] == [4 * MIB, 9 * MIB]
    assert seen.memory().companions[0].frame["value"].to_dict() == {
        "allocated": 4 * MIB, "reserved but not allocated": 4 * MIB,
    }  # fmt: skip
    again = ek.load(seen.save(tmp_path / "saved.zip"))
    assert again.memory_timeline().equals(line)


def test_nothing_ran_out_of_memory(tmp_path):
    with pytest.raises(ValueError, match="no request ran out of memory in this recording"):
        capture_of(tmp_path, counted(1, 1, MIB, MIB)).out_of_memory()
    with pytest.raises(ValueError, match="memory was not recorded"):
        capture_of(tmp_path, op("a", 0, 1)).out_of_memory()


def test_what_an_accelerator_held_before_the_recording_is_a_row(tmp_path):
    seen = capture_of(
        tmp_path, op("aten::empty", 0, 50), counted(10, 1, MIB, 8 * MIB), counted(30, 5, -3 * MIB, 5 * MIB)
    )
    account = seen.memory(by="stack")
    assert account.total == 8 * MIB
    assert account.frame["value"].to_dict() == {"not recorded": 7 * MIB, "aten::empty": MIB}
    assert account.source == "the allocator's own Total Allocated"
    assert seen.memory_timeline()["allocated_bytes"].max() == 8 * MIB


def test_the_accelerators_memory_comes_first_and_others_by_name(tmp_path):
    seen = capture_of(tmp_path, counted(1, 1, MIB, MIB), counted(2, 2, 9 * MIB, 9 * MIB, device=0))
    assert seen.memory().title == "Memory of device0 at its peak"
    assert seen.memory(device="cpu").total == 9 * MIB
    with pytest.raises(ValueError, match="no memory of device tpu and rank None was recorded; there is cpu of rank 0"):
        seen.memory(device="tpu")


def test_memory_at_a_moment(tmp_path):
    seen = capture_of(tmp_path, counted(1, 1, MIB, MIB), counted(2, 2, MIB, 2 * MIB), counted(3, 1, -MIB, MIB))
    totals = [seen.memory(at_ns=time_ns).total for time_ns in (1000, 2000, 3000)]
    assert totals == [MIB, 2 * MIB, MIB]


def test_old_traces_that_give_sizes_only_are_not_accounted_for(tmp_path):
    event = counted(1, 1, 4, 4)
    del event["args"]["Addr"], event["args"]["Total Allocated"]
    with pytest.raises(ValueError, match="memory was not recorded"):
        capture_of(tmp_path, event).memory()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU keeps what it frees: tests/test_gpu.py")
def test_a_live_training_step_by_category(tmp_path):
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    optimizer = torch.optim.AdamW(model.parameters())

    def step():
        model(torch.ones(128, 64)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    seen = ek.capture(step, steps=2, memory=True)
    account = seen.memory()
    assert account.residual == 0
    assert account.total == seen.provenance["peak_bytes"]
    by_category = seen.allocations.groupby("category")["size_bytes"].sum()
    assert by_category["gradient"] == 2 * sum(parameter.nbytes for parameter in model.parameters())
    # the outputs of the three inner layers, and the input of the first, in two steps
    assert by_category["saved activation"] == 2 * 4 * 128 * 64 * 4
    assert ek.load(seen.save(tmp_path / "seen.zip")).memory().frame.equals(account.frame)
