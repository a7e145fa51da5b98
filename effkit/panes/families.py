"""What operators and kernels do: where the time goes, by family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from effkit import operators
from effkit.operators import ATTENTION, COMMUNICATION, OTHER, PRODUCTS, UNTOLD, family_of_kernel, family_of_operator
from effkit.panes.tables import each_operator
from effkit.trace import nesting
from effkit.trace.names import COPIES, by_name

NOT_VISIBLE = "not visible"
# Kernels of many uses: the operator that launched one says more. Of products so does an operator that is made of them.
_GENERAL = (operators.COPIES, operators.ELEMENTWISE, operators.REDUCTION, operators.SEARCHING)
_MADE_OF_PRODUCTS = (ATTENTION, operators.BATCHED, operators.CONVOLUTION, operators.RECURRENT)


def of_host(each: pd.DataFrame) -> Any:
    """The family of each event of a host: what its name says, or attention where an operator of attention is around.

    Attention that is not one kernel is batched products, a softmax and another product inside of such an operator.
    """
    own = by_name(each["name"], family_of_operator)
    attends = (own == ATTENTION) & (each["category"] == "cpu_op").to_numpy()
    around = nesting.nearest(each["parent"].to_numpy(), attends) >= 0
    return np.where(around, ATTENTION, own)


def of_device(launched: pd.DataFrame, families: Any) -> Any:
    """The family of each event of a device: what the kernel's own name says, or the operator's where that says more.

    ``families`` are those of the host's rows. An operator of products may hold many other kernels (a whole layer of
    experts, say), so that only kernels without a telling name count as products by it. A kernel that neither tells is
    ``not visible`` if no operator launched it, else ``other``.
    """
    owner = launched["owner"].to_numpy()
    of_operator = np.append(families, NOT_VISIBLE)[owner]
    own = by_name(launched["name"], family_of_kernel)
    tells = ~np.isin(of_operator, (*UNTOLD, COMMUNICATION, NOT_VISIBLE))
    attends = (of_operator == ATTENTION) & (own == operators.SOFTMAX)
    part = attends | np.isin(of_operator, _MADE_OF_PRODUCTS) & (own == PRODUCTS)
    general = np.isin(own, _GENERAL) & (of_operator != PRODUCTS) | (own == OTHER)
    unknown = np.isin(own, UNTOLD) & (owner < 0)
    return np.where(tells & (part | general), of_operator, np.where(unknown, NOT_VISIBLE, own))


def families_of(events: pd.DataFrame, shared: tuple[pd.DataFrame, pd.DataFrame] | None = None) -> pd.DataFrame:
    """One row per family of one rank; ``shared`` as in :func:`effkit.panes.tables.operators_of`."""
    each, launched = shared or each_operator(events)
    counted = (each["category"] == "cpu_op") & ~each["folded"]
    of_each = of_host(each)
    copies = launched["category"].isin(COPIES)
    times = {"host_self_ns": each["host_self_ns"][counted].groupby(of_each[counted]).sum()}
    if len(launched):
        ran, on_device = launched["dur_ns"], of_device(launched, of_each)
        times["kernel_ns"] = ran[~copies].groupby(on_device[~copies]).sum()
        times["copy_ns"] = ran[copies].groupby(on_device[copies]).sum()
    return pd.DataFrame(times).fillna(0)


def families(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of all ranks as one, the most expensive first."""
    table = pd.concat(parts).reindex(columns=["host_self_ns", "kernel_ns", "copy_ns"])
    table = table.groupby(level=0).sum(min_count=1).astype("Int64").rename_axis("family")
    return table.sort_values(["kernel_ns", "host_self_ns"], ascending=False, kind="stable")
