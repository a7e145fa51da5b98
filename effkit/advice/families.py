"""Where the time of a step goes, by what its operators do; and the FLOPs that it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from effkit import operators
from effkit.captured import Capture
from effkit.panes.families import of_device, of_host
from effkit.panes.tables import each_operator
from effkit.trace import nesting
from effkit.trace.names import DEVICE, RECOMPUTED, STEP

PRODUCTS, ATTENTION, OPTIMIZER, ASKING = (
    operators.PRODUCTS, operators.ATTENTION, operators.OPTIMIZER, operators.ASKING,
)  # fmt: skip
RECOMPUTATION, CLEARING = "recomputation", "clearing gradients"
NORMS, OTHER = "norms and softmax", "elementwise and other"
COMMUNICATION, HOST, DATA, PADDING = "exposed communication", "host between operators", "waiting for data", "padding"
ROWS = (DATA, PADDING, PRODUCTS, ATTENTION, NORMS, OTHER, RECOMPUTATION, OPTIMIZER, CLEARING, ASKING, COMMUNICATION,
        HOST)  # fmt: skip
# In this order: an annotation around an operator decides before the operator's own name
_AROUND = ((RECOMPUTED, RECOMPUTATION), ("Optimizer.step#", OPTIMIZER), ("Optimizer.zero_grad#", CLEARING))
_ROW_OF: Mapping[str, str] = {
    **dict.fromkeys(operators.MULTIPLIES, PRODUCTS),
    **dict.fromkeys((operators.NORMS, operators.SOFTMAX), NORMS),
    **{family: family for family in (ATTENTION, ASKING, OPTIMIZER)},
    operators.COMMUNICATION: COMMUNICATION,
    operators.AUTOGRAD: HOST,
}


def row(family: str) -> str:
    """The row in which a family of operators (:mod:`effkit.operators`) counts."""
    return _ROW_OF.get(family, OTHER)


def rows_ns(capture: Capture, plain_ns: float) -> dict[str, float]:
    """The rows of all steps of a live capture [ns], without what recording cost.

    Recording costs the same for every event: the time that recorded steps took more than plain ones (``plain_ns``, the
    same steps when they were not recorded), over the number of events. This cost is subtracted from the time of the
    event around it. On a GPU operators count by their kernels, and the host's row is the time in which no kernel runs.
    """
    events = capture.events
    each, launched = each_operator(events[~events["name"].str.startswith(STEP)])
    parent, families = each["parent"].to_numpy(), of_host(each)
    if events["category"].isin(DEVICE).any():
        around = np.array([*_around(each, parent), None], dtype=object)[launched["owner"].to_numpy()]
        own, spent = of_device(launched, families), launched["dur_ns"].to_numpy(dtype="float64")
        host = plain_ns - spent.sum()
    else:
        around, own = _around(each, parent), families
        recorded_ns = float(capture.steps["dur_ns"].sum())  # of which some is what recording cost
        inside = parent >= 0
        dur = each["dur_ns"].to_numpy(dtype="float64")
        cost = max(0.0, recorded_ns - plain_ns) / max(1, len(each))
        children = np.bincount(parent[inside], minlength=len(each))
        nested = np.bincount(parent[inside], dur[inside], minlength=len(each))
        spent = np.maximum(0.0, dur - nested - cost * children)
        host = recorded_ns - dur[~inside].sum() - cost * (~inside).sum()
    rows = pd.Series(spent).groupby([marked or row(family) for marked, family in zip(around, own, strict=True)]).sum()
    rows[HOST] = rows.get(HOST, 0.0) + max(0.0, host)
    scale = plain_ns / rows.sum()  # events shorter than their cost count as 0, so that the rows sum to more
    return {row: scale * float(rows[row]) for row in ROWS if rows.get(row, 0.0) > 0}


def _around(each: pd.DataFrame, parent: Any) -> Any:
    """The row that an annotation around an event of the host says; None where there is none."""
    rows = np.full(len(each), None, dtype=object)
    for mark, row in reversed(_AROUND):
        marked = each["name"].str.startswith(mark).to_numpy()
        if marked.any():
            rows[nesting.nearest(parent, marked) >= 0] = row
    return rows


def share_of_products(rows: dict[str, float]) -> float:
    """Of the time of a step, what matrix products and attention take."""
    return (rows.get(PRODUCTS, 0.0) + rows.get(ATTENTION, 0.0)) / max(1.0, sum(rows.values()))
