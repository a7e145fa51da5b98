"""A run folder for people who still use the TensorBoard profiler plugin, in the words that its parser knows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

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
        content = '{"schemaVersion": 1, "traceEvents": [\n' + ",\n".join(lines) + "\n]}\n"
        with replacing(logdir / f"rank{rank}.pt.trace.json") as part:
            part.write_text(content, encoding="utf-8")
    return Folder(logdir, list(not_shown) if len(events) else ["anything: the capture holds no events"])


def _translated(events: pd.DataFrame) -> tuple[list[str], list[str]]:
    """The events of one rank as JSON, and what of them the plugin will not show."""
    events = events.sort_values("start_ns", kind="stable")
    tree = nesting.host(events)
    parent = nesting.parents(tree)
    calls = tree["name"].str.extract(COLLECTIVE)
    usual = calls["collective"].map(plain_collective, na_action="ignore").astype("str")
    counted = usual.isin(_KNOWN) & calls["backend"].isin(["nccl", "gloo"])
    tree.loc[counted, "name"] = calls["backend"][counted] + ":" + usual[counted]
    shown = (tree["category"] == "cpu_op") | counted | tree["name"].str.startswith((STEP, DATALOADER))
    owner = nesting.nearest(parent, shown.to_numpy()) + 1  # external ids count from 1, 0 is nobody's
    launch = tree["category"].str.endswith(LAUNCHES)
    on_device = events[events["category"].isin(DEVICE)]
    kernel_owner = np.maximum(nesting.owners(tree, owner, on_device), 0)

    start = int(events["start_ns"].min()) if len(events) else 0
    threads = {thread: number for number, thread in enumerate(tree["thread"].unique(), 1)}
    lines = []
    for frame, owners in ((tree[shown | launch], owner[shown | launch]), (on_device, kernel_owner)):
        for event, of in zip(frame.to_dict("records"), owners.tolist(), strict=True):
            runtime = event["category"].endswith(LAUNCHES)
            category = "Runtime" if runtime else _CATEGORIES.get(event["category"], "Operator")
            place = threads.get(event["thread"], event["thread"])
            args: dict[str, Any] = {"External id": of}
            if frame is on_device:
                args["device"] = number(event["process"])
            if pd.notna(event["correlation"]):
                args["correlation"] = int(event["correlation"])
            for name, key in (("shapes", "Input Dims"), ("dtypes", "Input type")):
                if category == "Operator" and isinstance(event.get(name), str):
                    args[key] = json.loads(event[name])
            if pd.notna(occupancy := event.get("occupancy_percent", pd.NA)):
                args["est. achieved occupancy %"] = float(occupancy)
            lines.append(json.dumps({
                "ph": "X", "cat": category, "name": event["name"], "pid": number(event["process"]), "tid": place,
                "ts": (event["start_ns"] - start) / 1000, "dur": event["dur_ns"] / 1000, "args": args,
            }))  # fmt: skip
    unknown = sorted(set(usual[calls["backend"].notna() & ~counted]))
    lost = [f"{name}: the plugin has no such collective; its kernels count as computation" for name in unknown]
    if named := int((tree["category"].eq("user_annotation") & ~shown & calls["backend"].isna()).sum()):
        lost.append(f"{named:,} ranges of record_function: trace() keeps them, for Perfetto")
    return lines, [*lost, "memory: look at memory_timeline() and memory()"]


def number(process: str) -> int | str:
    """A process or thread as profilers write it."""
    return int(process) if re.fullmatch(r"\d+", process) else process
