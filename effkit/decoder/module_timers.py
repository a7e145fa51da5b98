"""Times of the parts of every step of a generation, read by clocks around the modules' forward."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit.decoder.module_roles import (
    BETWEEN,
    CROSS,
    CROSS_KV,
    EMBEDDING,
    ENCODER,
    ENCODER_LAYER,
    FFN,
    LAYER,
    NORMS,
    OUTPUT,
    SELF,
    Part,
    parts,
)
from effkit.device import synchronize

OF_LAYER = (SELF, CROSS_KV, CROSS, FFN, NORMS)
OF_STEP = (*OF_LAYER, EMBEDDING, OUTPUT, BETWEEN)
_STEP = "step"

Ints = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True, eq=False)
class Watched:
    """One generation, part by part.

    Attributes
    ----------
    steps
        One row per forward of the decoder, the first one the prefill; columns ``OF_STEP`` [ns]. ``BETWEEN`` is the
        time since the step before. A part that the model does not have is a column of zeros.
    encoder_ns, encoder_layers_ns
        The encoder, and of it the layers.
    wall_ns
        From the call to its return.
    """

    steps: pd.DataFrame
    encoder_ns: int
    encoder_layers_ns: int
    wall_ns: int

    @property
    def start_ns(self) -> int:
        """What generation does before, between encoder and prefill, and after the last step."""
        return self.wall_ns - self.encoder_ns - int(self.steps.to_numpy().sum())


class Clock(Protocol):
    """Whatever can be read at any moment, and tells how far apart two moments were."""

    def mark(self) -> Any: ...

    def ns(self, marks: Sequence[Any]) -> Ints: ...


def watch(model: nn.Module, generate: Callable[[], object], clock: Clock | None = None) -> Watched:
    """Run one generation of this model with a clock around every part.

    On a GPU the clocks are events on the stream, so that the device's time is told and nothing waits for it. The
    models' own code runs unchanged; what the clocks cost shows as the difference to a run without them.

    Parameters
    ----------
    model, generate
        ``generate()`` runs ``model``.
    clock
        Another one, which may count something else than time.

    Raises
    ------
    ValueError
        When the model has no layers that can be told, or ``generate`` never calls it.
    """
    known = [Part(_STEP, -1, model), *parts(model)]
    clock = clock or Stopwatch(cuda=any(parameter.is_cuda for parameter in model.parameters()))
    with _clocked(known, clock) as marks:
        start = clock.mark()
        generate()
        end = clock.mark()
    return _told(known, [(-1, start, end), *marks], clock)


class Stopwatch:
    """Time: of the host, or of the CUDA stream, where a mark is an event."""

    def __init__(self, *, cuda: bool) -> None:
        self.cuda = cuda

    def mark(self) -> Any:
        """Now."""
        if not self.cuda:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def ns(self, marks: Sequence[Any]) -> Ints:
        """Marks as ns since the first of them."""
        if not self.cuda:
            return np.asarray(marks, dtype=np.int64) - marks[0]
        synchronize()
        return np.asarray([round(1e6 * marks[0].elapsed_time(mark)) for mark in marks], dtype=np.int64)


@contextmanager
def _clocked(known: Sequence[Part], clock: Clock) -> Iterator[list[tuple[int, Any, Any]]]:
    """Within it, every call of a part's forward is marked: (number of the part, begin, end)."""
    marks: list[tuple[int, Any, Any]] = []
    before = [part.module.__dict__.get("forward") for part in known]
    try:
        for number, part in enumerate(known):
            part.module.forward = _timed(part.module.forward, number, marks, clock.mark)
        yield marks
    finally:
        for part, own in reversed(list(zip(known, before, strict=True))):
            if own is None:
                part.module.__dict__.pop("forward", None)
            else:
                part.module.forward = own


def _timed(forward: Any, number: int, marks: list[tuple[int, Any, Any]], mark: Callable[[], Any]) -> Any:
    # wraps: generate() reads the signature of its model's forward. Hooks would cost several times as much.
    @functools.wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = mark()
        result = forward(*args, **kwargs)
        marks.append((number, begin, mark()))
        return result

    return run


def _told(known: Sequence[Part], marks: Sequence[tuple[int, Any, Any]], clock: Clock) -> Watched:
    number = np.asarray([mark[0] for mark in marks])
    begin = clock.ns([marks[0][1], *(mark[1] for mark in marks)])[1:]
    end = clock.ns([marks[0][1], *(mark[2] for mark in marks)])[1:]
    frame = pd.DataFrame({"begin": begin, "end": end}).assign(
        part=[known[n].name if n >= 0 else "" for n in number], layer=[known[n].layer if n >= 0 else -1 for n in number]
    )
    tops = frame[frame["part"] == _STEP].sort_values("begin")
    if tops.empty:
        raise ValueError("the generation never ran the model: is it the model that generate() belongs to?")
    frame["step"] = np.searchsorted(tops["begin"], frame["begin"], side="right") - 1
    wall_ns = int(end[0] - begin[0])
    of_encoder = frame[frame["part"].isin((ENCODER, ENCODER_LAYER))]
    encoder_ns = {part: int((rows["end"] - rows["begin"]).sum()) for part, rows in of_encoder.groupby("part")}
    inside = frame[(frame["step"] >= 0) & ~frame["part"].isin((ENCODER, ENCODER_LAYER, _STEP, ""))]
    # several modules of one part in one layer: from the first's begin to the last's end
    spans = inside[inside["part"] != CROSS_KV].groupby(["step", "layer", "part"], sort=False).agg(
        begin=("begin", "min"), end=("end", "max")
    )  # fmt: skip
    sums = (spans["end"] - spans["begin"]).groupby(["step", "part"]).sum().unstack("part", fill_value=0)
    keys = inside[inside["part"] == CROSS_KV]
    sums[CROSS_KV] = (keys["end"] - keys["begin"]).groupby(keys["step"]).sum()
    sums = sums.reindex(columns=[*OF_LAYER, LAYER, OUTPUT], fill_value=0).fillna(0).astype("int64")
    top_ns = (tops["end"] - tops["begin"]).to_numpy()
    steps = sums.drop(columns=LAYER)
    steps[CROSS] -= steps[CROSS_KV]
    steps[NORMS] = sums[LAYER] - steps[[SELF, CROSS_KV, CROSS, FFN]].sum(axis=1)
    steps[EMBEDDING] = top_ns - sums[LAYER] - sums[OUTPUT]
    gaps = tops["begin"].to_numpy()[1:] - tops["end"].to_numpy()[:-1]
    steps[BETWEEN] = np.concatenate([[0], gaps])
    return Watched(steps[list(OF_STEP)], encoder_ns.get(ENCODER, 0), encoder_ns.get(ENCODER_LAYER, 0), wall_ns)
