"""account(): the padded cells of whatever was recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from effkit.account import Account
from effkit.captured import Capture
from effkit.padding.loader_audit import Watch
from effkit.padding.plans import Plan


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
