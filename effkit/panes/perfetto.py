"""A capture becomes a Chrome trace again, for Perfetto: every event, and what the panes know as tracks beside them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from effkit.panes.collectives import collectives_of
from effkit.trace.names import DEVICE, LAUNCHES
from effkit.trace.tidying import DETAILS, EVENT_COLUMNS
from effkit.whole_files import checked_place, replacing


def write(path: Path, events: pd.DataFrame, held: Sequence[pd.DataFrame], marks: Sequence[str]) -> None:
    """One rank's trace, gzipped where its name ends in ``.gz``. ``held`` are the allocations of each memory, ``marks``
    sentences that stand at the end."""
    checked_place(path, "trace.json.gz")
    base_ns = int(events["start_ns"].min()) if len(events) else 0
    rank = int(events["rank"].iloc[0]) if len(events) else 0
    ends_us = (int((events["start_ns"] + events["dur_ns"]).max()) - base_ns) / 1000 if len(events) else 0
    lines = [*spans(events, base_ns), *_arrows(events, base_ns), *_counters(events, held, base_ns)]
    lines += [{"ph": "i", "s": "g", "name": mark, "ts": ends_us, "pid": "effkit", "tid": "receipts"} for mark in marks]
    content = {"schemaVersion": 1, "baseTimeNanoseconds": base_ns, "distributedInfo": {"rank": rank}}
    text = msgspec.json.encode({**content, "traceEvents": lines})
    with replacing(path) as part:
        part.write_bytes(gzip.compress(text, 6, mtime=0) if path.suffix == ".gz" else text)


def spans(events: pd.DataFrame, base_ns: int) -> Iterator[dict[str, Any]]:
    """Each event as a profiler writes it, with its times [us] since ``base_ns``."""
    details = [name for name in DETAILS if name in events]
    for event in events.to_dict("records"):
        args = {name: int(event[name]) for name in ("stream", "correlation") if pd.notna(event[name])}
        for name in details:
            if pd.notna(value := event[name]):
                key, kind, *_ = DETAILS[name]
                args[key] = json.loads(value) if kind is msgspec.Raw else kind(value)
        yield {
            "ph": "X", "cat": event["category"], "name": event["name"], "pid": _number(event["process"]),
            "tid": _number(event["thread"]), "ts": (event["start_ns"] - base_ns) / 1000, "dur": event["dur_ns"] / 1000,
            "args": args,
        }  # fmt: skip


def _arrows(events: pd.DataFrame, base_ns: int) -> Iterator[dict[str, Any]]:
    linked = events.dropna(subset="correlation")
    launches = linked[linked["category"].str.endswith(LAUNCHES)].drop_duplicates("correlation")
    started = linked[linked["category"].isin(DEVICE) & linked["correlation"].isin(launches["correlation"])]
    for phase, frame in (("s", launches), ("f", started)):
        for span in spans(frame[[*EVENT_COLUMNS]], base_ns):
            place = {key: span[key] for key in ("pid", "tid", "ts")}
            yield {"ph": phase, "cat": "ac2g", "name": "ac2g", "id": span["args"]["correlation"], "bp": "e", **place}


def _counters(events: pd.DataFrame, held: Sequence[pd.DataFrame], base_ns: int) -> Iterator[dict[str, Any]]:
    """How many calls communicate while nothing computes, and the bytes alive of each category."""
    spans = collectives_of(events)[["start_ns", "exposed_spans_ns"]].dropna().itertuples(index=False)
    ends = [start_ns + np.array(pair) for start_ns, pairs in spans for pair in json.loads(pairs)]
    changes = [pd.DataFrame({"track": "communication", "series": "exposed", "time_ns": times, "size": size})
               for times, size in zip(np.reshape(ends, (-1, 2)).T, (1, -1), strict=True)]  # fmt: skip
    for rows in held:
        named = {"track": "memory of " + rows["device"].astype(str), "series": rows["category"]}
        changes.append(pd.DataFrame({**named, "time_ns": rows["alloc_ns"].fillna(base_ns), "size": rows["size_bytes"]}))
        changes.append(pd.DataFrame({**named, "time_ns": rows["free_ns"], "size": -rows["size_bytes"]}).dropna())
    frame = pd.concat(changes).astype({"time_ns": "int64", "size": "int64"})
    levels = frame.groupby(["track", "series", "time_ns"])["size"].sum().groupby(level=[0, 1]).cumsum().reset_index()
    for track, series, time_ns, level in levels.sort_values("time_ns", kind="stable").itertuples(index=False):
        yield {"ph": "C", "name": track, "pid": "effkit", "ts": (time_ns - base_ns) / 1000, "args": {series: level}}


def _number(process: str) -> int | str:
    return int(process) if process.isdecimal() else process
