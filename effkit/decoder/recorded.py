"""account(): where the time of a recorded generation goes, by what its operators do; positions(): token by token."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

from effkit import operators
from effkit.account import Account
from effkit.captured import Capture
from effkit.decoder.calibration import Observed
from effkit.decoder.stepping import Steps
from effkit.operators import ATTENTION, PRODUCTS
from effkit.panes.families import NOT_VISIBLE

RECORDED = "Time of the recorded generation"
COPIES, CHOOSING, ELEMENTWISE = "cache and copies", "choosing tokens", "norms, sums and the rest"
HOST, UNSEEN = "host between operators", NOT_VISIBLE
_ROW_OF: Mapping[str, str] = {
    operators.SEARCHING: CHOOSING,
    **dict.fromkeys(operators.MULTIPLIES, PRODUCTS),
    # of a generation, attention that no fused operator computes
    **dict.fromkeys((ATTENTION, operators.BATCHED, operators.SOFTMAX), ATTENTION),
    **dict.fromkeys((operators.COPIES, operators.ASKING), COPIES),
    UNSEEN: UNSEEN,
}
_ROWS = (ATTENTION, CHOOSING, PRODUCTS, COPIES, ELEMENTWISE, UNSEEN)


def account(capture: Capture, step: str | None = None) -> Account:
    """Where a recorded generation goes, by what its operators do.

    ``matrix products``, ``attention``, ``cache and copies`` (growing and reordering it, and what goes to the host),
    ``choosing tokens``, and the rest of the operators: host time where no device was recorded, otherwise the device's,
    of the kernels and copies that they launched. ``host between operators`` is time in which none ran: on a GPU, its
    launch gaps. Kernels that no operator launched, as those of CUDA graphs, count by their own names; where these do
    not tell, and what an unrecorded device did while the host waited, is ``not visible``. Batched products and softmax
    count as attention, which models that use no fused operator write out in them. ValueError when no operator was
    recorded.

    Parameters
    ----------
    capture
        Of ``model.generate(...)``: ``ek.capture(lambda: model.generate(...))``, or a file from elsewhere.
    step
        The annotation that marks a step, as in :meth:`Capture.overview`.

    Returns
    -------
    Account
        In ns; the total is the wall time of the recorded steps. ``setting``: ``num_steps`` recorded,
        ``device_busy_frac`` (None where no device was recorded) and ``notes``.
    """
    table, overview = capture.families(), capture.overview(step)
    if table.empty:
        raise ValueError("this capture holds no operators: record the CPU activity too")
    on_device = overview["kernel_ns"].notna().any()
    own = table[["kernel_ns", "copy_ns"] if on_device else ["host_self_ns"]].sum(axis=1).astype("int64")
    by_row = own.groupby(lambda family: _ROW_OF.get(family, ELEMENTWISE)).sum()
    busy = int(overview[["kernel_ns", "memcpy_ns"] if on_device else ["cpu_exec_ns"]].sum().sum())
    whole = max(1, int(by_row.sum()))
    # operators may overlap, on several threads or streams: their shares of the time that any of them ran
    rows = {row: round(busy * int(by_row.get(row, 0)) / whole) for row in _ROWS}
    rest = overview.drop(columns=["start_ns"])
    if rest["not_visible_ns"].notna().any():
        rows[UNSEEN] += int(rest["not_visible_ns"].sum())
    others = ["idle_ns", "dataloader_ns", "exposed_communication_ns", *(["cpu_exec_ns"] if on_device else [])]
    rows[HOST] = int(rest[others].fillna(0).sum().sum())
    total = int(rest["dur_ns"].sum())
    frac = float(rest["device_busy_frac"].astype("Float64").mean()) if on_device else None
    return Account.of(
        RECORDED, "ns", {row: value for row, value in rows.items() if value}, total=total,
        source="the wall time of the recorded steps", basis="measured",
        setting={"num_steps": len(overview), "device_busy_frac": frac, "notes": overview.attrs.get("notes", [])},
    )  # fmt: skip


def positions(measured: Account) -> pd.DataFrame:
    """Time of every token of a measured generation, by its position: the first holds the prefill.

    ValueError for an account whose steps were not timed: a prediction, or a compiled model's.

    Returns
    -------
    DataFrame
        Indexed by ``token``, from 1; ``time_ns``, from the end of the step before to the end of its own, the median
        over repetitions, as they were timed (of a measurement with a base: not relative to it).
    """
    calibration = None if measured.predicted else measured.calibration
    if isinstance(calibration, Steps):
        times = calibration.step_ns
    elif isinstance(calibration, Observed) and (watched := calibration.observed.watched):
        times = np.median([w.steps.sum(axis=1).to_numpy() for w in watched], axis=0)
        times[0] += np.median([w.encoder_ns for w in watched])
    else:
        raise ValueError("this account's steps were not timed; decoder.measure() times them, unless they are compiled")
    index = pd.RangeIndex(1, len(times) + 1, name="token")
    return pd.DataFrame({"time_ns": np.round(times).astype("int64")}, index=index)
