"""The wall clock around calls, the accelerator's part of the work included."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import numpy as np

from effkit.device import synchronize
from effkit.progress_bar import advance

Key = TypeVar("Key", bound=Hashable)
_BLOCK_BYTES = 31 * 2**20  # just below the most that glibc keeps: its DEFAULT_MMAP_THRESHOLD_MAX is 32 MiB
_BETWEEN = 4  # times as long as a reference, or one run, may pass until it is run again
_BURST_NS, _MOST_AT_ONCE = 20_000_000, 5  # short calls are made again until so much has passed: one is easily disturbed


class Stopwatch:
    """Time of the host, or of an accelerator's own work: there a mark is an event among that work."""

    def __init__(self, kind: str = "cpu") -> None:
        self.kind = kind

    def mark(self) -> Any:
        """Now, or as soon as the accelerator comes to it."""
        if self.kind == "cpu":
            return time.perf_counter_ns()
        import torch

        event = torch.get_device_module(self.kind).Event(enable_timing=True)
        event.record()
        return event

    def ns(self, marks: Sequence[Any]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Marks as ns since the first of them."""
        if self.kind == "cpu":
            return np.asarray(marks, dtype=np.int64) - marks[0]
        synchronize()
        return np.asarray([round(1e6 * marks[0].elapsed_time(mark)) for mark in marks], dtype=np.int64)


@cache
def steady_heap() -> None:
    """Let glibc keep what tensors free. It gives large blocks back to the system, whose fresh pages then cost up to a
    tenth of a step, in some runs and not in others, until a block as large as this one has been freed once."""
    np.empty(_BLOCK_BYTES, np.uint8)


def elapsed_ns(call: Callable[[], object]) -> int:
    """Time of one call [ns]; what was given to the accelerator before is waited for first, and is not counted."""
    steady_heap()
    advance()
    synchronize()
    start = time.perf_counter_ns()
    call()
    synchronize()
    return time.perf_counter_ns() - start


def interleaved_ns(
    calls: Mapping[Key, Callable[[], object]], repeats: int, pick: Callable[[list[int]], float] = statistics.median,
    enough: Callable[[list[list[int]]], bool] = lambda _: False,
) -> dict[Key, int]:  # fmt: skip
    """Time of each call [ns]: all run once, ``repeats`` times after a warm-up that is not counted.

    Each time in another order, so that none always finds the caches as the same other left them. ``pick`` makes one
    time of a call's: their median, or ``min`` where other work on the machine is the only noise. ``enough`` is told the
    times of each call so far, after each turn, and ends it when true. ValueError when repeats is below 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1; given: {repeats}")
    times: dict[Key, list[int]] = {key: [] for key in calls}
    for turn in range(repeats + 1):
        for key in random.Random(turn).sample(list(calls), len(calls)):
            times[key].append(elapsed_ns(calls[key]))
        if turn and enough([taken[1:] for taken in times.values()]):
            break
    return {key: round(pick(taken[1:])) for key, taken in times.items()}


def ratios_in_turn(
    reference: Callable[[], int], others: Sequence[Callable[[], int]],
    more: Callable[[Sequence[Sequence[float]]], Iterable[int]],
) -> tuple[list[int], list[list[float]]]:  # fmt: skip
    """Times of a reference [ns]; and of each other, run by run, its time over what the reference took around then.

    A shared machine works at another speed for seconds at a time, often by a third, so that the fastest of a few runs
    may lie within such a phase, or not. The reference is run again between the others, and its times are interpolated.
    Each call returns its own time [ns], and the fastest of a few counts where they are short; ``more`` is told the
    ratios so far, and says which others are run in the next turn: none ends it. The reference is run once before.
    """

    def fastest(call: Callable[[], int]) -> int:
        taken = [call()]
        while sum(taken) < _BURST_NS and len(taken) < _MOST_AT_ONCE:
            taken.append(call())
        return min(taken)

    steady_heap()
    reference()
    times, ratios = [fastest(reference)], [[] for _ in others]  # type: ignore[var-annotated]
    while chosen := list(more(ratios)):
        runs: list[tuple[int, int]] = []  # since the reference was run
        for number, i in enumerate(chosen, 1):
            runs.append((i, fastest(others[i])))
            if (span := sum(taken for _, taken in runs)) >= _BETWEEN * times[-1] or number == len(chosen):
                times.append(fastest(reference))
                ends = np.cumsum([taken for _, taken in runs])
                for (run, taken), end in zip(runs, ends, strict=True):
                    ratios[run].append(float(taken / np.interp(end - taken / 2, (0, span), times[-2:])))
                runs.clear()
    return times, ratios
