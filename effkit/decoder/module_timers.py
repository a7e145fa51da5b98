"""Clocks around the modules of a generation: of the time of every part of a step, of its operators alone, and of the
code around them alone."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map_only

from effkit.decoder import module_roles
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, ENCODER, FFN, NORMS, OUTPUT, SELF, Part
from effkit.timing import Stopwatch, elapsed_ns

OF_LAYER = (SELF, CROSS_KV, CROSS, FFN, NORMS)
OF_STEP = (*OF_LAYER, EMBEDDING, OUTPUT, BETWEEN)
_STEP = "step"
LAUNCHES, OPERATORS, FRAMEWORK = "launches", "operators", "framework"
_REPEATS = 5
_LAST = 4  # of the steps of a generation, the last of so many equal parts are alike
# Beside true views: they lay out memory, or look at it in another shape
_LAUNCH_NOTHING = ("aten::_unsafe_view", "aten::_reshape_alias", "aten::lift_fresh", "aten::empty", "aten::empty_like",
                   "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided")  # fmt: skip

Ints = np.ndarray[Any, np.dtype[np.int64]]
Mark = tuple[int, Any, Any]  # number of a part, and when it began and ended


@dataclass(frozen=True, eq=False)
class Watched:
    """One generation, part by part."""

    # A row per forward of the decoder, the first one the prefill; columns OF_STEP [ns]: BETWEEN is the time since the
    # step before, a part that the model does not have is a column of zeros
    steps: pd.DataFrame
    encoder_ns: int
    encoder_layers_ns: int  # of its layers alone
    wall_ns: int  # from the call to its return

    @property
    def start_ns(self) -> int:
        """What generation does before, between encoder and prefill, and after the last step."""
        return self.wall_ns - self.encoder_ns - int(self.steps.to_numpy().sum())

    def lasting(self, wall_ns: float) -> Watched:
        """The same generation on a machine whose speed makes it last so long [ns]."""
        scale = wall_ns / self.wall_ns
        steps = (scale * self.steps).round().astype("int64")
        return Watched(steps, round(scale * self.encoder_ns), round(scale * self.encoder_layers_ns), round(wall_ns))


def where(model: nn.Module) -> str:
    """The kind of accelerator that the model lives on, ``"cpu"`` for none."""
    return next((parameter.device.type for parameter in model.parameters() if parameter.device.type != "cpu"), "cpu")


def watch(model: nn.Module, generate: Callable[[], object], clock: Any = None) -> Watched:
    """Run one generation of this model with a clock around every part.

    On an accelerator the clocks are events on its stream: its own time is told, and nothing waits for it. The
    models' own code runs unchanged; what the clocks cost shows as the difference to a run without them. ``generate()``
    runs ``model``; another ``clock`` may count something else than time, with ``mark()`` and ``ns(marks)`` as a
    :class:`~effkit.timing.Stopwatch` has them. ValueError when the model has no layers that can be told, or
    ``generate`` never calls it.
    """
    clock = clock or Stopwatch(where(model))
    return _by_part(*_marked(model, generate, clock), clock)


def _marked(model: nn.Module, generate: Callable[[], object], clock: Any) -> tuple[list[Part], list[Mark]]:
    """The parts of a model, and what its clocks marked in one generation, which itself is the first."""
    parts = [Part(_STEP, -1, model), *module_roles.parts(model)]
    with _clocked(parts, clock) as marks:
        start = clock.mark()
        generate()
        end = clock.mark()
    return parts, [(-1, start, end), *marks]


@contextmanager
def _clocked(parts: Sequence[Part], clock: Any) -> Iterator[list[Mark]]:
    """Within it, every call of a part's forward is marked."""
    marks: list[Mark] = []
    with ExitStack() as stack:
        for number, part in enumerate(parts):
            timed = _timed(part.module.forward, number, marks, clock.mark)
            stack.enter_context(mock.patch.object(part.module, "forward", timed))
        yield marks


def _timed(forward: Any, number: int, marks: list[Mark], mark: Callable[[], Any]) -> Any:
    # wraps: generate() reads the signature of its model's forward. Hooks would cost several times as much.
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = mark()
        result = forward(*args, **kwargs)
        marks.append((number, begin, mark()))
        return result

    return run


def _by_part(parts: Sequence[Part], marks: Sequence[Mark], clock: Any) -> Watched:
    """The marks as times; the first pair of them encloses the generation and belongs to no part."""
    numbers, begins, ends = zip(*marks, strict=True)
    begin, end = np.split(clock.ns([*begins, *ends]), 2)
    wall_ns, begin, end, of_part = int(end[0] - begin[0]), begin[1:], end[1:], np.array(numbers[1:], dtype=int)
    names = np.array([part.name for part in parts])[of_part]
    layers = np.array([part.layer for part in parts])[of_part]
    top_begin, top_end = np.sort(begin[names == _STEP]), np.sort(end[names == _STEP])
    if not len(top_begin):
        raise ValueError("the generation never ran the model: is it the model that generate() belongs to?")
    step = np.searchsorted(top_begin, begin, side="right") - 1
    encoder_ns, layers_ns = (int((end - begin)[names == part].sum()) for part in (ENCODER, module_roles.ENCODER_LAYER))
    # several modules of one part in one layer: from the first's begin to the last's end; keys and values each alone
    place = np.where(names == CROSS_KV, -2 - np.arange(len(names)), layers)
    marked = pd.DataFrame({"part": names, "step": step, "place": place, "begin": begin, "end": end})[step >= 0]
    spans = marked.groupby(["part", "step", "place"]).agg({"begin": "min", "end": "max"})
    sums = (spans["end"] - spans["begin"]).groupby(["part", "step"]).sum().unstack("part", fill_value=0)
    steps = sums.reindex(range(len(top_begin)), columns=[*OF_LAYER, module_roles.LAYER, OUTPUT], fill_value=0)
    steps = steps.rename_axis(index="step", columns=None)
    top_ns, layer_ns = top_end - top_begin, steps.pop(module_roles.LAYER)
    steps[CROSS] -= steps[CROSS_KV]
    steps[NORMS] = layer_ns - steps[[SELF, CROSS_KV, CROSS, FFN]].sum(axis=1)
    steps[EMBEDDING] = top_ns - layer_ns - steps[OUTPUT]
    steps[BETWEEN] = np.append(0, top_begin[1:] - top_end[:-1])
    return Watched(steps[list(OF_STEP)], encoder_ns, layers_ns, wall_ns)


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
        """Marks as the time of the operators before them, which are run again for it; one that was not kept counts
        1 ns: marks keep their order."""
        each = np.ones(self.number, np.int64)
        with _disable_current_modes():
            self._run_again()  # warms up
            each[self.first :] += self._run_again()
        return np.append(0, np.cumsum(each))[list(marks)]

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
            self.per_call_ns = float(np.median([self._hand_out_ns() for _ in range(_REPEATS)]))
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
    """The last step of a generation of ``num_steps``, part by part: columns ``launches``, how many operators; and what
    ``operators`` take when run alone, and ``framework``, the code around them run alone, as fractions of the time of
    such a step with both, run in turn with them."""
    shares = []
    with torch.random.fork_rng():
        with Launches() as counter:
            number = watch(model, generate, counter).steps.iloc[-1]
        with Operators(-(-3 * counter.number // (2 * num_steps)), where(model)) as recorder:  # a step, and some before
            recorded = _marked(model, generate, recorder)
        for _ in range(_REPEATS):
            last = watch(model, generate).steps.drop(columns=BETWEEN).iloc[-max(1, num_steps // _LAST) :]
            operators = _by_part(*recorded, recorder).steps.iloc[-1]
            with Framework(recorder) as clock:
                framework = watch(model, generate, clock).steps.iloc[-1]
            alone = pd.DataFrame({OPERATORS: operators, FRAMEWORK: framework}).clip(lower=0)
            shares.append(alone / last.sum(axis=1).median())
    middle = pd.concat(shares).groupby(level=0, sort=False).median()
    return middle.assign(**{LAUNCHES: number.astype("int64")})
