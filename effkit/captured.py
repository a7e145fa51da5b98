"""Capture: one profiled run, live or recorded, and the panes that summarise it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from effkit import markup, panes, snapshot, storage
from effkit.account import Account
from effkit.datasheets import datasheet_of
from effkit.panes import matrix_products, perfetto, tensorboard
from effkit.panes.steps import marks
from effkit.units import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from effkit.receipt import Receipt


# What was recorded of one device's memory on one rank: facts, allocations and segments
Memory = tuple[Mapping[str, Any], pd.DataFrame, pd.DataFrame | None]


@dataclass(frozen=True, eq=False)
class Capture:
    """One profiled run.

    Attributes
    ----------
    events
        One row per event: ``name, category, start_ns, dur_ns, rank, process, thread, stream, correlation``, and those
        of ``effkit.trace.DETAIL_COLUMNS`` that were asked for and recorded. ``category`` is Kineto's word.
    allocations
        One row per allocation: ``size_bytes, alloc_ns, free_ns, device, rank, stack, category, known_by``; ``None``
        where memory was not recorded (absent, never zero).
    provenance
        Device, torch version, date, settings, what was profiled, and what profiling itself cost.
    segments
        One row per piece of memory that the allocator reserved: ``size_bytes, alloc_ns, free_ns, device, rank``;
        ``None`` where that was not recorded.
    """

    events: pd.DataFrame
    allocations: pd.DataFrame | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    segments: pd.DataFrame | None = None

    @property
    def steps(self) -> pd.DataFrame:
        """The marked steps: ``rank``, ``start_ns`` and ``dur_ns``, indexed by ``step`` (0, 1, …)."""
        return marks(self.events).rename_axis("step")

    def overview(self, step: str | None = None) -> pd.DataFrame:
        """Where each step's wall time goes, one row per ``rank`` and ``step``.

        ``kernel_ns``, ``exposed_communication_ns``, ``memcpy_ns`` (copies and fills), ``dataloader_ns``,
        ``not_visible_ns`` (the host waits for device work that is not in the recording, or what runs is in no pane;
        ``attrs["notes"]`` says which), ``cpu_exec_ns`` (operators
        and launches while the device has nothing to do) and ``idle_ns`` (none of these: Python between operators, say)
        sum to ``dur_ns``: a moment counts for the first of these that it shows. ``hidden_communication_ns`` ran under
        kernels, ``device_busy_frac`` is the share of the step in which the device does anything. ``first_launch_ns`` of
        ``cpu_exec_ns`` went on first launches of kernels, over ten times as long as usual. The host waited for the
        device ``num_waits`` times; had it not, that would idle for ``behind_waits_ns`` less, at most. What was not
        recorded is ``<NA>``.

        A step lasts until what it launched has run, and begins no earlier than the step before has ended in this sense,
        so ``start_ns`` and ``dur_ns`` may differ from the marks in ``steps``, which the host makes while it runs ahead.

        ``step`` is the annotation that marks a step (``*`` stands for anything; ValueError when there is none); by
        default the batches that a serving engine marks (vLLM, SGLang; the column ``phase`` then says ``prefill``,
        ``decode`` or ``mixed``, and ``step="decode"`` chooses), or the profiler's own marks, and the whole window is
        one step where there are none. ``attrs["notes"]`` says which, ``attrs["suggestions"]`` what follows.
        """
        return panes.breakdown.overview(self._of_ranks("overview", step))

    def operators(self, by_shape: bool = False) -> pd.DataFrame:
        """Calls, total and self time on host and device [ns] of each operator, summed over ranks.

        The same figures as ``key_averages()``: an only child that bears its parent's name is counted as its parent.
        Device time belongs to the innermost operator around the launch; what was launched outside of any, or before
        the recording, stands in the row ``not visible``. Without a recorded device its columns are ``<NA>``.
        """
        return panes.tables.operators(self._of_ranks("operators"), by_shape)

    def products(self) -> pd.DataFrame:
        """Each matrix product on a device, by operator, shapes and dtypes, where shapes were recorded.

        ``flops`` and ``size_bytes`` are of one call, what it reads and writes at least; ``floor_ns`` is the time that
        the device's datasheet allows for either, at its dense ``rate_flops_per_s`` (of TF32 for float32, for recordings
        do not say which it was), and ``reached_frac`` that over ``mean_ns``. ``<NA>`` for a device of which we hold no
        datasheet (``effkit.datasheets``). Attention and convolutions are not among them.
        """
        return matrix_products.products(self._of_ranks("operators"), datasheet_of(str(self.provenance.get("device"))))

    def kernels(self) -> pd.DataFrame:
        """Each kernel's calls and times [ns], summed over ranks.

        ``occupancy_frac`` is the estimate that was recorded, weighted by time, ``<NA>`` where there is none.
        ``tensor_cores`` goes by the kernel's name, ``<NA>`` where that does not tell: profilers do not record it. Where
        CUDA graphs ran, ``annotation`` is what their kernels were marked with at capture, the most time first.
        """
        return panes.tables.kernels(self._of_ranks("kernels"))

    def families(self) -> pd.DataFrame:
        """Where the time goes by what operators and kernels do (``effkit.operators``) [ns], summed over ranks.

        ``host_self_ns`` of operators; ``kernel_ns`` and ``copy_ns`` of the device, by the kernel's own name, or by the
        operator that launched it where that says more (of elementwise kernels, say). The row ``not visible`` is what
        neither tells.
        """
        return panes.families.families(self._of_ranks("families"))

    def collectives(self) -> pd.DataFrame:
        """Every collective call of every rank, on the clock of the first rank.

        ``size_bytes`` is what the rank put in, ``waiting_ns`` lasts until the last of the recorded ranks has come,
        ``moving_ns`` is the rest of its time, ``exposed_ns`` what no computation hides, and
        ``bus_bandwidth_bytes_per_s`` comes from moving time alone. ``<NA>`` where it was not recorded; who waits
        for whom is not visible from one rank.
        """
        calls = panes.collectives.matched(self._of_ranks("collectives"))
        world = self.provenance.get("world_size")
        # a group without a name is taken to be all ranks
        calls["num_ranks"] = calls["num_ranks"].fillna(world) if world else calls["num_ranks"]
        return panes.collectives.waits(calls)

    def communication(self) -> pd.DataFrame:
        """The collectives by kind: calls, bytes, waiting and moving time summed over ranks.

        ``bus_bandwidth_bytes_per_s`` is what nccl-tests calls bus bandwidth, over all calls of the kind together.
        ``attrs["notes"]`` says which ranks are missing, and which calls could not be matched.
        """
        calls = self.collectives()
        table = panes.collectives.summary(calls)
        table.attrs["notes"] = [*self._notes(), *panes.collectives.doubts(calls)]
        return table

    def clocks(self) -> pd.DataFrame:
        """How far each rank's clock is ahead of the first one's, and the spread that aligning them leaves [ns]."""
        return panes.collectives.clocks(panes.collectives.matched(self._of_ranks("collectives")))

    def rank_pairs(self) -> pd.DataFrame:
        """Bytes from each ``sender`` to each ``receiver`` in all all-to-alls; ``basis`` says how they are known."""
        return panes.collectives.rank_pairs(self.collectives())

    def memory(
        self, *, by: str = "category", device: str | None = None, rank: int | None = None, at_ns: int | None = None
    ) -> Account:
        """What fills the memory at its peak, or at the moment ``at_ns``: an Account in bytes.

        ``by`` is ``"category"`` (parameter, gradient, saved activation, …), ``"stack"`` (where it was allocated) or
        ``"place"`` (the same, by the innermost line of one's own code and what that called);
        ``device`` and ``rank`` say of which memory, by default the accelerator's, of the rank with the highest peak.
        Where memory ran out, the three places in one's own code that hold most are said at the end. ValueError when
        memory was not recorded, or not on that device and rank.
        """
        recorded, allocations, segments = self._memory_of(device, rank)
        device, peak_bytes, source = str(recorded["device"]), int(recorded["peak_bytes"]), str(recorded["peak_source"])
        when = str(recorded.get("peak") or "")
        if at_ns is not None:
            peak_bytes = int(snapshot.at(allocations, at_ns)["size_bytes"].sum())
            source = "the allocations alive then"
            when = f"event {at_ns:,}" if recorded.get("clock") == "events" else ""
        if recorded.get("oom") and by == "category":
            places = self.memory(by="place", device=device, rank=recorded["rank"], at_ns=at_ns).frame["value"]
            most = places.drop(index="not recorded", errors="ignore").head(3).items()
            source += ". Most is held by " + "; ".join(f"{readable(int(n), 'bytes')} for {place}" for place, n in most)
        return snapshot.account(
            allocations, peak_bytes=peak_bytes, source=source, device=device, by=by, segments=segments, at_ns=at_ns,
            when=when,
        )  # fmt: skip

    def out_of_memory(self, *, by: str = "stack") -> Account:
        """What was alive when the last request found no memory; the title says who asked, and for how much.

        ValueError when no request failed while memory was recorded.
        """
        self._chosen_memory(None, None)  # was any recorded at all?
        failed = [memory for memory in self._recorded_memory() if memory.get("oom")]
        if not failed:
            raise ValueError("no request ran out of memory in this recording: memory() says what fills its peak")
        last = max(failed, key=lambda memory: memory["oom"]["time_ns"])
        oom = last["oom"]
        alive = self.memory(by=by, device=last["device"], rank=last["rank"], at_ns=oom["time_ns"])
        free, asked = (readable(oom[name], "bytes") for name in ("device_free_bytes", "asked_bytes"))
        caller = oom["stack"] or "a caller that was not recorded"
        title = f"Memory of {last['device']} when {free} were free and {asked} asked for by {caller}"
        return replace(alive, title=title)

    def memory_timeline(
        self, *, device: str | None = None, rank: int | None = None, num_points: int = 2000
    ) -> pd.DataFrame:
        """How full the memory was: ``time_ns, allocated_bytes, reserved_bytes``, at most ``num_points`` rows.

        Each row is the fullest moment of a stretch of time, and the most that was reserved in it, so both peaks are
        exact. Where the recording has no times, ``time_ns`` counts its events, and ``attrs["axis"]`` says so.
        """
        recorded, allocations, segments = self._memory_of(device, rank)
        line = snapshot.timeline(allocations, segments, num_points=num_points)
        line.attrs["axis"] = ("events", 1) if recorded.get("clock") == "events" else ("ms", 10**6)
        return line

    def browse_memory(self, *, device: str | None = None, rank: int | None = None) -> Any:
        """A slider over the moments of the recording, and who holds the memory at each: a widget."""
        from effkit.browsing import MemoryBrowser

        return MemoryBrowser(self, device=device, rank=rank)

    def diff(self, other: Capture) -> pd.DataFrame:
        """Which operators and kernels grew, shrank, appeared or went from this capture to another, per step.

        Of what is part of a step; ``attrs["notes"]`` says how much of the time is not.
        """
        if not isinstance(other, Capture):
            raise TypeError(f"diff() takes another Capture; given: {type(other).__name__}. Open a file with load(path)")
        inside = [each._in_steps() for each in (self, other)]
        table = panes.tables.diff(*((one.operators(), one.kernels(), max(1, len(one.overview()))) for one in inside))
        words = zip(("before", "after"), map(Capture._outside, (self, other), inside), strict=True)
        table.attrs["notes"] = [f"{which}: {word}" for which, word in words if word]
        return table

    def _in_steps(self, step: str | None = None) -> Capture:
        ranks = [panes.breakdown.of_steps(events, step) for _, events in self.events.groupby("rank")] or [self.events]
        return replace(self, events=pd.concat(ranks, ignore_index=True))

    def _outside(self, inside: Capture) -> str:
        every, within = (int(each.kernels()["total_ns"].sum()) for each in (self, inside))
        return f"{1 - within / every:.0%} of the kernels' time is outside of the steps" if within < 0.95 * every else ""

    def tensorboard(self, logdir: str | Path) -> tensorboard.Folder:
        """Write a run folder that the retired TensorBoard plugin shows correctly; what it cannot show is in the result.

        Its parser knows neither today's categories nor the linking of kernels by correlation alone: with the files
        of current profilers it shows operators that take no time on the device.
        """
        return tensorboard.write(Path(logdir), self.events)

    def trace(self, path: str | Path, *, receipts: Sequence[Receipt] = ()) -> Path:
        """Write a Chrome trace, for Perfetto (ui.perfetto.dev, which keeps it in the browser) or chrome://tracing.

        ``load(path)`` gives the same events, row for row. Beside them stand arrows from launches to what they launched,
        the bytes alive of each category, the exposed communication, and the sentence of each Receipt, at the end. The
        file is gzipped where its name ends in ``.gz``. Of several ranks it is a folder with a file for each.
        """
        path, marks = Path(path), [receipt.sentence() for receipt in receipts]
        ranks = dict(list(self.events.groupby("rank"))) or {0: self.events}
        if len(ranks) > 1:
            path.mkdir(parents=True, exist_ok=True)
        timed = [(each["device"], each["rank"]) for each in self._recorded_memory() if each.get("clock") != "events"]
        for rank, events in ranks.items():
            held = [self._memory_of(device, rank)[1] for device, of in timed if of == rank]
            perfetto.write(path / f"rank{rank}.json.gz" if len(ranks) > 1 else path, events, held, marks)
        return path

    def plot(self, pane: str = "overview", ax: Axes | None = None, **options: Any) -> Axes:
        """Draw a pane: ``overview``, ``operators``, ``kernels``, ``communication``, ``rank_pairs``, ``memory`` or
        ``memory_timeline``. ``options`` are the pane's own."""
        from effkit import view

        if pane not in view.PANES:
            raise ValueError(f"there is no pane “{pane}”; there are {', '.join(view.PANES)}")
        return view.PANES[pane](getattr(self, pane)(**options), ax)

    def save(self, path: str | Path) -> Path:
        """Write one zip file: ``capture.json`` (format, version, provenance, column types) and a CSV per frame.

        Any tool can open it and nothing in it is code. It is written beside its place and moved there whole.
        """
        frames = {name: frame for name in storage.FRAMES if (frame := getattr(self, name)) is not None}
        memory = {"memory": list(recorded)} if (recorded := self._recorded_memory()) else {}
        return storage.write(Path(path), frames, {**self.provenance, **memory})

    def _of_ranks(self, pane: str, *options: Any) -> list[Any]:
        ranks = [events for _, events in self.events.groupby("rank")] or [self.events]
        return [panes.OF_RANK[pane](events, *options) for events in ranks]

    def _recorded_memory(self) -> Sequence[Mapping[str, Any]]:
        return self.provenance.get("memory", ())

    def _chosen_memory(self, device: str | None, rank: int | None) -> Mapping[str, Any]:
        recorded = self._recorded_memory()
        if not recorded:
            raise ValueError("memory was not recorded: capture with memory=True, or profile with profile_memory=True")
        fitting = [each for each in recorded if device in (None, each["device"]) and rank in (None, each["rank"])]
        if not fitting:
            memories = ", ".join(f"{each['device']} of rank {each['rank']}" for each in recorded)
            raise ValueError(f"no memory of device {device} and rank {rank} was recorded; there is {memories}")
        return max(fitting, key=lambda memory: (memory["device"] != "cpu", memory["peak_bytes"]))

    def _memory_of(self, device: str | None, rank: int | None) -> Memory:
        chosen = self._chosen_memory(device, rank)
        rank, device = chosen["rank"], chosen["device"]
        frames = [frame if frame is None else frame[(frame["rank"] == rank) & (frame["device"] == device)]
                  for frame in (self.allocations, self.segments)]  # fmt: skip
        return chosen, frames[0], frames[1]

    def _notes(self) -> list[str]:
        notes = list(self.provenance.get("notes", ()))
        missing = self.provenance.get("missing_ranks") or []
        listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        return [*notes, f"ranks {listed} were not recorded: waiting for them counts as moving"] if missing else notes

    def _repr_html_(self) -> str:
        """What it is, and its overview, unless files would have to be read for that."""
        overview = self.overview()._repr_html_() if len(vars(self).get("events", ())) else ""
        return markup.points(map(str.strip, repr(self).splitlines())) + overview

    def __repr__(self) -> str:
        p = self.provenance
        memory = "memory not recorded" if self.allocations is None else f"memory {len(self.allocations):,} allocations"
        full = [each["device"] for each in p.get("memory", ()) if each.get("oom")]
        lines = [
            f"Capture of {p.get('what', 'a run')}: {len(self.steps)} steps, {len(self.events):,} events, {memory}",
            f"on {p.get('device', 'an unnamed device')}, torch {p.get('torch', 'not visible')}, "
            f"{p.get('date', 'date not visible')}",
            *p.get("left_out", ()),
            *(f"{device} ran out of memory: see out_of_memory()" for device in full),
            *self._notes(),
        ]
        return "\n  ".join(lines)
