"""capture(step): a live run becomes a Capture. The only place that touches torch.profiler."""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd

from effkit import snapshot, trace
from effkit.arguments import checked_function, checked_whole, described
from effkit.captured import Capture
from effkit.device import accelerator, peak_counter, provenance, synchronize
from effkit.gc_disabled import gc_disabled
from effkit.interrupts import PutBack, uninterrupted
from effkit.timing import elapsed_ns
from effkit.trace import nesting
from effkit.trace.names import STEP

_recording = threading.Lock()
_own: list[Any] = []  # the profiler that is active, if it is one of ours
_givers: list[Callable[[], object]] = []  # what ends the recording that is active, if it gives way
_SECOND = "effkit::second"


def capture(
    step: Callable[[], object], *, warmup: int = 2, steps: int = 3, memory: bool = False, shapes: bool = False,
    stacks: bool = False, settings: Mapping[str, Any] | None = None, what: str | None = None,
) -> Capture:  # fmt: skip
    """Run ``step()`` under ``torch.profiler`` and return what was seen.

    ::

        step() x warmup | step() x steps | step()        | step() x steps           | step() x steps
        untimed         | timed, plain   | profiler      | timed, recorded          | timed, plain
                        |                | warms up      | ProfilerStep#1 … #steps  |
                                                         '--- the capture's window -'

    The plain steps on both sides are the same work without the profiler: their median against the recorded steps'
    median is what capturing cost, and stands in ``provenance["overhead_frac"]``. TypeError or ValueError when ``step``
    cannot be called or a count is out of range. RuntimeError when another profiler is active. Errors of ``step`` itself
    come through unchanged.

    Parameters
    ----------
    step
        Any callable without arguments: a training step, a forward pass, a ``generate``.
    warmup, steps
        Number of untimed and of recorded calls, each at least 1 (warmup may be 0).
    memory, shapes, stacks
        Record allocations, input shapes, Python stacks: off by default, for each costs time per event.
    settings, what
        Kept in the provenance: what was run, with which settings.

    Examples
    --------
    >>> run = capture(lambda: model(batch).sum().backward(), memory=True)   # doctest: +SKIP
    >>> run.steps["dur_ns"].median()                                        # doctest: +SKIP
    61_300_512.0
    """
    checked_function("step", step, "without arguments", num=0)
    steps, warmup = checked_whole("steps", steps, 1), checked_whole("warmup", warmup, 0)
    if not isinstance(settings, Mapping | None):
        raise TypeError(f"settings is a mapping, of names to values; given: {described(settings)}")

    with _alone("capture()"):
        counter = peak_counter()
        for _ in range(warmup):
            step()
        plain = _timed(step, steps)
        with _profiler(steps, profile_memory=memory, record_shapes=shapes, with_stack=stacks) as profiler:
            step()
            synchronize()
            profiler.step()
            if counter:
                counter.reset_peak_memory_stats()
            recorded = _timed(step, steps, after_each=profiler.step)
            peak_bytes = counter.max_memory_allocated() if counter else None
        plain += _timed(step, steps)
    plain_ns, recorded_ns = statistics.median(plain), statistics.median(recorded)
    facts = {
        "what": what or getattr(step, "__qualname__", type(step).__name__),
        "settings": dict(settings or {}),
        "options": {"warmup": warmup, "steps": steps, "memory": memory, "shapes": shapes, "stacks": stacks},
        "step_ns": round(plain_ns),
        "step_ns_profiled": round(recorded_ns),
        "overhead_frac": round(recorded_ns / plain_ns - 1, 4),
    }
    return _captured(profiler, facts, peak_bytes)


def capture_once(
    step: Callable[[], object], *, memory: bool = False, shapes: bool = False, stacks: bool = False,
    what: str | None = None,
) -> Capture:  # fmt: skip
    """Run ``step()`` once, under the profiler: for what may run once only, such as a cell of a notebook.

    There is no warm-up, and what recording cost is not known. Otherwise as :func:`capture`.
    """
    checked_function("step", step, "without arguments", num=0)
    import torch

    with _alone("capture_once()"):
        if counter := peak_counter():
            counter.reset_peak_memory_stats()
        recorder, mark = _profiler(profile_memory=memory, record_shapes=shapes, with_stack=stacks), f"{STEP}0"
        with recorder as profiler, torch.profiler.record_function(mark):
            (recorded_ns,) = _timed(step, 1)
        peak_bytes = counter.max_memory_allocated() if counter else None
    options = {"warmup": 0, "steps": 1, "memory": memory, "shapes": shapes, "stacks": stacks}
    facts = {"what": what or "one call", "options": options, "step_ns_profiled": round(recorded_ns)}
    return _captured(profiler, facts, peak_bytes)


def _captured(profiler: Any, facts: dict[str, Any], peak_bytes: int | None) -> Capture:
    """What the profiler saw; ``peak_bytes`` is the accelerator's own counter, None where there is none."""
    options, kind = facts["options"], accelerator()
    read = trace.read(profiler.exported(), details=trace.DETAIL_COLUMNS, stacks=options["stacks"])
    allocations, of_memory = snapshot.from_trace(read.memory, stacks=nesting.callers(read.events, read.memory))
    source = "profiler's Total Allocated; allocations made before the window are not visible"
    if counter := peak_counter():
        source = f"{counter.__name__}.max_memory_allocated"
    elif kind != "cpu":
        source = f"not visible: torch counts no peak of memory on {kind}"
    elif of_memory:
        peak_bytes = of_memory[0]["peak_bytes"]
    elif not options["memory"]:
        source = "not recorded"
    more = {"peak_bytes": peak_bytes, "peak_source": source, "memory": of_memory}
    return Capture(read.events, allocations, provenance() | facts | more, snapshot.reserved(read.memory))


def peak_memory(step: Callable[[], object], *, resident_bytes: int = 0, again: bool = False) -> tuple[int, str]:
    """Run ``step()`` once and return the peak of its memory [bytes] and which counter said so.

    On an accelerator that is the allocator's own ``max_memory_allocated``. On the CPU the profiler sees only what is
    allocated while it runs: ``resident_bytes`` (parameters, optimizer state, the batch) is what was there before. It
    does not see the end of what is older than the recording: if ``again``, the step runs twice, and the second counts.
    """
    if counter := peak_counter():
        synchronize()
        counter.reset_peak_memory_stats()
        step()
        synchronize()
        return counter.max_memory_allocated(), f"{counter.__name__}.max_memory_allocated"
    memory = memory_after(step, step) if again else memory_events(step, operators=False).memory
    return resident_bytes + _peak(memory), "resident tensors + the profiler's Total Allocated"


def steady_peak(
    step: Callable[[], object], resident_bytes: Callable[[], int], replaced: Callable[[], bool]
) -> tuple[int, str]:
    """The same of a step that may put other tensors into the place of those that were there before it: then
    ``replaced()`` is true after it, and it is run again. ``resident_bytes()`` is asked before each recording."""
    peak = peak_memory(step, resident_bytes=resident_bytes())
    return peak_memory(step, resident_bytes=resident_bytes(), again=True) if replaced() else peak


def memory_after(first: Callable[[], object], then: Callable[[], object]) -> pd.DataFrame:
    """Run both, and return the allocations and frees of the second: the end of a block of the first, too, which a
    recording that began later would not see."""
    from torch.profiler import record_function

    def both() -> None:
        first()
        with record_function(_SECOND):
            then()

    recorded = memory_events(both, operators=False)
    begin = recorded.events.loc[recorded.events["name"] == _SECOND, "start_ns"].iloc[0]
    return recorded.memory[recorded.memory["time_ns"] >= begin]


def memory_events(step: Callable[[], object], *, operators: bool = True) -> trace.Trace:
    """Run ``step()`` once and return every allocation and every free, with the host's events around them, or without
    ``operators`` its annotations alone, which costs less."""
    # what an earlier step left in cycles would die during this one, and pass for its own
    with _alone("memory_events()"), gc_disabled(), _profiler(operators=operators, profile_memory=True) as profiler:
        step()
        synchronize()
    return trace.read(profiler.exported())


def trace_of(step: Callable[[], object], *, warmup: int = 2, steps: int = 4, **recorded: Any) -> bytes:
    """Call ``step()`` ``warmup`` times, then ``steps`` times under the profiler, and return its trace (JSON)."""
    with closing(steps_traced(warmup=warmup, steps=steps, **recorded)) as recording:
        while (trace := next(recording)) is None:
            step()
    return trace


def steps_traced(
    *, warmup: int, steps: int, shapes: bool = False, memory: bool = False,
    give_way: Callable[[], object] | None = None,
) -> Generator[bytes | None, None, None]:  # fmt: skip
    """The same of steps that somebody else takes: yields None before each of them, and after the last the trace.

    The device is waited for before the first recorded step and after the last, not between them: a loop's host runs
    ahead, and so does this one. The last of the ``warmup`` steps (at least 1) is the profiler's own. Where the steps
    end early, close it. ``give_way`` is called when another profiler starts, and has to close it; without, that one is
    refused.
    """
    with _alone("trace_of()", give_way):
        for _ in range(warmup - 1):
            yield None
        with _profiler(steps, record_shapes=shapes, profile_memory=memory) as profiler:
            yield None
            for left in range(steps, -1, -1):
                if left in (0, steps):
                    synchronize()
                profiler.step()
                if left:
                    yield None
    yield profiler.exported()


class _profiler(PutBack):
    """The profiler of this machine; given a number of steps, it warms up in one and records so many after it.

    It begins, goes on and ends without being interrupted: one that is left half-way ends the process later.
    """

    def __init__(self, steps: int | None = None, *, operators: bool = True, **options: Any) -> None:
        from torch.profiler import profile, schedule, supported_activities

        self._operators = operators
        plan = None if steps is None else schedule(wait=0, warmup=1, active=steps, repeat=1)
        self._profile = profile(activities=supported_activities(), schedule=plan, **options)
        _own.append(self._profile)

    def begin(self) -> _profiler:
        from torch._C._profiler import RecordScope
        from torch.autograd import profiler

        # torch's own class does not hand on which scopes are recorded: all of them, unless some are named
        within: Any = {"scopes": set() if self._operators else {RecordScope.USER_SCOPE}}
        enable = partial(vars(profiler)["_enable_profiler"], **within)
        with mock.patch.object(profiler, "_enable_profiler", enable):
            self._profile.start()
        return self

    def step(self) -> None:
        """The end of a step."""
        uninterrupted(self._profile.step)

    def put_back(self) -> None:
        self._profile.stop()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if any(error):
            self._let_go()

    def exported(self) -> bytes:
        """What was recorded (JSON); to be asked once."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            self._profile.export_chrome_trace(str(path))
            self._let_go()
            return path.read_bytes()

    def _let_go(self) -> None:
        """Of the results, now: where the collector finds them during a later recording, Kineto ends the process."""
        if (of_torch := self._profile.profiler) is not None:
            of_torch.kineto_results = None


def _peak(memory: pd.DataFrame) -> int:
    """The profiler's highest running total above where it stood when this recording began [bytes]. The total goes on
    counting from one recording of the process to the next."""
    if memory.empty:
        return 0
    before = int(memory["total_bytes"].iloc[0] - memory["size_bytes"].iloc[0])
    return max(0, int(memory["total_bytes"].max()) - before)


def _timed(step: Callable[[], object], count: int, after_each: Callable[[], object] | None = None) -> list[int]:
    """Wall time of each of ``count`` calls [ns], the accelerator's work included, ``after_each`` excluded."""
    times = []
    for _ in range(count):
        times.append(elapsed_ns(step))
        if after_each is not None:
            after_each()
    return times


class _alone(PutBack):
    """Profilers do not nest: a second one ends the process, or one of them sees nothing. A step that starts one is
    refused, unless ``give_way`` is there to end ours first."""

    def __init__(self, caller: str, give_way: Callable[[], object] | None = None) -> None:
        self._caller, self._give_way = caller, give_way

    def begin(self) -> None:
        import torch

        for give_way in _givers[:]:
            give_way()
        if torch._C._autograd._profiler_enabled() or not _recording.acquire(blocking=False):
            raise RuntimeError(f"{self._caller} was called while another profiler is active; leave that one first")
        # Kineto writes its own markers to stderr at a level above "error"; a notebook would show them.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        prepare = torch.autograd.profiler.profile._prepare_trace

        def prepared(profiler: Any) -> None:
            if all(profiler is not own.profiler for own in _own):
                if self._give_way is None:
                    raise RuntimeError(
                        "the step starts a profiler of its own; profilers do not nest: take it out of it"
                    )
                self._give_way()
            prepare(profiler)

        self._patch = mock.patch.object(torch.autograd.profiler.profile, "_prepare_trace", prepared)
        self._patch.start()
        _givers.extend(filter(None, [self._give_way]))

    def put_back(self) -> None:
        self._patch.stop()
        _own.clear()
        _givers.clear()
        _recording.release()
