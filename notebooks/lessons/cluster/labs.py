"""The mini-labs of 06e: a schedule whose costs are timed, and workers that wait for the clock."""

from __future__ import annotations

import pandas as pd

from effkit import Account, models
from lessons.cluster import hybrid_parallel, workers
from lessons.minilabs import Arm, MiniLab, ratio

RANKS, CAPACITY, GROUP = 128, 512, 64  # ranks, tokens of each, and ranks that the longest sequence needs


def schedules(cost: hybrid_parallel.SequenceCost, group: int, seed: int) -> list[hybrid_parallel.Schedule]:
    """The same sequences on a mesh, evened out by tokens, and by time; the longest needs ``group`` ranks."""
    lengths = hybrid_parallel.skewed_lengths(8 * RANKS, median=128, longest=group * CAPACITY, seed=seed)
    plain = [way(lengths, RANKS, CAPACITY) for way in (hybrid_parallel.mesh, hybrid_parallel.naive)]
    return [*plain, hybrid_parallel.balanced(lengths, RANKS, CAPACITY, cost)]


def _compared(seed: int) -> pd.DataFrame:
    """Their steps by what sequences of a Llama of one layer cost here, with the assumed link."""
    cost = hybrid_parallel.calibrate(models.text(layers=1, hidden=64, vocabulary=200, device="cpu"))
    return hybrid_parallel.compare(schedules(cost, GROUP, seed), cost, hybrid_parallel.moving_frac())


BYTE_SCALE = MiniLab(
    "ByteScale", "step of 128 simulated ranks, the longest sequence on 64 of them", "ns",
    _compared,
    lambda table: {str(name): Arm(float(dur_ns), 1) for name, dur_ns in table["makespan_ns"].items()},
    {"ByteScale": ratio(hybrid_parallel.MESH, hybrid_parallel.BALANCED)}, clocked=True,
)  # fmt: skip


def _both_modes(seed: int) -> dict[str, Account]:
    setting = workers.Setting(num_workers=8, seed=seed)
    return {mode: workers.measure(setting, mode) for mode in (workers.SYNCHRONOUS, workers.ASYNCHRONOUS)}


FIN_RAY = MiniLab(
    "Fin-Ray", "time of 8 workers to as many updates", "ns", _both_modes,
    lambda runs: {mode: Arm(float(run.total), 24) for mode, run in runs.items()},
    {"Fin-Ray": ratio(workers.SYNCHRONOUS, workers.ASYNCHRONOUS)}, clocked=True,
)  # fmt: skip

LABS = (BYTE_SCALE, FIN_RAY)
