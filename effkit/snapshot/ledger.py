"""The allocator's events and final state on one device, checked against each other byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from effkit.snapshot.lifetimes import distinct, pair
from effkit.snapshot.stacks import NOTHING, Stacks

ALLOC, FREE, RESERVE, RETURN, OOM = range(1, 6)
_KINDS = {
    "alloc": ALLOC, "free": FREE, "free_completed": FREE, "segment_alloc": RESERVE, "segment_map": RESERVE,
    "segment_free": RETURN, "segment_unmap": RETURN, "oom": OOM,
}  # fmt: skip
_LATEST_US = 2**62 // 1000
_NEAR = 2**12  # events that are still in the processor's cache when they are read again
_MOST_BYTES = 2**42  # no device has 4 TiB, and a million of these still add up within 64 bits


class _Block(NamedTuple):
    address: int
    size: int
    requested: int
    state: str
    stack: int


class Ledger:
    """One device: ``kinds``, ``times`` [ns], ``addresses``, ``sizes`` [bytes] and ``stacks`` of its events.

    ValueError when the events do not lead to the final state.
    """

    def __init__(self, trace: list[dict[str, Any]], segments: list[dict[str, Any]], stacks: Stacks) -> None:
        self.ranges = [(segment["address"], segment["address"] + segment["total_size"]) for segment in segments]
        self.blocks = [block for segment in segments for block in _blocks(segment, stacks)]
        self._active = [block for block in self.blocks if block.state != "inactive"]
        self._read(trace, stacks)
        self.final_bytes = {
            "requested_bytes": sum(block.requested for block in self._active),
            "allocated_bytes": sum(block.size for block in self._active if block.state == "active_allocated"),
            "active_bytes": sum(block.size for block in self._active),
            "reserved_bytes": sum(block.size for block in self.blocks),
        }
        self.levels = self._levels(ALLOC, FREE, self.final_bytes["requested_bytes"])
        self.reserved_levels = self._levels(RESERVE, RETURN, self.final_bytes["reserved_bytes"])
        if (self.levels > self.reserved_levels).any():
            raise ValueError("its trace allocates more than was reserved")

    def _read(self, trace: list[dict[str, Any]], stacks: Stacks) -> None:
        kinds, sizes, addresses, times_us, numbers = ([] for _ in range(5))
        for begin in range(0, len(trace), _NEAR):
            near = trace[begin : begin + _NEAR]
            kinds += [_KINDS.get(event["action"], 0) for event in near]
            sizes += [event.get("size", 0) for event in near]
            # an event of no memory left tells what was free on the device instead of an address
            addresses += [event.get("addr", event.get("device_free")) for event in near]
            times_us += [event.get("time_us", 0) for event in near]
            numbers += [stacks.number(event.get("frames")) for event in near]
        self.kinds = np.array(kinds, dtype="int8")
        self.sizes = _integers(sizes)
        _bounded(self.sizes[(self.kinds > 0) & (self.kinds < OOM)], _MOST_BYTES)
        self.addresses = _integers(addresses)
        times = _bounded(_integers(times_us), _LATEST_US)
        self.times_are_recorded = bool(times.any())  # torch before 2.1 writes none: then events are counted
        self.times = distinct(times * 1000)
        self.stacks = np.array(numbers, dtype="int64")
        self.parts = np.array([*stacks.parts, NOTHING], dtype="int64")[self.stacks]

    def _levels(self, grows: int, shrinks: int, final: int) -> Any:
        signed = self.sizes * ((self.kinds == grows) * 1 - (self.kinds == shrinks))
        levels = np.append(0, np.cumsum(signed))
        return levels + (final - levels[-1])

    def lives(self) -> tuple[Any, Any, Any, Any, Any]:
        """Of each allocation: size [bytes], event of birth (-1: before), event of death, stack; of each event: part.

        Blocks that are alive at the end close their allocations, with events from ``len(kinds)`` on.
        """
        changes = np.flatnonzero((self.kinds == ALLOC) | (self.kinds == FREE))
        active = self._active
        born = np.append(self.kinds[changes] == ALLOC, np.zeros(len(active), dtype=bool))
        places = np.append(self.addresses[changes], _integers([block.address for block in active]))
        sizes = np.append(self.sizes[changes], _bounded(_integers([block.requested for block in active]), _MOST_BYTES))
        codes = np.append(self.stacks[changes], _integers([block.stack for block in active]))
        events = np.append(changes, np.arange(len(active)) + len(self.kinds))

        birth, death = pair(born, places)
        has_birth, freed = birth >= 0, death < len(changes)
        unlike = (sizes[birth] != sizes[death])[has_birth]
        # without a birth only the first event of a place can end what was there before
        if (death < 0).any() or unlike.any() or pd.Series(places).duplicated().to_numpy()[death[~has_birth]].any():
            raise ValueError(
                "its trace does not lead to its final segments; record every action (skip_actions may leave out "
                "free_requested alone)"
            )
        # Frees that never have a stack of their own repeat that of their allocation, and tell nothing of when.
        tells = (self.kinds == ALLOC) | (codes[birth] != codes[death])[has_birth & freed].any()
        parts = np.where(tells, self.parts, NOTHING)
        # a block keeps the stack that allocated it; a free does not
        stack = np.where(has_birth, codes[birth], np.where(freed, -1, codes[death]))
        return sizes[death], np.where(has_birth, events[birth], -1), events[death], stack, parts


def _blocks(segment: dict[str, Any], stacks: Stacks) -> Iterator[_Block]:
    """The blocks of a segment, which must fill it; in torch 2.0 they had a history and no address."""
    address, requested = segment["address"], 0
    for block in segment["blocks"]:
        past = (block.get("history") or [{}])[0]
        block = _Block(
            block.get("address", address),
            block["size"],
            block.get("requested_size", past.get("real_size", block["size"])),
            block["state"],
            stacks.number(block.get("frames") or past.get("frames")),
        )
        address += block.size
        requested += block.requested * (block.state != "inactive")
        yield block
    if address - segment["address"] != segment["total_size"]:
        raise ValueError("the blocks of a segment do not fill it")
    if requested != segment.get("requested_size", requested):
        raise ValueError("the blocks of a segment do not add up to what it says was requested")


def _integers(values: list[Any]) -> Any:
    array = np.array(values, dtype=None if values else "int64")
    if array.dtype != "int64" or array.ndim != 1:
        raise ValueError("something in the place of a number is none, or is beyond 64 bits")
    return array


def _bounded(numbers: Any, limit: int) -> Any:
    if len(numbers) and not (numbers.min() >= 0 and numbers.max() < limit):
        raise ValueError("a size or a time in it is beyond all bounds")
    return numbers
