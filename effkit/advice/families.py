"""Where the time of a step goes, by what its operators do; and the FLOPs that it takes."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from effkit.advice.listening import RECOMPUTED
from effkit.captured import Capture
from effkit.panes.tables import each_operator
from effkit.trace import nesting
from effkit.trace.names import COMMUNICATES, DEVICE, STEP

RECOMPUTATION, OPTIMIZER, CLEARING = "recomputation", "optimizer", "clearing gradients"
PRODUCTS, ATTENTION, NORMS, OTHER = "matrix products", "attention", "norms and softmax", "elementwise and other"
COMMUNICATION, HOST, DATA, PADDING = "exposed communication", "host between operators", "waiting for data", "padding"
ASKING = "asking for numbers"
ROWS = (DATA, PADDING, PRODUCTS, ATTENTION, NORMS, OTHER, RECOMPUTATION, OPTIMIZER, CLEARING, ASKING, COMMUNICATION,
        HOST)  # fmt: skip
# In this order: an annotation around an operator decides before the operator's own name
_AROUND = ((RECOMPUTED, RECOMPUTATION), ("Optimizer.step#", OPTIMIZER), ("Optimizer.zero_grad#", CLEARING))
_NAMED = (
    (HOST, re.compile(r"^autograd::|Backward\d*$|^torch::autograd")),
    (COMMUNICATION, COMMUNICATES),
    (ASKING, re.compile(r"^aten::(item|_local_scalar_dense|is_nonzero)$")),
    (ATTENTION, re.compile(r"scaled_dot_product|flash_attn|_flash_attention|_efficient_attention|cudnn_attention")),
    (PRODUCTS, re.compile(r"(^|::|_)(mm|addmm|bmm|baddbmm|matmul|linear|dot|mv|addmv)(_|$)|conv(?!ert)|lstm|gru|rnn|"
                          r"einsum")),
    (NORMS, re.compile(r"norm(?!al)|softmax|logsumexp|nll_loss|cross_entropy")),
)  # fmt: skip


def family(name: str) -> str:
    """What an operator does, by its name."""
    return next((row for row, pattern in _NAMED if pattern.search(name)), OTHER)


def rows_ns(capture: Capture, plain_ns: float) -> dict[str, float]:
    """The rows of all steps of a live capture [ns], without what recording cost.

    Each event costs its caller the same: what the recorded steps took more than plain ones, over their events, is taken
    from whatever was around the event. On a GPU operators count by their kernels, and the host's row is the time in
    which no kernel runs.

    Parameters
    ----------
    capture
        What was recorded.
    plain_ns
        The time of the same steps when they were not recorded.
    """
    events = capture.events
    each, _ = each_operator(events[~events["name"].str.startswith(STEP)])
    parent = each["parent"].to_numpy()
    spent = each["device_self_ns"].to_numpy(dtype="float64")
    host = plain_ns - spent.sum()
    if not events["category"].isin(DEVICE).any():
        recorded_ns = float(capture.steps["dur_ns"].sum())
        inside = parent >= 0
        dur = each["dur_ns"].to_numpy(dtype="float64")
        cost = max(0.0, recorded_ns - plain_ns) / max(1, len(each))
        children = np.bincount(parent[inside], minlength=len(each))
        nested = np.bincount(parent[inside], dur[inside], minlength=len(each))
        spent = np.maximum(0.0, dur - nested - cost * children)
        host = recorded_ns - dur[~inside].sum() - cost * (~inside).sum()
    rows = pd.Series(spent).groupby(_row_of(each, parent)).sum()
    rows[HOST] = rows.get(HOST, 0.0) + max(0.0, host)
    scale = plain_ns / rows.sum()  # an event that cost more than it took counts as nothing: what that adds goes again
    return {row: scale * float(rows[row]) for row in ROWS if rows.get(row, 0.0) > 0}


def _row_of(each: pd.DataFrame, parent: Any) -> Any:
    """The row of every event: what an annotation around it says, or its name."""
    names = each["name"]
    own = names.map({name: family(name) for name in names.unique()}).to_numpy(dtype=object)
    for mark, row in reversed(_AROUND):
        marked = names.str.startswith(mark).to_numpy()
        if marked.any():
            own[nesting.nearest(parent, marked) >= 0] = row
    return own


def share_of_products(rows: dict[str, float]) -> float:
    """Of the time of a step, what matrix products and attention take."""
    return (rows.get(PRODUCTS, 0.0) + rows.get(ATTENTION, 0.0)) / max(1.0, sum(rows.values()))
