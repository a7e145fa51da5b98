"""What a step spends inside operators and what around them: each is run without the other."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from effkit.decoder.module_timers import Ints, watch, where
from effkit.least_squares import Floats
from effkit.timing import Stopwatch, elapsed_ns

LAUNCHES, OPERATORS, FRAMEWORK = "launches", "operators", "framework"
_REPEATS = 5
# Beside true views: they lay out memory, or look at it in another shape
_LAUNCH_NOTHING = ("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::empty", "aten::empty_like",
                   "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")  # fmt: skip


def launches(func: Any) -> bool:
    """Whether an operator does more than make a view or lay out memory."""
    return not func.is_view and func._schema.name not in _LAUNCH_NOTHING


class Call(NamedTuple):
    """An operator with what it was given and what it gave."""

    func: Any
    args: Any
    kwargs: Any
    result: Any


class Launches(TorchDispatchMode):
    """A clock that counts operators instead of time: those that only make views or lay out memory launch nothing and
    do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def mark(self) -> int:
        """How many so far."""
        return self.number

    def ns(self, marks: Sequence[int]) -> Ints:
        """Marks since the first of them, in operators."""
        return np.asarray(marks, dtype=np.int64) - marks[0]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += launches(func)
        return func(*args, **(kwargs or {}))


class Operators(Launches):
    """A clock that tells the time of operators alone, each of its own size: the last ``keep`` of a generation are run
    once more afterwards, one after another in their order, with no code between them. On an accelerator of ``kind``
    that is its own time: it has work enough before them for the host to have launched them all."""

    def __init__(self, keep: int, kind: str = "cpu") -> None:
        super().__init__()
        self.kind, self.calls = kind, deque[Call](maxlen=keep)

    @property
    def first(self) -> int:
        """How many came before those that were kept."""
        return self.number - len(self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not launches(func):
            return func(*args, **(kwargs or {}))
        given = (args, kwargs or {})
        if func._schema.is_mutable:  # run again, it must not change what belongs to the model
            given = tree_map_only(torch.Tensor, torch.Tensor.clone, given)
        result = func(*args, **(kwargs or {}))
        self.number += 1
        self.calls.append(Call(func, *given, result))
        return result

    def ns(self, marks: Sequence[int]) -> Ints:
        """Marks as the time of the operators before them; one that was not kept counts 1 ns: marks keep their order."""
        return np.rint(self._before_ns[list(marks)]).astype(np.int64)

    @cached_property
    def _before_ns(self) -> Floats:
        with _disable_current_modes():
            turns = [self._run_again() for _ in range(_REPEATS)]
        each = np.ones(self.number)
        each[self.first :] += np.percentile(turns[1:], 25, axis=0)  # the first turn warms up
        return np.append(0, np.cumsum(each))

    def _run_again(self) -> Ints:
        if self.kind == "cpu":
            return self._marked()
        begin = time.perf_counter_ns()
        self._marked()
        occupy(self.kind, 2 * (time.perf_counter_ns() - begin))
        return self._marked()

    def _marked(self) -> Ints:
        """Time of each call [ns]."""
        clock = Stopwatch(self.kind)
        marks = []
        for func, args, kwargs, _ in self.calls:
            marks.append(clock.mark())
            func(*args, **kwargs)
            marks.append(clock.mark())
        return np.diff(clock.ns(marks))[::2]


def occupy(kind: str, time_ns: int) -> None:
    """Give an accelerator work for so long, and do not wait for it."""
    matrix = torch.ones(2048, 2048, device=kind)
    elapsed_ns(lambda: matrix @ matrix)  # the first loads the library
    for _ in range(time_ns // elapsed_ns(lambda: matrix @ matrix) + 1):
        matrix @ matrix


class Framework(Launches):
    """A clock that tells the host's time of all that is no operator: those that were recorded are not run, what they
    gave is handed out. What this mode costs at every call is measured and taken off."""

    def __init__(self, recorded: Operators) -> None:
        super().__init__()
        self.first, self.calls, self.num_handled = recorded.first, list(recorded.calls), 0
        self.stopwatch = Stopwatch()
        with self:
            self.per_call_ns = min(self._hand_out_ns() for _ in range(_REPEATS))
        self.number = self.num_handled = 0

    def _hand_out_ns(self) -> float:
        """Time of a call that does nothing but hand out."""
        own = [place for place, call in enumerate(self.calls) if not call.func._schema.is_mutable]
        begin = self.stopwatch.mark()
        for place in own:
            self.number, (func, args, kwargs, _) = self.first + place, self.calls[place]
            func(*args, **kwargs)
        return float(self.stopwatch.ns([begin, self.stopwatch.mark()])[1]) / max(1, len(own))

    def mark(self) -> Any:
        """Now, and how many calls came through here so far."""
        return self.stopwatch.mark(), self.num_handled

    def ns(self, marks: Sequence[Any]) -> Ints:
        """Marks as ns since the first of them, without what this mode costs."""
        moments, numbers = zip(*marks, strict=True)
        raw_ns = self.stopwatch.ns(moments)
        order = np.argsort(raw_ns, kind="stable")
        times_ns = raw_ns - np.rint(self.per_call_ns * np.asarray(numbers)).astype(np.int64)
        times_ns[order] = np.maximum.accumulate(times_ns[order])  # nothing ends before it began
        return times_ns

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = self.number - self.first
        self.number += launches(func)
        self.num_handled += 1
        # views are made anew; what writes into its argument is run, for others hold that argument
        if launches(func) and not func._schema.is_mutable and 0 <= place < len(self.calls):
            call = self.calls[place]
            if call.func is func:
                return call.result
        return func(*args, **(kwargs or {}))


def step_times(model: torch.nn.Module, generate: Callable[[], object], num_steps: int) -> pd.DataFrame:
    """The last step of a generation of ``num_steps``, part by part: columns ``launches``, how many operators; and times
    [ns]: ``operators``, run alone, and ``framework``, the code around them run alone."""
    with torch.random.fork_rng():
        with Launches() as counter:
            number = watch(model, generate, counter).steps.iloc[-1]
        with Operators(-(-3 * counter.number // (2 * num_steps)), where(model)) as recorder:  # a step, and some before
            operators = watch(model, generate, recorder).steps.iloc[-1]
        turns = []
        for _ in range(_REPEATS):
            with Framework(recorder) as clock:
                turns.append(watch(model, generate, clock).steps.iloc[-1])
    framework = pd.concat(turns, axis=1).quantile(0.25, axis=1).clip(lower=0)
    return pd.DataFrame({LAUNCHES: number, OPERATORS: operators, FRAMEWORK: framework}).round().astype("int64")
