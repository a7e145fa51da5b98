"""Time of a plain ``step(token, cache)`` function, token by token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from effkit.account import Account
from effkit.decoder.accounting import PER_TOKEN, RATE, TIME
from effkit.device import synchronize
from effkit.lab import Progress, tell

Step = Callable[[Any, Any], tuple[Any, Any]]
FIRST, LATER = "first step", "later steps"


@dataclass(frozen=True, eq=False)
class Steps:
    """Median time of every step [ns]."""

    step_ns: np.ndarray[Any, np.dtype[np.float64]]


def measure_step(
    step: Step, first: Any, *, num_steps: int = 20, batch: int = 1, repeats: int = 3,
    progress: Progress | None = None,
) -> Account:  # fmt: skip
    """Call ``step`` for every token; rows are the first step, with no cache yet, and the later ones.

    What a step does inside is not visible here. ``batch`` says how many sequences the tokens hold. ValueError for no
    steps, or a step that does not return (token, cache).
    """
    if num_steps < 1 or batch < 1:
        raise ValueError(f"a generation has num_steps >= 1 and batch >= 1; given: {num_steps} and {batch}")
    walls, times = [], []
    with torch.no_grad():
        for turn in range(-1, repeats):  # the first time is not counted
            synchronize()
            start = time.perf_counter_ns()
            marks, token, cache = [start], first, None
            for _ in range(num_steps):
                result = step(token, cache)
                if not isinstance(result, tuple) or len(result) != 2:
                    raise ValueError(f"a step returns (token, cache); given: {type(result).__name__}")
                token, cache = result
                synchronize()
                marks.append(time.perf_counter_ns())
            if turn >= 0:
                walls.append(time.perf_counter_ns() - start)
                times.append(np.diff(marks))
            tell(progress, turn + 2, repeats + 1)
    middle = int(np.argsort(walls)[len(walls) // 2])  # rows and total of one generation: they add up whatever disturbs
    step_ns, total = np.median(times, axis=0), walls[middle]
    rows = {FIRST: int(times[middle][0]), LATER: int(times[middle][1:].sum())}
    token_ns, rate = round(total / num_steps), round(batch * num_steps / total * 1e9)
    companions = (
        Account.of(PER_TOKEN, "ns", {"token": token_ns}, total=token_ns, source="time over steps"),
        Account.of(RATE, "tokens/s", {"tokens": rate}, total=rate, source="tokens of all rows over time"),
    )
    return Account.of(
        TIME, "ns", rows, total=total, source=f"the wall clock of the middle one of {repeats} generations",
        companions=companions, setting={"num_steps": num_steps, "batch": batch}, calibration=Steps(step_ns),
    )  # fmt: skip
