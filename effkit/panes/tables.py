"""Operators and kernels as tables: where the time goes, by name, and what changed between two captures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from effkit.operators import uses_tensor_cores
from effkit.trace import nesting
from effkit.trace.names import DEVICE

_DEVICE_TIMES, _GIVEN = ["device_total_ns", "device_self_ns"], ("shapes", "dtypes")
Tables = tuple[pd.DataFrame, pd.DataFrame, int]
_NOTICEABLE = 0.05  # a smaller change of time per step is no change


def each_operator(events: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What ran on the host of one rank, and on its device, one row per event.

    The host's have the columns of the events; ``parent`` (a row, -1 for none); ``folded`` (an only child that bears its
    parent's name, which torch counts as its parent); ``host_total_ns, host_self_ns``; and of the kernels that the row
    launched, with and without its children, ``device_total_ns, device_self_ns``. The device's have ``name``,
    ``category``, ``dur_ns`` and ``owner``: the host's row that launched it, -1 for none.
    """
    tree = nesting.host(events)
    parent = nesting.parents(tree)
    operator = (tree["category"] == "cpu_op").to_numpy()
    dur_ns = tree["dur_ns"].to_numpy()
    names = pd.factorize(tree["name"])[0]
    num_children = np.bincount(parent[parent >= 0], minlength=len(tree))
    folded = (parent >= 0) & (names == names[parent]) & (num_children[parent] == 1)
    standing = nesting.nearest(parent, ~folded)
    above = np.where(parent >= 0, standing[parent], -1)
    self_ns = dur_ns - _sums(np.where(folded, -1, above), dur_ns, len(tree))

    on_device = events[events["category"].isin(DEVICE)]
    caller = nesting.owners(tree, nesting.nearest(parent, operator), on_device)
    owner = np.append(standing, -1)[caller]
    launched = on_device[["name", "category", "dur_ns"]].assign(owner=owner)
    device_self_ns = _sums(owner, on_device["dur_ns"].to_numpy(), len(tree))
    device_total_ns = nesting.with_inner(above, device_self_ns)
    each = tree.assign(
        parent=parent, folded=folded, host_total_ns=dur_ns, host_self_ns=self_ns, device_total_ns=device_total_ns,
        device_self_ns=device_self_ns,
    )  # fmt: skip
    return each, launched


def operators_of(events: pd.DataFrame, shared: tuple[pd.DataFrame, pd.DataFrame] | None = None) -> pd.DataFrame:
    """One row per operator, input shapes and dtypes of one rank. Device time goes to the operator that launched it;
    ``launching`` are the calls that did. ``shared`` is what :func:`each_operator` gave, where that was asked."""
    each, launched = shared or each_operator(events)
    lost = int(launched["dur_ns"][launched["owner"] < 0].sum())
    counted = each[(each["category"] == "cpu_op") & ~each["folded"]]
    absent = pd.Series(pd.NA, counted.index, dtype="str")
    given = {name: counted.get(name, absent) for name in _GIVEN}
    table = counted.assign(operator=counted["name"], calls=1, launching=counted["device_self_ns"] > 0, **given)
    sums = ["calls", "launching", "host_total_ns", "host_self_ns", *_DEVICE_TIMES]
    table = table.groupby(["operator", *_GIVEN], dropna=False, sort=False)[sums].sum().reset_index()
    if lost:
        table.loc[len(table)] = ["not visible", pd.NA, pd.NA, 0, 0, 0, 0, lost, lost]
    if not events["category"].isin(DEVICE).any():
        table[_DEVICE_TIMES] = pd.NA
    return table.astype(dict.fromkeys(_DEVICE_TIMES, "Int64"))


def _sums(place: Any, values: Any, length: int) -> Any:
    launched = place >= 0
    return np.bincount(place[launched], values[launched], minlength=length).astype("int64")


def operators(parts: Sequence[pd.DataFrame], by_shape: bool = False) -> pd.DataFrame:
    """The tables of all ranks as one, the most expensive first."""
    keys = ["operator", "shapes"] if by_shape else ["operator"]
    table = pd.concat(parts).drop(columns=["launching", "dtypes", *([] if by_shape else ["shapes"])])
    # a sum over nothing is absent, not 0
    table = table.groupby(keys, dropna=False, sort=False).sum(min_count=1)
    return table.sort_values(["device_self_ns", "host_self_ns"], ascending=False, kind="stable")


def kernels_of(events: pd.DataFrame) -> pd.DataFrame:
    """One row per kernel of one rank; of those in CUDA graphs, per kernel and annotation, of all layers together."""
    kernels = events[events["category"] == "kernel"]
    dur_ns = kernels["dur_ns"]
    percent = kernels.get("occupancy_percent", pd.Series(pd.NA, kernels.index, dtype="Float64"))
    percent = percent.where(percent > 0)  # profilers write 0 where they have no estimate
    table = {
        "kernel": kernels["name"], "calls": 1, "total_ns": dur_ns, "min_ns": dur_ns, "max_ns": dur_ns,
        "known_ns": dur_ns.where(percent.notna(), 0),
        "occupied_ns": (percent / 100 * dur_ns).fillna(0.0).astype("float64"),
    }  # fmt: skip
    if "annotation" in kernels:
        table["annotation"] = kernels["annotation"].str.replace(r"(?<![^.])\d+(?![^.])", "*", regex=True)
    return _merged(pd.DataFrame(table), ["kernel", "annotation"] if "annotation" in table else ["kernel"])


def _merged(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    how = dict.fromkeys(table.columns.drop(by), "sum") | {"min_ns": "min", "max_ns": "max"}
    return table.groupby(by, sort=False, dropna=False).agg(how).reset_index()


def kernels(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The tables of all ranks as one, the most expensive first. Where CUDA graphs ran, ``annotation`` lists what the
    kernel's calls in them were marked with at capture, most time first, each layer's number as ``*``."""
    rows = pd.concat(parts)
    table = _merged(rows.drop(columns="annotation", errors="ignore"), ["kernel"])
    known = table["known_ns"].replace(0, pd.NA).astype("Float64")
    total = table["total_ns"].sum()
    table = table.assign(
        mean_ns=(table["total_ns"] / table["calls"]).round().astype("int64"),
        share_frac=table["total_ns"] / total if total else 0.0,
        occupancy_frac=table["occupied_ns"] / known,
        tensor_cores=pd.array([uses_tensor_cores(name) for name in table["kernel"]], "boolean"),
    )
    order = ["calls", "total_ns", "share_frac", "mean_ns", "min_ns", "max_ns", "occupancy_frac", "tensor_cores"]
    if "annotation" in rows:
        marks = rows.groupby(["annotation", "kernel"])["total_ns"].sum().sort_values(ascending=False, kind="stable")
        table["annotation"] = table["kernel"].map(marks.reset_index().groupby("kernel")["annotation"].agg(", ".join))
        order.append("annotation")
    return table.set_index("kernel")[order].sort_values("total_ns", ascending=False, kind="stable")


def diff(one: Tables, other: Tables) -> pd.DataFrame:
    """Self time of operators on the host, and time of kernels, per step, in both captures.

    Each of ``one`` and ``other`` is an operator table, a kernel table and a number of steps. Rows are indexed by
    ``kind`` and ``name``; ``calls`` and ``time_ns`` and their ``other_`` twins are per step; ``change`` is ``grew``,
    ``shrank``, ``appeared``, ``went`` or ``same`` (within 5%). The largest difference comes first.
    """
    frame = _per_step(*one).join(_per_step(*other).add_prefix("other_"), how="outer")
    before, after = frame["time_ns"], frame["other_time_ns"]
    frame["difference_ns"] = after.fillna(0) - before.fillna(0)
    frame["ratio"] = after / before.replace(0, pd.NA)
    ratio = frame["ratio"].astype("float64")
    which = [after.isna(), before.isna(), ratio > 1 + _NOTICEABLE, ratio < 1 - _NOTICEABLE]
    frame["change"] = np.select(which, ["went", "appeared", "grew", "shrank"], "same")
    return frame.sort_values("difference_ns", key=abs, ascending=False, kind="stable")


def _per_step(operators: pd.DataFrame, kernels: pd.DataFrame, num_steps: int) -> pd.DataFrame:
    named = operators.drop(index="not visible", errors="ignore")
    parts = {"operator": named[["calls", "host_self_ns"]], "kernel": kernels[["calls", "total_ns"]]}
    frames = [part.set_axis(["calls", "time_ns"], axis=1).rename_axis("name") for part in parts.values()]
    return (pd.concat(frames, keys=parts, names=["kind"]) / num_steps).astype("Float64")
