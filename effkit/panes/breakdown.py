"""The overview: where each step's wall time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from effkit.operators import COMMUNICATES
from effkit.panes.steps import WHOLE, steps
from effkit.trace import intervals, nesting
from effkit.trace.names import COLLECTIVE, COPIES, DATALOADER, DEVICE, DEVICE_BACKENDS, LAUNCHES, WAITS

# In this order: a moment belongs to the first of them that it shows. They sum to dur_ns.
PARTS = (
    "kernel_ns", "exposed_communication_ns", "memcpy_ns", "dataloader_ns", "not_visible_ns", "cpu_exec_ns", "idle_ns",
)  # fmt: skip
_DEVICE_PARTS = ("kernel_ns", "memcpy_ns", "device_ns", "device_span_ns")
NO_DEVICE = "no device activity was recorded: its columns are absent"


def communication(events: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Events that move data between ranks: kernels on the device, and calls of libraries that work on the host."""
    names = pd.Series({name: bool(COMMUNICATES.search(name)) for name in events["name"].unique()}, dtype=bool)
    candidates = events[events["name"].map(names).to_numpy(dtype=bool)]
    kernels = candidates[candidates["category"] == "kernel"]
    calls = candidates[candidates["category"] == "user_annotation"]
    backends = calls["name"].str.extract(COLLECTIVE)["backend"]
    return kernels, calls[backends.notna() & ~backends.isin(DEVICE_BACKENDS)]


def computing(events: pd.DataFrame) -> pd.DataFrame:
    """Operators of the host that compute: not those that move data, nor those that wait around such a one."""
    tree = nesting.host(events)
    parent = nesting.parents(tree)
    around = tree["name"].str.contains(COMMUNICATES).to_numpy(copy=True)
    climbing = parent[around]
    while (climbing := np.unique(climbing[climbing >= 0])).size:
        around[climbing] = True
        climbing = parent[climbing]
    return tree[(tree["category"] == "cpu_op") & ~around]


def breakdown(events: pd.DataFrame, step: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The overview of one rank, and what has to be said of it."""
    rank = int(events["rank"].iloc[0]) if len(events) else 0
    marked, source = steps(events, step)
    category = events["category"]
    on_device = events[category.isin(DEVICE)]
    launches = events[category.str.endswith(LAUNCHES)]
    starts = marked["start_ns"].to_numpy("int64")
    ends = starts + marked["dur_ns"].to_numpy("int64")
    if source != WHOLE:
        starts, ends = _with_their_device_work(starts, ends, launches, on_device)
    kernels, calls = communication(events)
    operators = events[category == "cpu_op"]
    device = intervals.of(on_device)
    parts: dict[str, tuple[pd.DataFrame, ...]] = {
        "kernel_ns": (on_device[on_device["category"] == "kernel"].drop(kernels.index),),
        "exposed_communication_ns": (kernels, calls),
        "memcpy_ns": (on_device[on_device["category"].isin(COPIES)],),
        "dataloader_ns": (events[events["name"].str.startswith(DATALOADER)],),
        # the host waits for the device, and nothing that the device did is in the recording
        "not_visible_ns": (_blind(launches[launches["name"].str.contains(WAITS)], device),),
        "cpu_exec_ns": (operators, launches),
    }
    if on_device.empty:  # then operators are what computes, and communication can hide under them
        del parts["cpu_exec_ns"]
        parts = {"cpu_exec_ns": (computing(events),)} | parts
    columns = {"rank": rank, "step": np.arange(len(starts)), "start_ns": starts, "dur_ns": ends - starts}
    frame = pd.DataFrame(columns).astype("int64")
    before: list[pd.DataFrame] = []
    covered = np.zeros(len(starts), dtype="int64")
    for name, frames in parts.items():
        before += frames
        reach = intervals.of(*before).within(starts, ends)
        frame[name] = reach - covered
        covered = reach
    frame["idle_ns"] = frame["dur_ns"] - covered
    moves, computes = parts["exposed_communication_ns"], parts["cpu_exec_ns" if on_device.empty else "kernel_ns"]
    alone, both, without = (
        intervals.of(*frames).within(starts, ends) for frames in (moves, (*moves, *computes), computes)
    )
    frame["hidden_communication_ns"] = alone + without - both
    frame["device_ns"] = device.within(starts, ends)
    frame["device_span_ns"] = _span(device, starts, ends)
    notes = [f"steps from {source}"]
    absent = [*_DEVICE_PARTS, *(["not_visible_ns"] if launches.empty else [])] if on_device.empty else []
    if absent:
        frame[absent] = pd.NA
        notes.append(NO_DEVICE)
    frame = frame.astype(dict.fromkeys((*_DEVICE_PARTS, "not_visible_ns"), "Int64"))
    frame["device_busy_frac"] = frame["device_ns"] / frame["dur_ns"].replace(0, pd.NA).astype("Int64")
    order = ["start_ns", "dur_ns", *PARTS, "hidden_communication_ns", "device_span_ns", "device_busy_frac"]
    return frame.set_index(["rank", "step"])[order], notes


def _blind(waits: pd.DataFrame, device: intervals.Covered) -> pd.DataFrame:
    """Each wait until the first recorded work of the device in it: between two pieces of work it is known to idle."""
    start = waits["start_ns"].to_numpy("int64")
    place = np.searchsorted(device.starts, start, side="left")
    begins = np.append(device.starts, np.iinfo("int64").max)[place]
    return waits.assign(dur_ns=np.minimum(waits["dur_ns"].to_numpy("int64"), begins - start))


def _with_their_device_work(starts: Any, ends: Any, launches: pd.DataFrame, on_device: pd.DataFrame) -> tuple[Any, Any]:
    """Starts and ends of the steps, each until what it launched has run; the next step begins no earlier. The same rule
    as the TensorBoard plugin's: the host runs ahead of the device, and a mark is made on the host."""
    starts = starts.copy()
    linked = launches.drop_duplicates("correlation").dropna(subset="correlation").set_index("correlation")["start_ns"]
    launched = on_device["correlation"].map(linked).astype("Int64").fillna(-1).to_numpy("int64")
    # in which step each kernel was launched: the last that had begun, unless it had ended
    step = np.searchsorted(starts, launched, side="right") - 1
    step = np.where((step >= 0) & (launched < ends[step]), step, -1) if len(starts) else step
    begun = on_device["start_ns"].to_numpy("int64")
    done = begun + on_device["dur_ns"].to_numpy("int64")
    if not (step >= 0).any():
        return starts, ends
    earlier = done[(step < 0) & (done < begun[step == step[step >= 0].min()].min())]
    previous = earlier.max(initial=starts[0])
    for i in range(len(starts)):
        starts[i] = max(starts[i], previous)
        ends[i] = previous = max(starts[i], ends[i], done[step == i].max(initial=ends[i]))
    return starts, ends


def _span(device: intervals.Covered, starts: Any, ends: Any) -> Any:
    """From the first to the last moment of a step in which the device is busy [ns]."""
    if not len(device.starts):
        return np.zeros(len(starts), dtype="int64")
    first = np.searchsorted(device.ends, starts, side="right")
    last = np.searchsorted(device.starts, ends, side="left") - 1
    busy = (first < len(device.starts)) & (last >= first)
    first, last = np.minimum(first, len(device.starts) - 1), np.maximum(last, 0)
    span = np.minimum(device.ends[last], ends) - np.maximum(device.starts[first], starts)
    return np.where(busy, span, 0)


def overview(parts: Sequence[tuple[pd.DataFrame, list[str]]]) -> pd.DataFrame:
    """The overviews of all ranks as one frame; ``attrs`` holds ``notes`` and ``suggestions``."""
    frame = pd.concat([frame for frame, _ in parts]).sort_index()
    frame.attrs["notes"] = list(dict.fromkeys(note for _, notes in parts for note in notes))
    frame.attrs["suggestions"] = suggestions(frame)
    return frame


def mean_of(column: pd.Series[Any]) -> float:
    """The mean over the ranks of each one's mean over its steps, of a column of an overview."""
    return float(column.astype("float64").groupby(level="rank").mean().mean())


# part of the time, from which share on it is worth a word, and the word
_ADVICE: Mapping[str, tuple[float, str]] = {
    "exposed_communication_ns": (0.15, "is communication that no computation hides: overlap it, or send less"),
    "dataloader_ns": (0.05, "waits for the DataLoader: more workers, or cheaper preparation"),
    "memcpy_ns": (0.10, "copies to or from the device: pinned memory, or copy less often"),
    "not_visible_ns": (0.10, "waits for device work that was not recorded (launched before the recording, or hidden "
                             "in a graph): it says nothing about whether the device was idle"),
}  # fmt: skip
_LAUNCH_BOUND = 0.25  # of the time, where a device was recorded
_LAUNCHING = "the device idles while the host runs operators and launches: larger batches, CUDA graphs or torch.compile"


def suggestions(frame: pd.DataFrame) -> list[str]:
    """What the numbers of an overview support saying; empty where they support nothing."""
    total = int(frame["dur_ns"].sum())
    if not total:
        return []
    share = {name: float(frame[name].sum() / total) for name in PARTS if frame[name].notna().any()}
    noticeable = {name: word for name, (least, word) in _ADVICE.items() if share.get(name, 0) >= least}
    if "kernel_ns" in share and share["cpu_exec_ns"] >= _LAUNCH_BOUND:
        noticeable["cpu_exec_ns"] = _LAUNCHING
    return [f"{share[name]:.0%} of the time {word}" for name, word in noticeable.items()]
