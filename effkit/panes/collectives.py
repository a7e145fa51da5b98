"""Communication: what moved between the ranks, who waited for whom, and how fast the bytes went."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from effkit.panes.breakdown import communication, computing
from effkit.trace import intervals, nesting
from effkit.trace.names import COLLECTIVE, DEVICE_BACKENDS, ITEM_BYTES, STEP, collective_of_kernel, plain_collective

_TIGHT_NS = 10_000  # a spread that needs no better
Notes = Callable[[int], str]
_MOST_RANKS = 2**20
_MOST_ANNOTATIONS, _ANNOTATION_CHARS = 32, 200  # of those around a call: a trace may be nested without end
_MOST_STRETCHES = 2**23
COLUMNS = (
    "rank", "collective", "backend", "group", "num_ranks", "dtype", "size_bytes", "on", "start_ns", "dur_ns",
    "exposed_ns", "splits", "annotations", "exposed_spans_ns",
)  # fmt: skip
_ROW = ["collective", "backend", "group", "num_ranks", "dtype", "size_bytes", "splits", "annotations", "on",
        "start_ns", "end_ns"]  # fmt: skip
_DETAILS = ("shapes", "dtypes", "inputs", "collective", "dtype", "num_elements", "group", "group_name", "group_size",
            "splits")  # fmt: skip


def collectives_of(events: pd.DataFrame) -> pd.DataFrame:
    """Every collective call of one rank, in order, columns ``COLUMNS``.

    ``size_bytes`` is what the rank put in. ``on`` says whether the times are those of kernels on the ``device`` or of a
    library on the ``host``; where a device call's kernels were not recorded, its times are absent. ``annotations`` are
    those around the call, innermost first, and ``exposed_spans_ns`` the stretches, from its start, that no computation
    hides: a JSON list of pairs. ValueError where calls last over so many kernels that no job of collectives does.
    """
    events = events.assign(**{name: pd.NA for name in _DETAILS if name not in events})
    tree = nesting.host(events)
    parent = nesting.parents(tree)
    kernels, _ = communication(events)
    calls = tree["name"][tree["category"] == "user_annotation"].str.extract(COLLECTIVE).dropna(subset="backend")
    owner = nesting.owners(tree, nesting.nearest(parent, tree.index.isin(calls.index)), kernels)
    notes = _annotations(tree, parent)
    rows = _recorded(tree, parent, calls, _spans(kernels, owner), notes)
    rows += _foreign(tree, kernels[owner < 0], notes)
    whole = dict.fromkeys(("start_ns", "end_ns", "num_ranks", "size_bytes"), "Int64")
    frame = pd.DataFrame(rows, columns=_ROW).astype(whole)
    frame["rank"] = int(events["rank"].iloc[0]) if len(events) else 0
    frame["dur_ns"] = frame["end_ns"] - frame["start_ns"]
    spans = _exposed_spans(events, kernels, frame)
    exposed = [pd.NA if of_call is None else sum(end - begin for begin, end in of_call) for of_call in spans]
    frame["exposed_ns"] = pd.array(exposed, "Int64")
    frame["exposed_spans_ns"] = [None if of_call is None else json.dumps(of_call) for of_call in spans]
    return frame.sort_values("start_ns", kind="stable", ignore_index=True)[list(COLUMNS)]


def _spans(kernels: pd.DataFrame, owner: Any) -> dict[int, tuple[int, int]]:
    """Call -> when the first of its kernels begins and the last ends [ns]."""
    ran = kernels.assign(end_ns=kernels["start_ns"] + kernels["dur_ns"])[owner >= 0].groupby(owner[owner >= 0])
    return {row: (start, end) for row, start, end in ran.agg({"start_ns": "min", "end_ns": "max"}).itertuples()}


def _recorded(
    tree: pd.DataFrame, parent: Any, calls: pd.DataFrame, ran: Mapping[int, tuple[int, int]], notes: Notes
) -> list[tuple[Any, ...]]:
    """The calls that c10d annotated, in the columns of ``_ROW``; ``ran`` tells when those on a device did."""
    # c10d writes what a call moves into the operator around it, older ones into the annotation itself
    around = nesting.nearest(parent, (tree["name"] == "record_param_comms").to_numpy())
    outer = nesting.nearest(parent, tree["name"].str.startswith("c10d::").to_numpy())
    _pair_by_order(tree, calls["collective"], outer)
    rows, inputs = [], [*tree["inputs"], None]
    at = calls.index.to_numpy()
    payload = np.where(around[at] < 0, at, around[at])
    of_calls, payloads = (tree.take(place).to_dict("records") for place in (at, payload))
    for (row, backend, collective), call, payload in zip(
        calls[["backend", "collective"]].itertuples(), of_calls, payloads, strict=True
    ):
        host = backend not in DEVICE_BACKENDS
        span = (call["start_ns"], call["start_ns"] + call["dur_ns"]) if host else ran.get(row, (None, None))
        rows.append((plain_collective(collective), backend, *_moved(call, payload, inputs[outer[row]]),
                     notes(row) or notes(outer[row]), "host" if host else "device", *span))  # fmt: skip
    return rows


def _foreign(tree: pd.DataFrame, kernels: pd.DataFrame, notes: Notes) -> list[tuple[Any, ...]]:
    """The kernels that a library launched which c10d knows nothing of, in the columns of ``_ROW``."""
    launches = nesting.owners(tree, np.arange(len(tree)), kernels)
    rows = []
    for launch, kernel in zip(launches, kernels.to_dict("records"), strict=True):
        named = kernel["collective"] if _is(kernel["collective"]) else collective_of_kernel(kernel["name"])
        start, end = kernel["start_ns"], kernel["start_ns"] + kernel["dur_ns"]
        rows.append((plain_collective(named), "", *_moved(kernel, kernel, None), notes(launch), "device", start, end))
    return rows


def _pair_by_order(tree: pd.DataFrame, calls: pd.Series[str], outer: Any) -> None:
    """Complete ``outer``: libraries that work on threads of their own run in the order in which c10d was called."""
    called = tree["name"][tree["name"].str.startswith("c10d::")].str.removeprefix("c10d::").map(plain_collective)
    apart = calls[outer[calls.index] < 0].map(plain_collective)
    for kind, rows in apart.groupby(apart):
        operators = called.index[called == kind]
        if len(operators) == len(rows):
            outer[rows.index] = operators


def _is(value: Any) -> bool:
    return bool(pd.notna(value)) and value != ""


def _listed(text: Any) -> list[Any]:
    try:
        value = json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return []
    return value if isinstance(value, list) else []


def _moved(call: Mapping[Any, Any], payload: Mapping[Any, Any], inputs: Any) -> tuple[Any, Any, Any, Any, Any]:
    """group, num_ranks, dtype, size_bytes and splits of one call, each None where it was not recorded. ``payload`` is
    the event into which c10d wrote what the call moves."""
    rows = (payload, call)
    group = next((str(row[name]) for name in ("group", "group_name") for row in rows if _is(row[name])), "")
    sizes = (row["group_size"] for row in rows)
    num_ranks = next((int(size) for size in sizes if _is(size) and 0 <= size < _MOST_RANKS), None)
    dtype, size_bytes = _size(call, payload)
    return group, num_ranks, dtype, size_bytes if 0 <= (size_bytes or 0) < 2**63 else None, _splits(payload, inputs)


def _size(call: Mapping[Any, Any], payload: Mapping[Any, Any]) -> tuple[str | None, int | None]:
    """dtype and bytes of what a rank puts in, from the element count, or from the tensors of an older recording."""
    if _is(payload["num_elements"]) and _is(payload["dtype"]):
        dtype = str(payload["dtype"])
        return dtype, int(payload["num_elements"]) * ITEM_BYTES[dtype] if dtype in ITEM_BYTES else None
    tensors = [
        (math.prod(shape), kind)
        for shape, kind in zip(_listed(call["shapes"]), _listed(call["dtypes"]), strict=False)
        if kind in ITEM_BYTES and isinstance(shape, list) and all(isinstance(side, int) for side in shape)
    ]
    return (tensors[0][1], sum(count * ITEM_BYTES[kind] for count, kind in tensors)) if tensors else (None, None)


def _splits(payload: Mapping[Any, Any], inputs: Any) -> str | None:
    arguments = _listed(inputs)  # of alltoall_base_(output, input, group, output splits, input splits, …)
    splits = _listed(payload["splits"]) or (_listed(arguments[4]) if len(arguments) > 4 else [])
    return json.dumps(splits) if splits and all(isinstance(split, int) for split in splits) else None


def _annotations(tree: pd.DataFrame, parent: Any) -> Notes:
    """Tells of a row (-1: none) the annotations around it, innermost first, without the step's mark and c10d's own."""
    names = tree["name"][tree["category"] == "user_annotation"]
    noted = names[~(names.str.startswith(STEP) | names.str.match(COLLECTIVE)).astype(bool)]
    inner = np.append(nesting.nearest(parent, tree.index.isin(noted.index)), -1)
    outer, short = inner[np.append(parent, -1)], noted.str.slice(stop=_ANNOTATION_CHARS).to_dict()

    def around(row: int) -> str:
        said: list[str] = []
        row = inner[row]
        while row >= 0 and len(said) < _MOST_ANNOTATIONS:
            said.append(short[row])
            row = outer[row]
        return " < ".join([*said, "…"] if row >= 0 else said)

    return around


def _exposed_spans(events: pd.DataFrame, kernels: pd.DataFrame, calls: pd.DataFrame) -> list[Any]:
    """The stretches of each call, from its start, in which nothing is computed [ns]; None where it has no time."""
    works = events[events["category"] == "kernel"].drop(kernels.index)
    starts, ends = intervals.of(computing(events) if works.empty and kernels.empty else works)
    begun, over = (calls[name].dropna().to_numpy("int64") for name in ("start_ns", "end_ns"))
    number = int((np.searchsorted(starts, over, "left") - np.searchsorted(ends, begun, "right")).sum())
    if number > _MOST_STRETCHES:
        raise ValueError(f"its {len(begun):,} collectives last over {number:,} kernels: record fewer steps")
    spans: list[Any] = []
    for begin, end in zip(calls["start_ns"], calls["end_ns"], strict=True):
        if pd.isna(begin):
            spans.append(None)
            continue
        inside = slice(np.searchsorted(ends, begin, "right"), np.searchsorted(starts, end, "left"))
        opens = np.maximum(np.append(begin, ends[inside]), begin) - begin
        closes = np.minimum(np.append(starts[inside], end), end) - begin
        spans.append(np.stack([opens, closes], axis=1)[opens < closes].tolist())
    return spans


# What nccl-tests calls bus bandwidth: bytes that cross the slowest link per byte that a rank puts in, for n ranks
# (github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md)
_BUS = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: n - 1,
    **dict.fromkeys(("reduce_scatter", "all_to_all"), lambda n: (n - 1) / n),
    **dict.fromkeys(("broadcast", "reduce", "send_recv"), lambda n: 1.0),
}
# collectives that nobody leaves before all have come; DeepEP's ranks wait for one another in the notifying kernels
_SYNCHRONISE = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "barrier", "notify_dispatch",
                "cached_notify_dispatch", "cached_notify_combine", "cached_notify")  # fmt: skip
# the same, but the more a rank receives the later it leaves: of no use to a clock
_WAITS = (*_SYNCHRONISE, "dispatch", "combine")
_SAME_SIZE = ("all_reduce", "broadcast", "reduce")


def matched(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """The calls of all ranks with ``call``: the number of the collective that they took part in.

    The n-th call of a kind in a group is the same on every rank. Where ranks disagree on how many there were, nothing
    is matched, rather than wrongly: ``call`` is absent.
    """
    frame = pd.concat(parts, ignore_index=True)
    size = frame["size_bytes"].where(frame["collective"].isin(_SAME_SIZE)).fillna(-1)
    dtype = frame["dtype"].fillna("").astype("str")
    kind = frame.groupby([frame["collective"], frame["backend"], frame["group"], dtype, size], sort=False).ngroup()
    position = frame.groupby([frame["rank"], kind]).cumcount()
    counts = frame.groupby([kind, "rank"]).size().groupby(level=0).agg(["min", "max", "size"])
    agree = (counts["min"] == counts["max"]) & (counts["size"] > 1)
    number = frame.groupby([kind, position], sort=False).ngroup().astype("Int64")
    return frame.assign(call=number.where(kind.map(agree)))


def clocks(calls: pd.DataFrame) -> pd.DataFrame:
    """How far each rank's clock is ahead of the first one's: ``offset_ns``, ``spread_ns``, ``num_matched`` by rank.

    A collective ends for all at nearly the same moment. The offset is the median difference of ends over the matched
    ones, the spread the median distance from it that remains; absent for a rank that shares no collective. All-to-alls,
    in which ranks may receive unequally and leave one after another, are left out where the others agree far better.
    """
    ranks = sorted(calls["rank"].unique())
    usable = calls[calls["call"].notna() & calls["dur_ns"].notna() & calls["collective"].isin(_SYNCHRONISE)]
    clock = pd.DataFrame(0, pd.Index(ranks, name="rank"), ["offset_ns", "spread_ns", "num_matched"], dtype="Int64")
    ends = usable.assign(end=usable["start_ns"] + usable["dur_ns"])
    ends = ends.pivot_table(index="call", columns="rank", values="end", aggfunc="first")
    uneven = ends.index.isin(usable.loc[usable["collective"] == "all_to_all", "call"])
    for rank in ranks[1:]:
        apart = ends[rank] - ends[ranks[0]] if {rank, ranks[0]} <= set(ends.columns) else pd.Series(dtype="Float64")
        every, even = (_middle(part.dropna()) for part in (apart, apart[~uneven[: len(apart)]]))
        clock.loc[rank] = even if even[2] > 1 and every[1] > 10 * even[1] + _TIGHT_NS else every
    return clock


def _middle(apart: pd.Series[float]) -> list[Any]:
    if apart.empty:
        return [pd.NA, pd.NA, 0]
    return [round(float(apart.median())), round(float((apart - apart.median()).abs().median())), len(apart)]


def waits(calls: pd.DataFrame) -> pd.DataFrame:
    """Every call on the first rank's clock, with what ``Capture.collectives`` says of waiting and moving."""
    clock = clocks(calls)
    start = calls["start_ns"] - calls["rank"].map(clock["offset_ns"]).fillna(0).astype("int64")
    matching = calls["call"].notna() & calls["collective"].isin(_WAITS)
    last = start.where(matching).groupby(calls["call"]).transform("max")
    # nobody leaves before the last has come: calls that do not overlap are not the same one
    first_end = (start + calls["dur_ns"]).where(matching).groupby(calls["call"]).transform("min")
    last = last.where(last <= first_end + int(clock["spread_ns"].fillna(0).max() if len(clock) else 0))
    waiting = (last - start).clip(lower=0).astype("Int64")
    waiting = waiting.where(waiting.isna() | (waiting <= calls["dur_ns"]), calls["dur_ns"])
    moving = calls["dur_ns"] - waiting
    kinds = zip(calls["collective"], calls["num_ranks"].fillna(0).tolist(), strict=True)
    per_byte = [_BUS[kind](num_ranks) if kind in _BUS and num_ranks else pd.NA for kind, num_ranks in kinds]
    factor = pd.Series(pd.array(per_byte, dtype="Float64"), calls.index)
    speed = calls["size_bytes"] * factor / moving.replace(0, pd.NA).astype("Float64") * 1e9
    return calls.assign(start_ns=start, waiting_ns=waiting, moving_ns=moving, bus_bandwidth_bytes_per_s=speed)


def summary(calls: pd.DataFrame) -> pd.DataFrame:
    """The calls by kind: how many, bytes, waiting and moving time summed over ranks, bus bandwidth, exposed time."""
    sums = ["size_bytes", "dur_ns", "waiting_ns", "moving_ns", "exposed_ns"]
    moved = calls["bus_bandwidth_bytes_per_s"] * calls["moving_ns"]
    timed = calls["moving_ns"].astype("Float64").where(moved.notna())  # of the calls whose bandwidth is known
    groups = calls.assign(moved=moved, timed=timed).groupby(["backend", "collective", "on"], sort=False)
    table = groups[sums].sum(min_count=1).astype("Int64")
    table.insert(0, "calls", groups.size())
    table.insert(1, "num_ranks", groups["num_ranks"].max())
    table["waiting_frac"] = table["waiting_ns"] / table["dur_ns"].replace(0, pd.NA)
    bus = groups[["moved", "timed"]].sum(min_count=1)
    table["bus_bandwidth_bytes_per_s"] = bus["moved"] / bus["timed"].replace(0, pd.NA)
    return table.sort_values("dur_ns", ascending=False, kind="stable")


def doubts(calls: pd.DataFrame) -> list[str]:
    """What makes the waiting of these calls doubtful, in words."""
    if calls["rank"].nunique() < 2:
        return []
    apart = int((calls["collective"].isin(_WAITS) & calls["dur_ns"].notna() & calls["waiting_ns"].isna()).sum())
    unmatched = f"{apart:,} of {len(calls):,} calls could not be matched between the ranks"
    return [f"{unmatched}: who waited in them is not visible"] if apart else []


def rank_pairs(calls: pd.DataFrame) -> pd.DataFrame:
    """Bytes from each sender to each receiver over all all-to-alls: ``sender, receiver, size_bytes, basis``.

    ``measured`` where the split sizes were recorded, ``assumed`` where equal shares stand for them.
    """
    rows = []
    for _, call in calls[(calls["collective"] == "all_to_all") & calls["size_bytes"].notna()].iterrows():
        splits = _listed(call["splits"])
        num = len(splits) or (int(call["num_ranks"]) if _is(call["num_ranks"]) else 0)
        members = _listed(call["group"])
        shares = [split / (sum(splits) or 1) for split in splits] or [1 / max(1, num)] * num
        named = len(members) == num and all(isinstance(member, int) for member in members)
        for receiver, share in zip(members if named else range(num), shares, strict=True):
            rows.append((call["rank"], receiver, call["size_bytes"] * share, "measured" if splits else "assumed"))
    columns = ["sender", "receiver", "size_bytes", "basis"]
    frame = pd.DataFrame(rows, columns=columns)
    frame = frame.groupby(["sender", "receiver", "basis"], as_index=False)["size_bytes"].sum()
    return frame.astype({"size_bytes": "int64"})[columns]
