"""The accounts of the padding lab: cells of whatever was recorded, and the totals of one epoch of a plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effkit.account import Account
from effkit.captured import Capture
from effkit.padding.buckets import Ints
from effkit.padding.calibration import CostModel
from effkit.padding.loader_audit import Watch
from effkit.padding.plans import Plan
from effkit.padding.rank_sharding import shares

EPOCH_TIME = "Time of one epoch"
EPOCH_CELLS = "Input cells of one epoch"
PEAK = "Peak memory"
LIMIT_KNOBS = ("batch_size", "max_input_cells", "num_buckets", "num_output_buckets", "quadratic",
               "pad_to_multiple_of", "seed")  # fmt: skip


def account(recorded: Plan | Watch | Capture | Sequence[Any], cells: str = "input") -> Account:
    """The cells of what was recorded: rows ``real`` and ``padding``.

    ValueError when a Capture does not say which lengths its batches had: padding is then not visible.

    Parameters
    ----------
    recorded
        A Plan; a Watch that has seen batches; plain data, one array of input lengths per batch; or a Capture whose
        ``settings`` hold such a list under ``batches``.
    cells
        As in :meth:`Plan.account`; only a Plan knows more than ``"input"``.

    Examples
    --------
    >>> account([[3, 1], [2, 2]]).share["padding"].round(2).item()
    0.2
    """
    if isinstance(recorded, Plan):
        return recorded.account(cells)
    if cells != "input":
        raise ValueError(f"only a plan knows {cells!r} cells; ask for cells='input'")
    if isinstance(recorded, Watch):
        return recorded.account
    if isinstance(recorded, Capture):
        batches = recorded.provenance.get("settings", {}).get("batches")
        if batches is None:
            raise ValueError(
                "padding is not visible in this capture: a trace holds shapes, not masks. Record it with "
                "settings={'batches': [input lengths of each batch]}"
            )
        return account(batches)
    arrays = [np.asarray(batch, dtype="int64") for batch in recorded]
    if not arrays or any(not len(batch) for batch in arrays):
        raise ValueError("account() takes one non-empty array of input lengths per batch")
    real = sum(int(batch.sum()) for batch in arrays)
    padding = sum(int((batch.max() - batch).sum()) for batch in arrays)
    total = sum(len(batch) * int(batch.max()) for batch in arrays)
    return Account.of(
        "Input cells recorded", "cells", {"real": real, "padding": padding},
        total=total, source="the shapes of the batches",
    ).closed()  # fmt: skip


def epoch_rows(plan: Plan, cost: CostModel, world_size: int = 1) -> tuple[dict[str, int], float, int]:
    """What the cost model says an epoch spends its time on, per rank [ns]: the rows, their sum unrounded, the steps.

    ``step overhead`` is the fixed cost of the steps; ``real`` what the real cells alone would take; ``padding`` the
    rest of the computing; ``waiting`` for the slowest rank of each step.
    """
    frame = plan.frame
    lengths = {name: plan.lengths[name].to_numpy() for name in plan.lengths}
    times = cost.step_ns(frame["num_rows"], frame["input_length"], frame.get("output_length", 0))

    def of_piece(piece: Ints) -> float:
        longest = {name: values[piece].max() for name, values in lengths.items()}
        longest["input_length"] = plan.padded(longest["input_length"])
        return float(cost.step_ns(len(piece), **longest))

    steps = shares(plan, times, world_size, of_piece)
    overhead = cost.coefficients[0] * len(steps)
    names = ("input_real", "output_real", "input_squared_real", "cross_real")
    cells = [float(np.sum(frame.get(name, 0))) for name in names]
    real = float(np.dot(cost.coefficients[1:], cells)) / world_size  # no fixed part
    mean, slowest = float(steps.mean(axis=1).sum()), float(steps.max(axis=1).sum())
    rows = {"step overhead": round(overhead), "real": round(real), "padding": round(mean - overhead - real)}
    if world_size > 1:
        rows["waiting"] = round(slowest - mean)
    return rows, slowest, len(steps)


def companions(
    plan: Plan, num_steps: int, peak_bytes: int, sources: Sequence[str], *, exact: bool = False, **of_peak: Any
) -> tuple[Account, Account, Account]:
    """Input cells of the epoch, steps per rank, and the largest peak of any step [bytes]; where these come from. In a
    prediction the first two are ``exact``: they have a band of no width."""
    cells = plan.account("input")
    bands: list[dict[str, Any]] = [{"low": one, "high": one} if exact else {} for one in (cells.total, num_steps)]
    return (
        Account(EPOCH_CELLS, "cells", cells.frame, cells.total, sources[0], **bands[0]),
        Account.of("Steps of one epoch", "steps", {"steps": num_steps}, total=num_steps, source=sources[1],
                   basis="derived", **bands[1]),
        Account.of(PEAK, "bytes", {"largest step": peak_bytes}, total=peak_bytes, source=sources[2], **of_peak),
    )  # fmt: skip


def setting_of(plan: Plan, world_size: int = 1) -> dict[str, Any]:
    """The knobs at which a plan stands: strategy, its limits, longest input [cells], ranks."""
    knobs = {name: tuple(value) if np.ndim(value) else value.item() if isinstance(value, np.generic) else value
             for name, value in plan.limits.items() if name in LIMIT_KNOBS}  # fmt: skip
    longest = int(plan.lengths["input_length"].max())
    return {"strategy": plan.strategy, **knobs, "max_length": longest, "world_size": world_size}
