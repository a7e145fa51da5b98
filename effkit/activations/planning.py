"""front(), cheapest(): combinations of levers by time and memory, from one calibration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.activations import gradients
from effkit.activations.levers import Levers, parted
from effkit.activations.live import Calibration
from effkit.activations.on_ranks import SENT_BYTES, TIME
from effkit.activations.prediction import predict
from effkit.activations.sharding import BLOCKS, DDP, MODEL, ZERO1, ZERO2, ZERO3
from effkit.activations.timeline import MOVED
from effkit.arguments import checked_amount, checked_whole
from effkit.lab import calibration_of
from effkit.progress_bar import working
from effkit.units import readable

# each lever's positions, from one that is off; of two on the list the later saves more, as a rule
POSITIONS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "checkpoint": ({"checkpoint_every": 1, "keep": "matmul"}, {"checkpoint_every": 2}, {"checkpoint_every": 1}),
    "micro_batches": ({"micro_batches": 2}, {"micro_batches": 4}),
    "autocast": ({"autocast": "bfloat16"},),
    "compress": ({"compress": "int8"},),
    "offload": ({"offload_frac": 0.5}, {"offload_frac": 1.0}),
    "optimizer_states": ({"optimizer_states": "int8"}, {"optimizer_states": "fp8_e4m3"}),
    "sharding": ({"shard": ZERO1, "wrap": BLOCKS}, {"shard": ZERO3, "wrap": MODEL}, {"shard": ZERO2, "wrap": BLOCKS},
                 {"shard": ZERO3, "wrap": BLOCKS}),
}  # fmt: skip
LEVERS = ("checkpoint", "micro_batches", "autocast", "compress", "optimizer_states")  # that are combined
ON_RANKS = ("sharding", "checkpoint", "micro_batches")


@working("Comparing combinations of levers")
def front(base: Account, *, levers: Sequence[str] = (), lossless: bool = False, num_ranks: int = 1) -> pd.DataFrame:
    """Predicted time and peak memory of combinations of levers, at the size that was measured.

    The search begins with the plain step and adds one lever at a time to what is on the front so far (no other
    combination is both quicker and smaller), until nothing new is found: combinations of what does not pay alone are
    left out. ValueError for a base whose levers were not timed, or an unknown lever.

    Parameters
    ----------
    base
        What ``measure(..., time_levers=True)`` returned.
    levers
        Which to combine, of :data:`POSITIONS`, :data:`LEVERS` or :data:`ON_RANKS` unless given; those that change
        nothing in this step, such as checkpointing a model that checkpoints already, are left out. ``"offload"`` frees
        nothing where host and device memory are one.
    lossless
        Leave out what changes gradients or updates; whether micro-batches do was tried on this model.
    num_ranks
        Of as many ranks as the base has links between, which share by ``"ddp"`` unless ``"sharding"`` says otherwise.

    Returns
    -------
    DataFrame
        One row per combination tried, by time: the levers' settings that differ from a plain step as a text
        ``setting``, ``peak_bytes``, ``step_ns``, ``lossless`` and ``on_front``; with ranks ``exposed_ns`` of the step,
        in which a rank waits for others, and ``sent_bytes``, of whole tensors; ``attrs["settings"]`` has the settings
        by that text.
    """
    if isinstance(levers, str):
        raise TypeError(f"levers is a list of names; given: {levers!r}")
    num_ranks = checked_whole("num_ranks", num_ranks, 1)
    levers = levers or (ON_RANKS if num_ranks > 1 else LEVERS)
    if unknown := set(levers) - set(POSITIONS):
        raise ValueError(f"no such lever: {', '.join(sorted(unknown))}; there are {', '.join(POSITIONS)}")
    if calibration_of(base, Calibration, "activations").clock is None:
        raise ValueError("the time of levers was not measured: measure(..., time_levers=True) does that")
    of_ranks = base.calibration.of_ranks
    if num_ranks > 1 and (of_ranks is None or of_ranks.link.num_ranks != num_ranks):
        raise ValueError(f"the time of steps on {num_ranks} ranks was not measured: measure(..., time_levers=True, "
                         f"links=links({num_ranks})) does that")  # fmt: skip
    if "sharding" in levers and num_ranks == 1:
        raise ValueError("sharding is between ranks: give num_ranks, or leave it out")
    start = Levers(world_size=num_ranks, shard=DDP) if num_ranks > 1 else Levers()
    tried: dict[Levers, tuple[int, ...]] = {}  # its peak and its time; with ranks what is exposed, and what is sent
    new = [start]
    positions = {name: [one for one in POSITIONS[name] if _acts(base, start, one)] for name in levers}
    while new:
        for combination in new:
            account = predict(base, **asdict(combination))
            time = account.companion(TIME)
            sent = (int(time.frame["value"].iloc[-1]), account.companion(SENT_BYTES).total) if num_ranks > 1 else ()
            tried[combination] = account.total, time.total, *sent
        best = _on_front(tried)
        further = dict.fromkeys(more for combination in best for more in _further(combination, positions))
        new = [more for more in further
               if more not in tried and (_lossless(base, more) or not lossless) and _possible(base, more)]  # fmt: skip
    rows = [(_name(combination), *figures[:2], _lossless(base, combination), combination in best, *figures[2:])
            for combination, figures in tried.items()]  # fmt: skip
    columns = ["setting", "peak_bytes", "step_ns", "lossless", "on_front", "exposed_ns", "sent_bytes"]
    table = pd.DataFrame(rows, columns=columns[: len(rows[0])])
    table = table.sort_values("step_ns", kind="stable", ignore_index=True)
    table.attrs["settings"] = {_name(combination): combination.changed for combination in tried}
    return table


@working("Looking for the quickest combination that fits")
def cheapest(
    base: Account, budget_bytes: int, *, levers: Sequence[str] = (), lossless: bool = False, num_ranks: int = 1
) -> Account:  # fmt: skip
    """The quickest combination of levers whose predicted peak, its band included, fits into a budget.

    ``levers``, ``lossless`` and ``num_ranks`` are those of :func:`front`; the budget is that of a rank. Measure its
    setting with ``measure(model, batch, base=base, **changes)``; the changes are in ``front(base).attrs["settings"]``.
    ValueError when none fits: the smallest is named.
    """
    budget_bytes = checked_amount("budget_bytes", budget_bytes)
    table = front(base, levers=levers, lossless=lossless, num_ranks=num_ranks)
    for name in table["setting"]:
        account = predict(base, **{**asdict(Levers()), **table.attrs["settings"][name]})
        if (account.high or account.total) <= budget_bytes:
            return account
    smallest = table.loc[table["peak_bytes"].idxmin()]
    raise ValueError(
        f"no combination of these levers fits into {readable(budget_bytes, 'bytes')}: the smallest, "
        f"{smallest['setting']}, needs {readable(smallest['peak_bytes'], 'bytes')}; use a smaller batch"
    )


def _lossless(base: Account, levers: Levers) -> bool:
    return levers.lossless and not (levers.micro_batches > 1 and gradients.parts_change(base.calibration))


def _name(levers: Levers) -> str:
    return ", ".join(f"{knob}={value}" for knob, value in levers.changed.items()) or "plain"


def _possible(base: Account, levers: Levers) -> bool:
    return levers.micro_batches <= base.setting["batch_size"] and bool(base.calibration.clock.knows(levers))


def _acts(base: Account, start: Levers, position: Mapping[str, Any]) -> bool:
    """Whether it changes which operators run: recomputing does not where the model checkpoints already."""
    if not _possible(base, levers := replace(start, **position)):
        return False
    timelines = [base.calibration.forecaster.timeline(*parted({**base.setting, **asdict(one)}))
                 for one in (levers, start)]  # fmt: skip
    run, plain = ([one.signatures[i] for i in np.flatnonzero(one.work[:, MOVED])] for one in timelines)  # no views
    return run != plain


def _further(levers: Levers, positions: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Levers]:
    """One more lever, or one that is in force at another position."""
    for name in positions:
        for position in positions[name]:
            yield replace(levers, **{"keep": "none", **position} if name == "checkpoint" else position)


def _on_front(points: Mapping[Levers, tuple[int, ...]]) -> list[Levers]:
    """Those than which no other is smaller and at least as quick, in order of time."""
    best: list[Levers] = []
    for combination in sorted(points, key=lambda levers: (points[levers][1], points[levers][0])):
        if not best or points[combination][0] < points[best[-1]][0]:
            best.append(combination)
    return best
