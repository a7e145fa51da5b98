"""Times of the parts of every step of a generation, read by clocks around the modules' forward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pandas as pd
from torch import nn

from effkit.decoder import module_roles
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, ENCODER, FFN, NORMS, OUTPUT, SELF, Part
from effkit.timing import Stopwatch

OF_LAYER = (SELF, CROSS_KV, CROSS, FFN, NORMS)
OF_STEP = (*OF_LAYER, EMBEDDING, OUTPUT, BETWEEN)
_STEP = "step"

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Watched:
    """One generation, part by part.

    ``steps`` has a row per forward of the decoder, the first one the prefill, and columns ``OF_STEP`` [ns]: ``BETWEEN``
    is the time since the step before, a part that the model does not have is a column of zeros. ``encoder_ns`` is of
    the encoder, ``encoder_layers_ns`` of its layers alone, ``wall_ns`` from the call to its return.
    """

    steps: pd.DataFrame
    encoder_ns: int
    encoder_layers_ns: int
    wall_ns: int

    @property
    def start_ns(self) -> int:
        """What generation does before, between encoder and prefill, and after the last step."""
        return self.wall_ns - self.encoder_ns - int(self.steps.to_numpy().sum())


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
    parts = [Part(_STEP, -1, model), *module_roles.parts(model)]
    clock = clock or Stopwatch(where(model))
    with _clocked(parts, clock) as marks:
        start = clock.mark()
        generate()
        end = clock.mark()
    return _by_part(parts, [(-1, start, end), *marks], clock)


@contextmanager
def _clocked(parts: Sequence[Part], clock: Any) -> Iterator[list[tuple[int, Any, Any]]]:
    """Within it, every call of a part's forward is marked: (number of the part, begin, end)."""
    marks: list[tuple[int, Any, Any]] = []
    with ExitStack() as stack:
        for number, part in enumerate(parts):
            timed = _timed(part.module.forward, number, marks, clock.mark)
            stack.enter_context(mock.patch.object(part.module, "forward", timed))
        yield marks


def _timed(forward: Any, number: int, marks: list[tuple[int, Any, Any]], mark: Callable[[], Any]) -> Any:
    # wraps: generate() reads the signature of its model's forward. Hooks would cost several times as much.
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = mark()
        result = forward(*args, **kwargs)
        marks.append((number, begin, mark()))
        return result

    return run


def _by_part(parts: Sequence[Part], marks: Sequence[tuple[int, Any, Any]], clock: Any) -> Watched:
    """The marks as times; the first pair of them encloses the generation and belongs to no part."""
    numbers, begins, ends = zip(*marks, strict=True)
    begin, end = (clock.ns([begins[0], *moments])[1:] for moments in (begins, ends))
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
