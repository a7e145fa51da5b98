"""A run folder for people who still use the TensorBoard profiler plugin, in the words that its parser knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from effkit.panes.perfetto import spans
from effkit.trace import nesting
from effkit.trace.names import COLLECTIVE, DATALOADER, DEVICE, LAUNCHES, STEP, plain_collective
from effkit.whole_files import replacing

_KNOWN = ("broadcast", "reduce", "all_reduce", "all_gather", "reduce_scatter")  # collectives that the plugin counts
_CATEGORIES = {"cpu_op": "Operator", "kernel": "Kernel", "gpu_memcpy": "Memcpy", "gpu_memset": "Memset"}


class Folder(NamedTuple):
    """Where the run was written, and what the plugin will not show of it."""

    path: Path
    not_shown: list[str]


def write(logdir: Path, events: pd.DataFrame) -> Folder:
    """One file per rank, named as the plugin wants it, each written whole."""
    logdir.mkdir(parents=True, exist_ok=True)
    not_shown: dict[str, None] = {}
    for rank, of_rank in events.groupby("rank"):
        lines, lost = _translated(of_rank.reset_index(drop=True))
        not_shown |= dict.fromkeys(lost)
        with replacing(logdir / f"rank{rank}.pt.trace.json") as part:
            part.write_bytes(msgspec.json.encode({"schemaVersion": 1, "traceEvents": lines}))
    return Folder(logdir, list(not_shown) if len(events) else ["anything: the capture holds no events"])


def _translated(events: pd.DataFrame) -> tuple[list[dict[str, Any]], list[str]]:
    """The events of one rank as the plugin reads them, and what of them it will not show."""
    events = events.sort_values("start_ns", kind="stable")
    tree = nesting.host(events)
    parent = nesting.parents(tree)
    calls = tree["name"].str.extract(COLLECTIVE)
    usual = calls["collective"].map(plain_collective, na_action="ignore").astype("str")
    counted = usual.isin(_KNOWN) & calls["backend"].isin(["nccl", "gloo"])
    tree.loc[counted, "name"] = calls["backend"][counted] + ":" + usual[counted]
    shown = (tree["category"] == "cpu_op") | counted | tree["name"].str.startswith((STEP, DATALOADER))
    owner = nesting.nearest(parent, shown.to_numpy()) + 1  # external ids count from 1, 0 is nobody's
    on_device = events[events["category"].isin(DEVICE)]
    kernel_owner = np.maximum(nesting.owners(tree, owner, on_device), 0)

    start = int(events["start_ns"].min()) if len(events) else 0
    threads = {thread: str(number) for number, thread in enumerate(tree["thread"].unique(), 1)}
    host = (shown | tree["category"].str.endswith(LAUNCHES)).to_numpy()
    frame = pd.concat([tree[host].assign(owner=owner[host]), on_device.assign(owner=kernel_owner)])
    runs, category = frame["category"].isin(DEVICE), frame["category"].map(_CATEGORIES).fillna("Operator")
    category = category.mask(frame["category"].str.endswith(LAUNCHES), "Runtime")
    frame = frame.assign(category=category, thread=frame["thread"].map(threads).fillna(frame["thread"]))
    lines = list(spans(frame, start))
    for line, of, on_its_device in zip(lines, frame["owner"].tolist(), runs, strict=True):
        line["args"] |= {"External id": of} | ({"device": line["pid"]} if on_its_device else {})
    unknown = sorted(set(usual[calls["backend"].notna() & ~counted]))
    lost = [f"{name}: the plugin has no such collective; its kernels count as computation" for name in unknown]
    if named := int((tree["category"].eq("user_annotation") & ~shown & calls["backend"].isna()).sum()):
        lost.append(f"{named:,} ranges of record_function: trace() keeps them, for Perfetto")
    return lines, [*lost, "memory: look at memory_timeline() and memory()"]
