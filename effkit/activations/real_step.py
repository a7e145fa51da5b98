"""Observe a real step: every operator followed, every allocation and free recorded, and the peak explained by both."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch._C._profiler import _RecordFunctionFast
from torch.nn.parallel import DistributedDataParallel

from effkit.activations.gpu_assumptions import held_by_cublas
from effkit.activations.sharding import buckets
from effkit.activations.storage_tracker import Follower
from effkit.activations.timeline import CATEGORIES, FLOPS, HALF_FLOPS, REQUESTED, RESERVED, SENT, Ints, Timeline
from effkit.device import synchronize
from effkit.recording import memory_events
from effkit.trace.tidying import Trace
from effkit.training import size_bytes, storages

Step = Callable[[Callable[[str], None]], None]
Residents = Callable[[], dict[str, list[torch.Tensor]]]
_MARK = "effkit::operator#"
_COUNTERS = {REQUESTED: "requested", RESERVED: "reserved"}  # of torch.cuda.memory_stats


def mark(number: int) -> Any:
    """A context to run the operator of this number in, whose begin and end a recording then has."""
    return _RecordFunctionFast(f"{_MARK}{number}")


class Recording(NamedTuple):
    """What the profiler saw of operators that ran in marks.

    ``numbers`` are the marks', ``starts`` and ``ends`` when each began and ended; ``memory`` are the allocations and
    frees, ``times`` when each was, ``levels`` the total before the first, and after each [bytes].
    """

    numbers: Any
    starts: Any
    ends: Any
    memory: pd.DataFrame
    times: Any
    levels: Any

    @classmethod
    def of(cls, recording: Trace, device: torch.device, *, since_first: bool = False) -> Recording:
        """The memory of this device; if ``since_first``, from the first mark on."""
        name = "cpu" if device.type == "cpu" else f"device{device.index or 0}"  # as recordings have it
        memory = recording.memory[recording.memory["device"] == name]
        marks = recording.events[recording.events["name"].str.startswith(_MARK)]
        numbers = marks["name"].str.removeprefix(_MARK).astype("int64").to_numpy()
        order = np.argsort(numbers)
        starts = marks["start_ns"].to_numpy()[order]
        if since_first:
            memory = memory[memory["time_ns"] >= starts[0]]
        totals = memory["total_bytes"].to_numpy("int64")
        before = int(totals[0] - memory["size_bytes"].iloc[0]) if len(memory) else 0
        return cls(numbers[order], starts, starts + marks["dur_ns"].to_numpy()[order], memory,
                   memory["time_ns"].to_numpy(), np.append(before, totals))  # fmt: skip

    def without_copies(self, sending: Any, followed: Any) -> Recording:
        """Without what is allocated from when these operators begin to when the next one does, but for what they are
        ``followed`` to make [addresses]: gloo copies what it sends, in threads of its own, at any time. NCCL does not.
        """
        order = np.argsort(self.times, kind="stable")  # threads' events may stand in another
        memory, times = self.memory.iloc[order], self.times[order]
        addresses, sizes = memory["address"].to_numpy(), memory["size_bytes"].to_numpy("int64")
        numbers = np.searchsorted(self.starts, times, "right") - 1
        copied = np.isin(numbers, sending) & (sizes > 0) & ~np.isin(addresses, followed)
        kept, copies = ~copied, set[int]()
        for i in np.flatnonzero(np.isin(addresses, addresses[copied])).tolist():
            if copied[i]:
                copies.add(int(addresses[i]))
            elif addresses[i] in copies:  # freed, or given to another by then
                copies.discard(int(addresses[i]))
                kept[i] = sizes[i] > 0
        levels = np.append(self.levels[0], self.levels[0] + sizes[kept].cumsum())
        return self._replace(memory=memory[kept], times=times[kept], levels=levels)

    def inside(self, kept: Ints) -> Ints:
        """How far the level rose during each operator beyond what the operator left behind, ``kept`` [bytes]."""
        first = np.searchsorted(self.times, self.starts, "left")
        last = np.searchsorted(self.times, self.ends, "right")
        highest = np.array([self.levels[a : b + 1].max() for a, b in zip(first, last, strict=True)], dtype="int64")
        return np.maximum(0, highest - self.levels[first] - kept)


class Observation(NamedTuple):
    """One step that was really run.

    ``timeline`` knows what each operator allocates inside itself; ``rows`` is what
    the recorded allocations that are alive at the peak are for [bytes], ``peak_bytes`` what the allocator counted then,
    ``source`` who says so; ``kept_bytes`` is what it counted above the residents when backward began; ``counters`` are
    what else it counted, by name [bytes].
    """

    timeline: Timeline
    rows: dict[str, int]
    peak_bytes: int
    source: str
    kept_bytes: int
    counters: Mapping[str, int]

    def forward_flops(self) -> tuple[int, int]:
        """FLOPs of the forward pass in single precision, and in half."""
        work = self.timeline.work[: self.timeline.backward]
        return int(work[:, FLOPS].sum()), int(work[:, HALF_FLOPS].sum())


def observe(step: Step, model: torch.nn.Module, residents: Residents) -> Observation:
    """Run ``step(enter)`` once, and twice more where it replaces what was there before it.

    On a GPU the peak is the allocator's own; on the CPU it is what the profiler's running total rose by, and what was
    there before it: ``residents()``. That total does not fall when a block is freed that is older than the recording.
    """
    if (kind := next(model.parameters()).device.type) not in ("cpu", "cuda"):
        raise ValueError(f"{type(model).__name__} is on {kind}, where nobody has followed what a step allocates: move "
                         "it to CUDA or to the CPU; capture() says its peak, where torch counts one")  # fmt: skip
    seen = _observed(step, model, residents)
    return _observed(step, model, residents, again=True) if seen.timeline.let_go and kind == "cpu" else seen


def _observed(step: Step, model: torch.nn.Module, residents: Residents, *, again: bool = False) -> Observation:
    """If ``again``, the recording has two steps, of which the second is followed."""
    device = next(model.parameters()).device
    cuda = device.type == "cuda"
    # asked for at once, which lets go of gradients: a recording would see the end of those that an earlier one saw made
    beyond = beyond_tensors(residents(), torch.cuda.memory_snapshot() if cuda else ())
    beyond[SENT] = size_bytes(buckets(model)) if isinstance(model, DistributedDataParallel) else 0
    followers: list[Follower] = []

    def follow() -> None:
        if again:
            step(lambda phase: None)
        follower = Follower(residents(), mark)
        followers.append(follower)
        with follower.following(model):
            step(follower.enter)

    if cuda:
        synchronize()
        torch.cuda.reset_peak_memory_stats(device)
    recording = Recording.of(memory_events(follow), device, since_first=again)
    counted, counters = None, {}
    if cuda:
        counted, peaks = torch.cuda.max_memory_allocated(device), torch.cuda.memory_stats(device)
        counters = {name: peaks[f"{key}_bytes.all.peak"] for name, key in _COUNTERS.items()}
        beyond["workspace"] = held_by_cublas()
    (follower,) = followers
    timeline = follower.timeline()
    sending = [i for i, one in enumerate(timeline.ops) if "c10d" in one]
    if sending and not cuda:
        made = timeline.allocations["birth"].isin(sending)
        recording = recording.without_copies(sending, follower.addresses[made])
    _, starts, _, memory, times, levels = recording
    before = int(levels[0])
    at = int(levels[1:].argmax()) if len(memory) else -1
    op = int(np.searchsorted(starts, times[at], "right")) - 1 if at >= 0 else -1
    rows = Counter(timeline.resident_bytes)
    rows.subtract(Counter({name: amount for name, last, amount in timeline.let_go if last <= op}))
    rows.update(_alive(memory.iloc[: at + 1], follower, timeline, op))
    rows.update(beyond)
    source = "torch.cuda.max_memory_allocated"
    if counted is None:
        above = max(0, int(levels[at + 1]) - before) if at >= 0 else 0
        counted = beyond[SENT] + sum(timeline.resident_bytes.values()) + above
        source = "resident tensors + the profiler's Total Allocated"
    # nothing is kept for a backward pass that never comes
    backward = starts[timeline.backward : timeline.backward + 1]
    kept = int(levels[np.searchsorted(times, backward[0], "left")]) - before if len(backward) else 0
    made = np.bincount(timeline.allocations["birth"], timeline.allocations["size_bytes"], minlength=len(timeline.ops))
    return Observation(
        replace(timeline, inside_bytes=recording.inside(made.astype("int64"))),
        {name: rows[name] for name in CATEGORIES if rows.get(name)}, counted, source, kept, counters,
    )  # fmt: skip


def beyond_tensors(residents: Mapping[str, Sequence[torch.Tensor]], segments: Sequence[Any]) -> dict[str, int]:
    """By how much the blocks of a GPU's allocator are larger than the residents in them [bytes], by category."""
    blocks = {block["address"]: block["size"] for segment in segments for block in segment["blocks"]}
    return {category: sum(blocks.get(one.data_ptr(), one.nbytes()) - one.nbytes() for held in tensors
                          for one in storages(held)) for category, tensors in residents.items()}  # fmt: skip


def _alive(memory: pd.DataFrame, follower: Follower, timeline: Timeline, op: int) -> dict[str, int]:
    """What the recorded allocations that are still alive were followed to be for; the rest lives inside an operator."""
    last = memory.drop_duplicates("address", keep="last")
    alive = last[last["size_bytes"] > 0].set_index("address")["size_bytes"]
    frame = timeline.allocations
    followed = frame[(frame["birth"] <= op) & (frame["death"] > op)]
    category = pd.Series(followed["category"].astype("str").to_numpy(), index=follower.addresses[followed.index])
    purpose = category[~category.index.duplicated()].reindex(alive.index).fillna("workspace")
    return {str(name): int(amount) for name, amount in alive.groupby(purpose.to_numpy()).sum().items()}
