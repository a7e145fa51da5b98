"""Snapshots written by hand, by an allocator that does what it says and keeps count."""

import pickle
from itertools import pairwise

from hypothesis import strategies as st

from effkit import snapshot


class Allocator:
    """A caching allocator in miniature: splits, merges, waits for other streams, gives segments back, and records."""

    def __init__(self) -> None:
        self.trace: list[dict] = []
        self.segments: dict[int, list[dict]] = {}
        self.time_us, self.top = 10**15, 4096
        self.levels, self.reserved = [0], [0]  # the truth, before the first event and after each

    def log(self, action: str, address: int, size: int) -> None:
        self.trace.append({"action": action, "addr": address, "size": size, "stream": 0, "time_us": self.time_us})
        blocks = [block for segment in self.segments.values() for block in segment]
        self.levels.append(sum(block["requested_size"] for block in blocks if block["state"] != "inactive"))
        self.reserved.append(sum(block["size"] for block in blocks))

    def allocate(self, size: int) -> None:
        rounded = -(-size // 512) * 512
        fits = [block for segment in self.segments.values() for block in segment
                if block["state"] == "inactive" and block["size"] >= rounded]  # fmt: skip
        if not fits:
            total = max(rounded, 2048)
            fits = [{"address": self.top, "size": total, "requested_size": 7, "state": "inactive"}]
            self.segments[self.top] = fits
            self.log("segment_alloc", self.top, total)
            self.top += total + 512
        block = fits[0]
        segment = next(segment for segment in self.segments.values() if block in segment)
        if block["size"] > rounded:
            rest = {"address": block["address"] + rounded, "size": block["size"] - rounded}
            segment.insert(segment.index(block) + 1, rest | {"requested_size": 0, "state": "inactive"})
        block |= {"size": rounded, "requested_size": size, "state": "active_allocated"}
        self.log("alloc", block["address"], size)

    def in_state(self, state: str) -> list[dict]:
        return [block for segment in self.segments.values() for block in segment if block["state"] == state]

    def request_free(self, number: int) -> None:
        if alive := self.in_state("active_allocated"):
            block = alive[number % len(alive)]
            block["state"] = "active_awaiting_free"
            self.log("free_requested", block["address"], block["requested_size"])

    def complete_frees(self) -> None:
        for block in self.in_state("active_awaiting_free"):
            block["state"] = "inactive"  # and remembers what was requested, as torch's blocks do
            self.log("free_completed", block["address"], block["requested_size"])
        for blocks in self.segments.values():
            for left, right in reversed(list(pairwise(blocks))):
                if left["state"] == right["state"] == "inactive":
                    left["size"] += right["size"]
                    blocks.remove(right)

    def empty_cache(self) -> None:
        for address, blocks in list(self.segments.items()):
            if all(block["state"] == "inactive" for block in blocks):
                del self.segments[address]
                self.log("segment_free", address, sum(block["size"] for block in blocks))

    def act(self, kind: int, number: int) -> None:
        self.time_us += number % 3
        if kind < 4:
            self.allocate(number)
        elif kind < 6:
            self.request_free(number)
        elif kind == 6:
            self.complete_frees()
        else:
            self.empty_cache()

    def final(self, device: int = 0) -> list[dict]:
        return [
            {
                "device": device,
                "address": address,
                "total_size": sum(block["size"] for block in blocks),
                "requested_size": sum(block["requested_size"] for block in blocks if block["state"] != "inactive"),
                "blocks": blocks,
            }
            for address, blocks in self.segments.items()
        ]


ACTS = st.lists(st.tuples(st.integers(0, 7), st.integers(1, 3000)), min_size=1, max_size=40)


def lived(acts) -> Allocator:
    allocator = Allocator()
    for act in acts:
        allocator.act(*act)
    return allocator


def dump(*traces, segments, protocol=4, **more) -> bytes:
    return pickle.dumps({"segments": segments, "device_traces": list(traces), **more}, protocol)


def alive_at_each(frame, times) -> list[int]:
    return [int(snapshot.at(frame, time)["size_bytes"].sum()) for time in times]
