"""Asynchronous training with slow environments (arXiv 2401.11349): workers that wait for the slowest, or for nobody.

An environment is a thread that waits for as long as a simulation would take; the policy's update is a real one.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit import Account

SYNCHRONOUS, ASYNCHRONOUS = "synchronous", "asynchronous"
_WAIT_S = 30.0  # for a worker to end, before something is said to be wrong


@dataclass(frozen=True)
class Setting:
    """What is run.

    Attributes
    ----------
    num_workers
        Environments, each a thread.
    num_rounds
        Updates of the policy; each learns from ``num_workers`` transitions.
    least_s, extra_s
        A simulation step takes ``least_s`` and an exponential time of mean ``extra_s`` more.
    seed
        Of the times.
    """

    num_workers: int = 8
    num_rounds: int = 24
    least_s: float = 0.02
    extra_s: float = 0.02
    seed: int = 0

    def __post_init__(self) -> None:
        if self.num_workers < 1 or self.num_rounds < 1 or min(self.least_s, self.extra_s) < 0:
            raise ValueError(
                f"{self.num_workers} workers, {self.num_rounds} rounds, {self.least_s} and {self.extra_s} s: expected "
                "at least 1, 1, 0 and 0"
            )

    @property
    def mean_s(self) -> float:
        """Of one simulation step."""
        return self.least_s + self.extra_s

    @property
    def slowest_s(self) -> float:
        """Expected slowest of one step of every worker: of n exponential times the largest is n's harmonic number."""
        return self.least_s + self.extra_s * sum(1 / k for k in range(1, self.num_workers + 1))

    def times_s(self) -> Any:
        """Simulation times [s], shape (num_workers, 2 x num_rounds): a quick worker does more than its share."""
        random = np.random.default_rng(self.seed)
        return self.least_s + random.exponential(self.extra_s, (self.num_workers, 2 * self.num_rounds))


class Learner:
    """A small policy, and its update from a batch of transitions."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.policy = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=1e-3)
        self.version = 0

    def update(self, num_transitions: int) -> None:
        """One step on as many random transitions."""
        loss = (self.policy(torch.randn(num_transitions, 8)) ** 2).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.version += 1


def predict(setting: Setting, mode: str) -> Account:
    """Time of all workers [ns]: simulating, and waiting for the slowest; from the distribution of the times alone.

    A synchronous round takes the slowest of n; without rounds a worker's step takes the mean. Updates and switching
    between threads count as nothing. The band is three standard deviations of the sums of random times, and a tenth of
    the total towards longer for what was left out.
    """
    _known(mode)
    s, n, rounds = setting, setting.num_workers, setting.num_rounds
    if mode == SYNCHRONOUS:
        wall, variance = rounds * s.slowest_s, rounds * s.extra_s**2 * sum(1 / k**2 for k in range(1, n + 1))
    else:
        wall, variance = rounds * s.mean_s, rounds * s.extra_s**2 / n
    total, deviation = n * wall, 3 * n * math.sqrt(variance)
    simulating = n * rounds * s.mean_s
    return _account(mode, total, simulating, "the distribution of the waits", "derived",
                    low=round(1e9 * (total - deviation)), high=round(1e9 * (1.1 * total + deviation)))  # fmt: skip


def measure(setting: Setting, mode: str) -> Account:
    """Run it: ``num_rounds`` updates of ``num_workers`` transitions each. Time of all workers by the clock [ns].

    A companion says how many updates old the policy was that transitions came from, on average (thousandths).

    Raises
    ------
    RuntimeError
        When a worker did not end.
    """
    _known(mode)
    times = setting.times_s()
    learner = Learner(setting.seed)
    done: queue.SimpleQueue[tuple[float, int]] = queue.SimpleQueue()  # seconds simulated, version acted with
    go = [threading.Semaphore(0) for _ in range(setting.num_workers)]
    over = threading.Event()

    def work(worker: int) -> None:
        for planned in times[worker]:
            if mode == SYNCHRONOUS:
                go[worker].acquire()
            version, begin = learner.version, time.perf_counter()
            if over.wait(planned):
                return
            done.put((time.perf_counter() - begin, version))

    learner.update(setting.num_workers)  # the first one is slow, and is no worker's fault
    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(setting.num_workers)]
    simulated, lags, begin = 0.0, [], time.perf_counter()
    try:
        for thread in threads:
            thread.start()
        for _ in range(setting.num_rounds):
            if mode == SYNCHRONOUS:
                for gate in go:
                    gate.release()
            for _ in range(setting.num_workers):
                seconds, version = done.get(timeout=_WAIT_S)
                simulated += seconds
                lags.append(learner.version - version)
            learner.update(setting.num_workers)
        wall = time.perf_counter() - begin
    finally:
        over.set()
        for gate in go:
            gate.release()
        for thread in threads:
            thread.join(_WAIT_S)
    if any(thread.is_alive() for thread in threads):
        raise RuntimeError("a worker did not end: something holds the interpreter")
    lag = round(1000 * float(np.mean(lags)))
    old = Account.of("Updates that a transition is behind", "thousandths", {"updates": lag}, total=lag,
                     source="versions of the policy")  # fmt: skip
    total = setting.num_workers * wall
    return _account(mode, total, min(simulated, total), "the clock", "measured").with_companions(old)


def bars(runs: Mapping[str, Account], setting: Setting) -> pd.DataFrame:
    """Time by the clock, for :func:`lessons.drawing.policies`: ``step_ns`` predicted and run; none is dropped."""
    rows = {}
    for mode, run in runs.items():
        rows[f"{mode}, predicted"] = predict(setting, mode).total / setting.num_workers
        rows[f"{mode}, run"] = run.total / setting.num_workers
    return pd.DataFrame({"step_ns": rows, "dropped_frac": 0.0}).rename_axis("way")


def worth(num_workers: Any, *, least_s: float = 0.02, extra_s: float = 0.02) -> pd.DataFrame:
    """How many times longer synchronous rounds take, ``expected``, indexed by ``workers``: slowest over mean."""
    rows = {int(n): Setting(num_workers=int(n), least_s=least_s, extra_s=extra_s) for n in num_workers}
    return pd.DataFrame({"expected": {n: s.slowest_s / s.mean_s for n, s in rows.items()}}).rename_axis("workers")


def _known(mode: str) -> None:
    if mode not in (SYNCHRONOUS, ASYNCHRONOUS):
        raise ValueError(f"mode is {mode!r}, expected {SYNCHRONOUS!r} or {ASYNCHRONOUS!r}")


def _account(mode: str, total_s: float, simulating_s: float, source: str, basis: str, **more: Any) -> Account:
    total, simulating = round(1e9 * total_s), round(1e9 * simulating_s)
    rows = {"simulating": simulating, "waiting": total - simulating}
    return Account.of("Time of all workers", "ns", rows, total=total, source=source, basis=basis,
                      setting={"mode": mode}, **more)  # fmt: skip
