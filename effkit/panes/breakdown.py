"""The overview: where each step's wall time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from effkit import markup
from effkit.panes.steps import WHOLE, steps
from effkit.trace import impossible, intervals, names, nesting

# In this order: a moment belongs to the first of them that it shows. They sum to dur_ns.
PARTS = (
    "kernel_ns", "exposed_communication_ns", "memcpy_ns", "dataloader_ns", "not_visible_ns", "cpu_exec_ns", "idle_ns",
)  # fmt: skip
_HELD_UP = ("first_launch_ns", "num_waits", "behind_waits_ns")
_DEVICE_PARTS = ("kernel_ns", "memcpy_ns", "device_ns", *_HELD_UP)
_UNUSUAL = 10  # times as long as the usual launch
NO_DEVICE = "no device activity was recorded: its columns are absent"


def communication(events: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Events that move data between ranks: kernels on the device, and calls of libraries that work on the host."""
    candidates = events[names.by_name(events["name"], names.communicates)]
    kernels = candidates[candidates["category"] == "kernel"]
    calls = candidates[candidates["category"] == "user_annotation"]
    backends = calls["name"].str.extract(names.COLLECTIVE)["backend"]
    return kernels, calls[backends.notna() & ~backends.isin(names.DEVICE_BACKENDS)]


def computing(events: pd.DataFrame) -> pd.DataFrame:
    """Operators of the host that compute: not those that move data, nor those that wait around such a one."""
    tree = nesting.host(events)
    moves = names.by_name(tree["name"], names.communicates).astype("int64")
    return tree[(tree["category"] == "cpu_op") & (nesting.with_inner(nesting.parents(tree), moves) == 0)]


def breakdown(events: pd.DataFrame, step: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """The overview of one rank, and what has to be said of it."""
    rank = int(events["rank"].iloc[0]) if len(events) else 0
    events, strange, notes = impossible.understood(events)
    category = events["category"]
    on_device = events[category.isin(names.DEVICE)]
    launches = events[category.str.endswith(names.LAUNCHES)]
    marked, source = steps(pd.concat([events, strange]) if len(strange) else events, step)
    starts, ends = _lasting(marked, source, launches, on_device)
    kernels, calls = communication(events)
    device = intervals.of(on_device)
    waiting = launches["name"].str.contains(names.WAITS)
    waits = launches[waiting]
    blind = _blind(waits, device)  # the host waits for the device, and nothing that this did is in the recording
    parts: dict[str, tuple[pd.DataFrame, ...]] = {
        "kernel_ns": (on_device[on_device["category"] == "kernel"].drop(kernels.index),),
        "exposed_communication_ns": (kernels, calls),
        "memcpy_ns": (on_device[on_device["category"].isin(names.COPIES)],),
        "dataloader_ns": (events[events["name"].str.startswith(names.DATALOADER)],),
        "not_visible_ns": (blind,),
        "cpu_exec_ns": (events[category == "cpu_op"], launches),
    }
    if on_device.empty:  # then operators are what computes, unless they wait, and communication can hide under them
        first = {"not_visible_ns": parts["not_visible_ns"], "cpu_exec_ns": (computing(events),)}
        parts = first | parts | first
    columns = {"rank": rank, "step": np.arange(len(starts)), "start_ns": starts, "dur_ns": ends - starts}
    frame = pd.DataFrame(columns).astype("int64")
    before: list[pd.DataFrame] = []
    covered = np.zeros(len(starts), dtype="int64")
    for name, frames in parts.items():
        if name == "cpu_exec_ns":  # of which
            slow = intervals.of(*before, _first_launches(launches[~waiting], on_device))
            frame["first_launch_ns"] = slow.within(starts, ends) - covered
        before += frames
        reach = intervals.of(*before).within(starts, ends)
        frame[name] = reach - covered
        covered = reach
    # neither was idle: what no pane knows, and a device that was given work of which nothing is recorded
    given = launches[launches["name"].str.contains(names.GIVES_WORK)]
    unseen = intervals.of(*before, strange).within(starts, ends) - covered
    if on_device.empty and len(given):
        unseen = frame["dur_ns"] - covered
    frame["not_visible_ns"] += unseen
    frame["idle_ns"] = frame["dur_ns"] - covered - unseen
    moves, computes = parts["exposed_communication_ns"], parts["cpu_exec_ns" if on_device.empty else "kernel_ns"]
    alone, both, without = (
        intervals.of(*frames).within(starts, ends) for frames in (moves, (*moves, *computes), computes)
    )
    frame["hidden_communication_ns"] = alone + without - both
    frame["device_ns"] = device.within(starts, ends)
    frame["num_waits"] = np.subtract(*(np.searchsorted(waits["start_ns"], moments) for moments in (ends, starts)))
    frame["behind_waits_ns"] = _behind(waits, device, intervals.of(blind), starts, ends) if len(starts) else 0
    notes = [f"steps from {source}", *notes]
    if on_device.empty:
        frame[[*_DEVICE_PARTS, *(["not_visible_ns"] if launches.empty and strange.empty else [])]] = pd.NA
        notes += [NO_DEVICE] if strange.empty else []
    links = given["correlation"].dropna()
    if lost := int((~links.isin(on_device["correlation"])).sum()):
        notes.append(f"of {lost:,} of {len(links):,} launches and copies the device's own work is not in the recording")
    frame = frame.astype(dict.fromkeys((*_DEVICE_PARTS, "not_visible_ns"), "Int64"))
    frame["device_busy_frac"] = frame["device_ns"] / frame["dur_ns"].replace(0, pd.NA).astype("Int64")
    order = ["start_ns", "dur_ns", *PARTS, "hidden_communication_ns", "device_busy_frac", *_HELD_UP]
    frame = frame.set_index(["rank", "step"])[order]
    return frame.assign(phase=marked["phase"].to_numpy()) if "phase" in marked else frame, notes


def of_steps(events: pd.DataFrame, step: str | None = None) -> pd.DataFrame:
    """Those of one rank's events that are part of a step: what its host began within a mark, and what its device began
    while the step lasted."""
    marked, source = steps(events, step)
    if source == WHOLE:
        return events
    category = events["category"]
    of_device = category.isin(names.DEVICE)
    starts, ends = _lasting(marked, source, events[category.str.endswith(names.LAUNCHES)], events[of_device])
    lasting = pd.DataFrame({"start_ns": starts, "dur_ns": ends - starts})
    on_host, on_device = (intervals.of(spans).hold(events["start_ns"]) for spans in (marked, lasting))
    return events[np.where(of_device, on_device, on_host)].reset_index(drop=True)


def _first_launches(launches: pd.DataFrame, on_device: pd.DataFrame) -> pd.DataFrame:
    """Launches that had to load what they launch: the first of a kernel, and far longer than others of their kind."""
    linked = on_device.dropna(subset="correlation").drop_duplicates("correlation")
    kernels = linked.set_index("correlation")["name"]
    of_kernel = launches["correlation"].map(kernels).astype(object).fillna(launches["name"])
    usual = launches["dur_ns"].groupby(launches["name"]).transform("median")
    return launches[~of_kernel.duplicated() & (launches["dur_ns"] > _UNUSUAL * usual)]


def _behind(waits: pd.DataFrame, device: intervals.Covered, blind: intervals.Covered, starts: Any, ends: Any) -> Any:
    """Of each step, the most that the device would have idled less, had the host not waited for it [ns].

    What the host launched after a wait would have come earlier, by no more than the wait was long, and no more than the
    device idled before it: each gap between two pieces of work is shortened by the waits that ended before its end. One
    that reaches into the next step counts for the step in which it begins.
    """
    waits = waits[waits["start_ns"].between(starts[0], ends[-1], inclusive="left")]
    done = (waits["start_ns"] + waits["dur_ns"]).to_numpy("int64")
    begins = np.clip(np.append(starts[0], device.ends), starts[0], ends[-1])
    closes = np.clip(np.append(device.starts, ends[-1]), starts[0], ends[-1])
    waited = np.bincount(np.searchsorted(device.starts, done, side="right"), waits["dur_ns"], len(begins))
    idle = intervals.union(starts, ends).within(begins, closes) - blind.within(begins, closes)
    saved = np.clip(idle, 0, waited)
    step = np.searchsorted(starts, begins, side="right") - 1
    return np.bincount(step, saved, len(starts)).astype("int64")


def _blind(waits: pd.DataFrame, device: intervals.Covered) -> pd.DataFrame:
    """Each wait until the first recorded work of the device in it: between two pieces of work it is known to idle."""
    start = waits["start_ns"].to_numpy("int64")
    place = np.searchsorted(device.starts, start, side="left")
    begins = np.append(device.starts, np.iinfo("int64").max)[place]
    return waits.assign(dur_ns=np.minimum(waits["dur_ns"].to_numpy("int64"), begins - start))


def _lasting(marked: pd.DataFrame, source: str, launches: pd.DataFrame, on_device: pd.DataFrame) -> tuple[Any, Any]:
    """Starts and ends of steps, each until what it launched has run; the next step begins no earlier. The same rule as
    the TensorBoard plugin's: the host runs ahead of the device, and a mark is made on the host."""
    starts = marked["start_ns"].to_numpy("int64")
    ends = starts + marked["dur_ns"].to_numpy("int64")
    if source == WHOLE:
        return starts, ends
    linked = launches.drop_duplicates("correlation").dropna(subset="correlation").set_index("correlation")["start_ns"]
    launched = on_device["correlation"].map(linked).astype("Int64").fillna(-1).to_numpy("int64")
    # in which step each kernel was launched: the last that had begun, unless it had ended
    step = np.searchsorted(starts, launched, side="right") - 1
    step = np.where((step >= 0) & (launched < ends[step]), step, -1) if len(starts) else step
    begun = on_device["start_ns"].to_numpy("int64")
    done = begun + on_device["dur_ns"].to_numpy("int64")
    if not (step >= 0).any():
        return starts, ends
    # a stream works in order: what no step launched, and came before the first that one did, is of an earlier step
    latest = np.iinfo("int64").max
    streams = on_device.groupby(["process", "stream"], sort=False, dropna=False).ngroup().to_numpy()
    first = pd.Series(np.where(step >= 0, begun, latest)).groupby(streams).transform("min").to_numpy("int64")
    own = first < latest
    earlier = done[(step < 0) & np.where(own, begun < first, done < first.min())]
    previous = earlier.max(initial=starts[0])
    ends = np.maximum(ends, previous)
    np.maximum.at(ends, step[step >= 0], done[step >= 0])
    ends = np.maximum.accumulate(ends)
    return np.maximum(starts, np.append(previous, ends[:-1])), ends


class _Overview(pd.DataFrame):
    """A frame that is displayed with its suggestions and notes; what is made of it is a frame like any other."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return pd.DataFrame

    def _repr_html_(self) -> str:
        return f"{super()._repr_html_() or ''}{markup.points([*self.attrs['suggestions'], *self.attrs['notes']])}"


def overview(parts: Sequence[tuple[pd.DataFrame, list[str]]]) -> pd.DataFrame:
    """The overviews of all ranks as one frame; ``attrs`` holds ``notes`` and ``suggestions``."""
    frame = _Overview(pd.concat([frame for frame, _ in parts]).sort_index())
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
_CANNOT_HIDE = "is communication that no computation hides, nor could: send less, or wait less for one another"
_LEAST_FRAC = 0.05  # of the time, of first launches, or of computation that could hide communication


def room(frame: pd.DataFrame) -> pd.Series[int]:
    """Of each step, how much more communication could be hidden: no more than there is computation that hides none."""
    computing = frame["kernel_ns"].fillna(frame["cpu_exec_ns"]) - frame["hidden_communication_ns"]
    return computing.clip(upper=frame["exposed_communication_ns"])


def cold(frame: pd.DataFrame) -> list[str]:
    """What an overview shows of a recording that began before the run was steady; empty where it shows nothing."""
    share = float(frame["first_launch_ns"].sum()) / max(1, int(frame["dur_ns"].sum()))
    return [f"{share:.0%} of the time is spent in first launches, each over {_UNUSUAL} times as long as the usual one: "
            "record after a warm-up"] if share >= _LEAST_FRAC else []  # fmt: skip


def suggestions(frame: pd.DataFrame) -> list[str]:
    """What the numbers of an overview support saying; empty where they support nothing."""
    once = int(frame["first_launch_ns"].sum())  # which a steady run does not pay
    total = int(frame["dur_ns"].sum()) - once
    if total <= 0:
        return cold(frame)
    parts = {name: int(frame[name].sum()) for name in PARTS if frame[name].notna().any()}
    share = {name: (time - once * (name == "cpu_exec_ns")) / total for name, time in parts.items()}
    noticeable = {name: word for name, (least, word) in _ADVICE.items() if share.get(name, 0) >= least}
    if "kernel_ns" in share and share["cpu_exec_ns"] >= _LAUNCH_BOUND:
        noticeable["cpu_exec_ns"] = _LAUNCHING
    if room(frame).sum() < _LEAST_FRAC * total and "exposed_communication_ns" in noticeable:
        noticeable["exposed_communication_ns"] = _CANNOT_HIDE
    return [*cold(frame), *(f"{share[name]:.0%} of the time {word}" for name, word in noticeable.items())]
