"""The clock on somebody's loop: what a step waits for its loader, and what its operators take."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch

from effkit.advice import families
from effkit.advice.probing import Step
from effkit.advice.step_hooks import listening
from effkit.device import synchronize
from effkit.recording import capture
from effkit.timing import elapsed_ns
from effkit.trace.names import DEVICE

WARM_UP = 4  # batches, of a loader with processes


class Rows(NamedTuple):
    """Where a step's time goes, by what operators do [ns]; and how many it runs, on a device how often it launches."""

    rows_ns: dict[str, float]
    num_operators: int


def wait_ns(step: Step, loader: Any, num_batches: int) -> tuple[float, float]:
    """Run over a loader: what a step waits for it, and the whole loop per step [ns].

    The first batches are not counted where processes prepare them: these have to start, and memory that was shared when
    they did is copied page by page.
    """
    aside = WARM_UP if getattr(loader, "num_workers", 0) else 0
    waits: list[int] = []
    iterator = iter(loader)
    begun = now = time.perf_counter_ns()
    for number in range(num_batches + aside):
        now = time.perf_counter_ns()
        if number == aside:
            begun = now
        batch = next(iterator, None)
        if batch is None:
            break
        if number >= aside:
            waits.append(time.perf_counter_ns() - now)
        step(batch)
        synchronize()
    whole = time.perf_counter_ns() - begun
    return sum(waits) / max(1, len(waits)), whole / max(1, len(waits))


def rows(
    step: Step, model: torch.nn.Module, batches: Sequence[Any], *, recomputes: bool, steps_ns: Sequence[int], num: int
) -> Rows:
    """By what operators do, per step: of ``num`` batches, from short to long ones, on the clock of all plain steps
    ``steps_ns``, for the machine's speed drifts."""
    num, taken = min(num, len(batches)), list[int]()
    by_time = sorted(range(len(batches)), key=steps_ns.__getitem__)
    chosen = [batches[by_time[(2 * i + 1) * len(batches) // (2 * num)]] for i in range(num)]

    def turn() -> None:
        taken.append(elapsed_ns(partial(step, chosen[len(taken) % num])))

    with listening(model) if recomputes else nullcontext():
        # plain steps, one for the profiler to warm up, recorded steps, plain ones again
        recorded = capture(turn, warmup=0, steps=num)
    before, after = taken[:num], taken[2 * num + 1 :]  # the later ones begin at the second batch
    plain_ns = sum(map(min, before, [after[-1], *after[:-1]]))
    scale = sum(steps_ns) / len(steps_ns) / plain_ns
    events, on_device = recorded.events, recorded.events["category"].isin(DEVICE)
    # a graph's kernels have one launch, an operator may be several deep before it launches
    launched = events.loc[on_device, "correlation"].nunique() or (events["category"] == "cpu_op").sum()
    rows_ns = {name: value * scale for name, value in families.rows_ns(recorded, plain_ns).items()}
    return Rows(rows_ns, int(launched) // num)
