"""The blocks that a step's tensors take of a GPU: torch's CUDA allocator, replayed on a timeline."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import NamedTuple

import pandas as pd

from effkit.activations.gpu_assumptions import BLOCK_BYTES, SEGMENT_BYTES, SMALL_BYTES
from effkit.activations.stepping import OPTIMIZER
from effkit.activations.timeline import RESIDENTS, Timeline


class Block(NamedTuple):
    """Bytes of a segment, which holds ``small`` requests or large ones: how many, of which one, from where on."""

    small: bool
    size: int
    segment: int
    start: int


class CachingAllocator:
    """Hands out the smallest free block that holds a request, from a new segment where none does, and cuts off what is
    left of it if that is enough; what is given back grows together with what is free beside it. On one stream, without
    ``expandable_segments``."""

    def __init__(self) -> None:
        self.reserved_bytes = self._num_segments = 0
        self._free: list[Block] = []  # in order
        self._beside: dict[tuple[int, int, bool], Block] = {}  # free ones, by segment and start, and by end

    def take(self, num_bytes: int) -> Block:
        """The block for a request."""
        size = max(1, -(-num_bytes // BLOCK_BYTES)) * BLOCK_BYTES
        small = size <= SMALL_BYTES
        place = bisect_left(self._free, (small, size))
        if place < len(self._free) and self._free[place].small == small:
            block = self._fuse(self._free[place])
        else:
            whole, step = next(kind for most, *kind in SEGMENT_BYTES if size < most)
            self._num_segments += 1
            block = Block(small, max(whole, -(-size // step) * step), self._num_segments, 0)
            self.reserved_bytes += block.size
        if block.size - size < (BLOCK_BYTES if small else SMALL_BYTES + 1):
            return block
        self._keep(block._replace(size=block.size - size, start=block.start + size))
        return block._replace(size=size)

    def give(self, block: Block) -> None:
        """It is free again."""
        edges = (block.segment, block.start, True), (block.segment, block.start + block.size, False)
        parts = [block, *(self._fuse(self._beside[edge]) for edge in edges if edge in self._beside)]
        self._keep(block._replace(size=sum(part.size for part in parts), start=min(part.start for part in parts)))

    def _keep(self, block: Block) -> None:
        insort(self._free, block)
        self._beside[block.segment, block.start, False] = block
        self._beside[block.segment, block.start + block.size, True] = block

    def _fuse(self, block: Block) -> Block:
        """Take a block from those that are free."""
        del self._free[bisect_left(self._free, block)]
        del self._beside[block.segment, block.start, False], self._beside[block.segment, block.start + block.size, True]
        return block


def in_blocks(timeline: Timeline, workspaces: Sequence[int] = ()) -> tuple[Timeline, int]:
    """The timeline with the sizes of blocks in the place of those of tensors; and what the allocator has reserved.

    The step is run twice, for a free block is as large as what was there before; the first makes the optimizer's state.
    ``workspaces`` are held throughout, and in the timeline already.
    """
    allocator, held = CachingAllocator(), defaultdict[tuple[str, int], list[Block]](list)
    frame = timeline.allocations[timeline.allocations["size_bytes"] > 0]
    sizes, categories = frame["size_bytes"].to_dict(), frame["category"].to_dict()
    born, dying = frame.groupby("birth").groups, frame.groupby("death").groups
    ending, num_ops = {op: list(ones) for op, ones in groupby(timeline.let_go, itemgetter(1))}, len(timeline.ops)
    updating = next((segment.first for segment in timeline.segments if segment.phase == OPTIMIZER), num_ops)
    there = [one for one in timeline.residents if one[0] != "optimizer state"]
    there += [("workspace", size) for size in workspaces]
    # those that every step replaces are not there before the first one ends
    replaced = Counter((category, size) for category, _, size in timeline.let_go)
    states = (Counter(one for one in timeline.residents if one[0] == "optimizer state") - replaced).elements()
    for steady in (False, True):
        for category, size in () if steady else there:
            held[category, size].append(allocator.take(size))
        resident, gone, taken = Counter[str](), [], dict[int, Block]()
        for (category, _), blocks in held.items():
            resident[category] += sum(block.size for block in blocks)
        for op in range(num_ops + 1):
            for i in dying.get(op, ()):
                if op == num_ops and categories[i] in RESIDENTS:
                    held[categories[i], sizes[i]].append(taken[i])
                else:
                    allocator.give(taken[i])
            for category, size in states if op == updating and not steady else ():
                held[category, size].append(allocator.take(size))
            for category, _, size in ending.get(op, ()):
                for block in held[category, size][:1]:
                    held[category, size].remove(block)
                    gone.append((category, op, block.size))
                    allocator.give(block)
            taken |= {i: allocator.take(sizes[i]) for i in born.get(op, ())}
    blocks_bytes = pd.Series({i: block.size for i, block in taken.items()}, dtype="int64")
    allocations = timeline.allocations.assign(size_bytes=blocks_bytes.reindex(timeline.allocations.index, fill_value=0))
    resident_bytes = {name: resident[name] for name in timeline.resident_bytes}
    placed = replace(timeline, allocations=allocations, resident_bytes=resident_bytes, let_go=tuple(gone))
    return placed, allocator.reserved_bytes
