"""The blocks of a GPU's allocator: by hand after torch's source, and against blocks that others recorded."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from effkit import activations
from effkit.activations.caching_allocator import Block, CachingAllocator
from effkit.snapshot.unpickling import unpickle

MIB = 2**20
RECORDED = Path(os.environ.get("EFFKIT_RECORDED", Path(__file__).resolve().parents[2] / "shared" / "data"))
SNAPSHOT = RECORDED / "snapshots" / "medium_512_inference_memory_snapshot.pickle"


@pytest.mark.parametrize(
    ("asked", "block", "reserved"),
    [
        (700, 1024, 2 * MIB), (0.5 * MIB, 0.5 * MIB, 2 * MIB), (MIB + 1, MIB + 512, 20 * MIB),
        (9 * MIB, 9 * MIB, 20 * MIB), (19.5 * MIB, 20 * MIB, 20 * MIB), (25 * MIB, 26 * MIB, 26 * MIB),
        (25 * MIB - 512, 25 * MIB - 512, 26 * MIB), (24.5 * MIB, 24.5 * MIB, 26 * MIB), (100 * MIB,) * 3,
    ],
)  # fmt: skip
def test_the_first_request_is_cut_from_a_segment_where_more_than_a_mebibyte_is_left(asked, block, reserved):
    allocator = CachingAllocator()
    assert allocator.take(int(asked)).size == block
    assert allocator.reserved_bytes == reserved


def test_what_is_free_is_used_again_the_smallest_that_fits_and_grows_together():
    allocator = CachingAllocator()
    large, small = allocator.take(100 * MIB), allocator.take(40 * MIB)
    allocator.give(small)
    allocator.give(large)
    first = allocator.take(25 * MIB)
    assert (first.size, first.segment) == (25 * MIB, small.segment), "cut, for 15 MiB are left"
    rest = [allocator.take(25 * MIB) for _ in range(4)]
    assert {block.segment for block in rest} == {large.segment}
    assert allocator.reserved_bytes == 140 * MIB
    for block in rest:
        allocator.give(block)
    assert allocator.take(100 * MIB).segment == large.segment
    assert allocator.reserved_bytes == 140 * MIB


def test_parameters_of_25_mib_take_26_and_are_not_requested():
    """2560 x 2560 in float32 is 25 MiB, and each of the parameters was asked for alone."""
    model = nn.Sequential(*(nn.Linear(2560, 2560, bias=False, device="meta") for _ in range(2)))
    found = activations.forecast(model, torch.randn(1, 2560), loss=lambda y: y.mean(), device="A100")
    assert found.frame["value"]["parameter"] == 2 * 26 * MIB
    requested, reserved = found.companion("Requested memory at its peak"), found.companion("Reserved memory")
    assert requested.total < found.total <= reserved.total
    assert reserved.low <= found.total
    assert found.residual == requested.residual == reserved.residual == 0


@pytest.mark.skipif(not SNAPSHOT.exists(), reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")
def test_every_request_of_a_recorded_forward_pass_gets_the_address_that_it_got_there():
    """In this recording no segment was made, and all that was taken was given back: it begins as it ends."""
    decoded = unpickle(SNAPSHOT.read_bytes())
    segments = sorted(decoded["segments"], key=lambda segment: segment["address"])
    allocator, live = CachingAllocator(), {}
    for number, segment in enumerate(segments):
        for block in segment["blocks"]:
            if block["state"] == "inactive":
                start = block["address"] - segment["address"]
                allocator._keep(Block(segment["segment_type"] == "small", block["size"], number, start))
    wrong = num = 0
    for event in decoded["device_traces"][0]:
        if event["action"] == "alloc":
            block = live[event["addr"]] = allocator.take(event["size"])
            wrong += segments[block.segment]["address"] + block.start != event["addr"]
            num += 1
        elif event["action"] == "free_completed":
            allocator.give(live.pop(event["addr"]))
    assert num == 1666
    assert not live
    assert wrong == 0
    assert allocator.reserved_bytes == 0, "no segment was made there"


@pytest.mark.skipif(not SNAPSHOT.exists(), reason=f"no recordings of others in {RECORDED}: set EFFKIT_RECORDED")
def test_blocks_alone_in_their_segments_are_as_large_as_recorded():
    found = 0
    for path in SNAPSHOT.parent.glob("*.pickle"):
        for segment in unpickle(path.read_bytes())["segments"]:
            (block, *others) = segment["blocks"]
            if not others and block["state"] == "active_allocated" and "requested_size" in block:
                allocator = CachingAllocator()
                assert allocator.take(block["requested_size"]).size == block["size"]
                assert allocator.reserved_bytes == segment["total_size"]
                found += 1
    assert found
