"""account(): where the time of a recorded generation goes, by what its operators do; positions(): token by token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pandas as pd

from effkit import operators
from effkit.account import Account
from effkit.captured import Capture
from effkit.decoder.accounting import PHASES
from effkit.decoder.calibration import Observed
from effkit.operators import ATTENTION, PRODUCTS
from effkit.panes.families import NOT_VISIBLE
from effkit.panes.steps import phases
from effkit.trace import nesting
from effkit.trace.names import DEVICE, LAUNCHES, WAITS
from effkit.units import readable

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
    count as attention, which models that use no fused operator write out in them. Where a serving engine (SGLang, vLLM)
    marks its batches, these are the steps, without their waits for work that was launched before them; the companion
    ``Prefill and decode`` is the device's time by what its batches do. ValueError when no operator was recorded.

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
    rows[UNSEEN] += int(overview["not_visible_ns"].sum())
    others = ["idle_ns", "dataloader_ns", "exposed_communication_ns", *(["cpu_exec_ns"] if on_device else [])]
    rows[HOST] = int(overview[others].fillna(0).sum().sum())
    total = int(overview["dur_ns"].sum())
    frac = float(overview["device_busy_frac"].astype("Float64").mean()) if on_device else None
    notes, served = list(overview.attrs.get("notes", [])), _served(capture)
    if served and (waited := _waited(overview, capture.events)):
        rows[UNSEEN] -= waited
        frac, total = frac and frac * total / (total - waited), total - waited
        notes.append(f"{readable(waited, 'ns')} are no part of the steps: in them the host waited for what had been "
                     "launched before")  # fmt: skip
    return Account.of(
        RECORDED, "ns", {row: value for row, value in rows.items() if value}, total=total,
        source="the wall time of the recorded steps", basis="measured",
        setting={"num_steps": len(overview), "device_busy_frac": frac, "notes": notes},
        companions=(served,) if served else (),
    )  # fmt: skip


def _served(capture: Capture) -> Account | None:
    """The device's time by what the batch that launched it does; None where no serving engine marked its batches."""
    times, total = Counter[str](), 0
    for _, events in capture.events.groupby("rank"):
        tree, on_device = nesting.host(events), events[events["category"].isin(DEVICE)]
        phase = phases(tree["name"].where(tree["category"] == "user_annotation"))
        marked = nesting.nearest(nesting.parents(tree), phase.notna().to_numpy())
        of_work = np.append(phase.to_numpy(dtype=object), np.nan)[nesting.owners(tree, marked, on_device)]
        times.update(on_device["dur_ns"].groupby(of_work).sum().to_dict())
        total += int(on_device["dur_ns"].sum())
    rows = {phase: int(time_ns) for phase, time_ns in times.items()}
    return Account.of(PHASES, "ns", rows, total=total, source="all kernels and copies") if rows else None


def _waited(overview: pd.DataFrame, events: pd.DataFrame) -> int:
    """How long the steps wait for work that was launched before them and is not in the recording [ns]: while the host
    waits nothing runs, and what the step has launched into a stream before is the first of it there."""
    waited = 0
    for (rank, _), start, dur in overview[["start_ns", "dur_ns"]].itertuples():
        of_rank = events[events["rank"] == rank].assign(start_ns=events["start_ns"] - start)
        work, launch = of_rank[of_rank["category"].isin(DEVICE)], of_rank["category"].str.endswith(LAUNCHES)
        calls = of_rank[launch & of_rank["start_ns"].between(0, dur)]
        linked = calls.dropna(subset="correlation").drop_duplicates("correlation").set_index("correlation")["start_ns"]
        called, begun = work["correlation"].map(linked).astype("float64"), work["start_ns"]
        unseen = calls[calls["name"].str.contains("Launch") & ~calls["correlation"].isin(work["correlation"])]
        for begin, length in calls.loc[calls["name"].str.contains(WAITS), ["start_ns", "dur_ns"]].to_numpy():
            end = min(begin + length, begun[begun >= begin].min())
            own = called <= begin
            first = ~work["stream"].isin(work["stream"][own & (begun < begin)])
            if (own & first & (begun >= end)).any() and not (unseen["start_ns"] < begin).any():
                waited += int(end - begin)
    return waited


def positions(measured: Account) -> pd.DataFrame:
    """Time of every token of a measured generation, by its position: the first holds the prefill.

    ValueError for an account whose steps were not timed: a prediction, or a compiled model's.

    Returns
    -------
    DataFrame
        Indexed by ``token``, from 1; ``time_ns``, from the end of the step before to the end of its own, the median
        over repetitions, at the speed of the machine then (of a measurement with a base: not relative to it).
    """
    calibration = None if measured.predicted else measured.calibration
    if isinstance(calibration, np.ndarray):  # of a step function
        times = calibration
    elif isinstance(calibration, Observed) and (watched := calibration.observed.watched):
        times = np.median([w.steps.sum(axis=1).to_numpy() for w in watched], axis=0)
        times[0] += np.median([w.encoder_ns for w in watched])
    else:
        raise ValueError("this account's steps were not timed; decoder.measure() times them, unless they are compiled")
    index = pd.RangeIndex(1, len(times) + 1, name="token")
    return pd.DataFrame({"time_ns": np.round(times).astype("int64")}, index=index)
