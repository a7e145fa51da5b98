"""Decoded events become columns: strings interned, times whole nanoseconds, absent values absent."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import IO, Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from effkit.gc_disabled import gc_disabled
from effkit.operators import COMMUNICATES
from effkit.trace.columns import Interned, Sparse, nanoseconds, since
from effkit.trace.decoding import Decoder
from effkit.trace.impossible import set_apart
from effkit.trace.names import ANNOTATIONS, DEVICE, SPANS, STACKS, TODAY

EVENT_COLUMNS = ("name", "category", "start_ns", "dur_ns", "rank", "process", "thread", "stream", "correlation")
MEMORY_COLUMNS = (
    "time_ns", "address", "size_bytes", "total_bytes", "reserved_bytes", "device", "rank", "process", "thread",
)  # fmt: skip

_OPERATORS = ("cpu_op", "user_annotation")


class _Detail(NamedTuple):
    """Where Kineto keeps a detail, its type there, and which events may have it."""

    key: str
    kind: Any  # JSON text stays text: shapes and the like are read when asked for
    categories: tuple[str, ...] = ()
    communicates: bool = False


DETAILS: Mapping[str, _Detail] = {
    "size_bytes": _Detail("bytes", int, DEVICE),
    "occupancy_percent": _Detail("est. achieved occupancy %", float, DEVICE),
    "shapes": _Detail("Input Dims", msgspec.Raw, _OPERATORS),
    "dtypes": _Detail("Input type", msgspec.Raw, _OPERATORS),
    "inputs": _Detail("Concrete Inputs", msgspec.Raw, communicates=True),  # the splits of gloo's all-to-all
    "collective": _Detail("Collective name", str, communicates=True),
    "dtype": _Detail("dtype", str, communicates=True),
    "num_elements": _Detail("In msg nelems", int, communicates=True),
    "group": _Detail("Process Group Ranks", msgspec.Raw, communicates=True),
    "group_name": _Detail("Process Group Name", str, communicates=True),
    "group_size": _Detail("Group size", int, communicates=True),
    "splits": _Detail("In split size", msgspec.Raw, communicates=True),
}
DETAIL_COLUMNS = tuple(DETAILS)
_ALWAYS: Mapping[str, tuple[str, Any]] = {
    "stream": ("stream", int | str | None),
    "correlation": ("correlation", int | None),
    "address": ("Addr", int | None),
    "bytes": ("Bytes", int | None),
    "total": ("Total Allocated", int | None),
    "reserved": ("Total Reserved", int | None),
    "device_type": ("Device Type", int | None),
    "device_id": ("Device Id", int | None),
}
_NO_TEXT = msgspec.Raw(b"")

_ABSENT = -(2**63)
_CPU_DEVICE = 0  # c10::DeviceType, as the profiler writes it into "Device Type"
# the torch of older days did not escape the backslashes of a name, of a Windows path say, and none lets a line break in
_AS_GIVEN = str.maketrans({"\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


class Trace(NamedTuple):
    """One decoded trace.

    ``events``: one row per complete event, sorted by ``start_ns``; the ``category`` of one whose times cannot be begins
    with ``impossible``. ``memory``: one row per allocator event, with signed ``size_bytes`` and the allocator's own
    running totals after it; empty where memory was not recorded. ``metadata``: what the trace says of itself.
    ``num_left_out``: events of Python functions that were not asked for. ``num_in_two``: events whose begin and end
    are two entries (phases B and E), which are not read.
    """

    events: pd.DataFrame
    memory: pd.DataFrame
    metadata: Mapping[str, Any]
    num_left_out: int
    num_in_two: int


def read(
    source: bytes | IO[bytes], *, rank: int | None = None, details: Sequence[str] = (), stacks: bool = False
) -> Trace:
    """Decode one trace (its text, or a stream of that), piece by piece; ValueError when it is no Chrome trace.

    ``rank`` fills the column ``rank``; by default what the trace says, else 0. Of ``DETAIL_COLUMNS`` those in
    ``details`` are kept that an event has. ``stacks`` keeps the events of Python functions.

    >>> event = '{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 1.5, "dur": 2, "pid": 1, "tid": 1}'
    >>> read(f'{{"traceEvents": [{event}]}}'.encode()).events[["name", "start_ns", "dur_ns"]]
           name  start_ns  dur_ns
    0  aten::mm      1500    2000
    """
    if unknown := set(details) - set(DETAILS):
        raise ValueError(f"no such column: {', '.join(sorted(unknown))}; there are {', '.join(DETAIL_COLUMNS)}")
    decoder = Decoder(_event_type(details), _event_type(details, Decimal))
    frames = _Columns(details, stacks)
    try:
        # millions of fresh objects make the collector run over and over, and none of them is garbage yet
        with gc_disabled():
            for piece in decoder.pieces(io.BytesIO(source) if isinstance(source, bytes) else source):
                frames.add(piece)
        metadata = decoder.metadata
        base_ns = metadata.get("baseTimeNanoseconds", 0)
        rank = _rank(metadata) if rank is None else rank
        events, memory = frames.events(base_ns, rank), frames.memory(base_ns, rank)
        return Trace(events, memory, metadata, frames.num_left_out, frames.num_in_two)
    except (msgspec.DecodeError, ValueError, OverflowError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error) or "it takes more memory than there is"
        raise ValueError(f"not a profiler trace: {reason}. Expected Chrome JSON with traceEvents") from error


def _rank(metadata: Mapping[str, Any]) -> int:
    rank = metadata.get("distributedInfo", {}).get("rank", 0)
    return rank if isinstance(rank, int) and 0 <= rank < 2**31 else 0


def _event_type(details: Sequence[str], time: type[float | Decimal] = float) -> type[Any]:
    """The struct of an event with as few fields as will do: what is not a field is skipped without being decoded."""
    fields: list[Any] = [(name, kind, msgspec.field(name=key, default=None)) for name, (key, kind) in _ALWAYS.items()]
    for name in details:
        detail = DETAILS[name]
        # a detail of another type (“N/A” for a number) is no detail, and no reason to refuse a trace
        kind, absent = (msgspec.Raw, _NO_TEXT) if detail.kind is msgspec.Raw else (Any, None)
        fields.append((name, kind, msgspec.field(name=detail.key, default=absent)))
    args = msgspec.defstruct("args", fields, gc=False)
    event: list[Any] = [
        *((name, str, "") for name in ("ph", "name", "cat")),
        ("ts", time, time(0)),
        ("dur", float, 0.0),
        *((name, int | str, 0) for name in ("pid", "tid")),
        ("args", args | None, None),
    ]
    return msgspec.defstruct("Event", event, gc=False)


class _Columns:
    """Pieces of a trace go in, frames come out."""

    def __init__(self, details: Sequence[str], stacks: bool) -> None:
        self._left_out = () if stacks else STACKS
        self.num_left_out = self.num_in_two = 0
        self._num_rows = 0
        self._strings = {name: Interned() for name in ("name", "category", "process", "thread")}
        self._numbers: dict[str, list[Any]] = {"start_ns": [], "dur_ns": [], "stream": [], "correlation": []}
        self._details = {name: Sparse(DETAILS[name].kind) for name in details}
        totals: dict[str, list[Any]] = {"total_bytes": [], "reserved_bytes": []}
        self._memory: dict[str, list[Any]] = {"time_ns": [], "address": [], "size_bytes": [], **totals}
        self._places = {name: Interned() for name in ("device", "process", "thread")}  # of memory

    def add(self, piece: list[Any]) -> None:
        complete = [event for event in piece if event.ph == "X" and event.cat not in SPANS]
        kept = [event for event in complete if event.cat not in self._left_out]
        self.num_left_out += len(complete) - len(kept)
        self.num_in_two += sum(event.ph == "B" for event in piece)
        self._add_events(kept)
        self._add_memory([event for event in piece if event.name == "[memory]" and event.args is not None])

    def _add_events(self, kept: list[Any]) -> None:
        names = self._strings["name"].add([event.name for event in kept])
        categories = self._strings["category"].add([event.cat for event in kept])
        self._strings["process"].add([event.pid for event in kept])
        self._strings["thread"].add([event.tid for event in kept])
        args = [event.args for event in kept]
        streams = [_ABSENT if a is None or not isinstance(a.stream, int) else a.stream for a in args]
        links = [_ABSENT if a is None or not a.correlation else a.correlation for a in args]  # 0 links nothing
        self._numbers["start_ns"].append(nanoseconds([event.ts for event in kept]))
        self._numbers["dur_ns"].append(nanoseconds([event.dur for event in kept]))
        self._numbers["stream"].append(np.array(streams, "int64"))
        self._numbers["correlation"].append(np.array(links, "int64"))
        self._add_details(args, names, categories)
        self._num_rows += len(kept)

    def _add_memory(self, moments: list[Any]) -> None:
        args = [event.args for event in moments]
        self._memory["time_ns"].append(nanoseconds([event.ts for event in moments]))
        self._memory["address"].append(np.array([a.address or 0 for a in args], "uint64"))
        self._memory["size_bytes"].append(np.array([a.bytes or 0 for a in args], "int64"))
        totals = {"total_bytes": [a.total for a in args], "reserved_bytes": [a.reserved for a in args]}
        for column, told in totals.items():  # older profilers do not say it
            self._memory[column].append(np.array([_ABSENT if one is None else one for one in told], "int64"))
        self._places["device"].add(["cpu" if a.device_type == _CPU_DEVICE else f"device{a.device_id}" for a in args])
        self._places["process"].add([event.pid for event in moments])
        self._places["thread"].add([event.tid for event in moments])

    def _add_details(self, args: list[Any], names: Any, categories: Any) -> None:
        communicates = self._strings["name"].holds(names, lambda name: bool(COMMUNICATES.search(name)))
        of_category: dict[tuple[str, ...], Any] = {
            wanted: self._strings["category"].holds(categories, lambda c, wanted=wanted: TODAY.get(c, c) in wanted)
            for wanted in (_OPERATORS, DEVICE)
        }
        has_args = np.array([a is not None for a in args], dtype=bool)
        for name, column in self._details.items():
            detail = DETAILS[name]
            having = communicates if detail.communicates else of_category[detail.categories]
            rows = np.flatnonzero(having & has_args)
            values = [getattr(args[row], name) for row in rows.tolist()]
            column.add(rows + self._num_rows, map(bytes, values) if detail.kind is msgspec.Raw else values)

    def events(self, base_ns: int, rank: int) -> pd.DataFrame:
        numbers = {name: np.concatenate(parts) for name, parts in self._numbers.items()}
        order = np.argsort(numbers["start_ns"], kind="stable")
        strings = self._strings
        columns = {
            "name": strings["name"].column(order, lambda name: name.translate(_AS_GIVEN)),
            "category": strings["category"].column(order, lambda category: TODAY.get(category, category)),
            "start_ns": since(base_ns, numbers["start_ns"], numbers["dur_ns"])[order],
            "dur_ns": numbers["dur_ns"][order],
            "rank": np.full(len(order), rank, "int64"),
            "process": strings["process"].column(order),
            "thread": strings["thread"].column(order),
            "stream": _masked(numbers["stream"][order]),
            "correlation": _masked(numbers["correlation"][order]),
        }
        details = {name: detail.column(order) for name, detail in self._details.items() if len(detail)}
        frame = pd.DataFrame(columns | details)
        if "Operator" in self._strings["category"].values:
            frame.loc[frame["name"].str.startswith(ANNOTATIONS), "category"] = "user_annotation"
        return set_apart(frame)

    def memory(self, base_ns: int, rank: int) -> pd.DataFrame:
        numbers = {name: np.concatenate(parts) for name, parts in self._memory.items()}
        order = np.argsort(numbers["time_ns"], kind="stable")
        columns = {
            "time_ns": since(base_ns, numbers["time_ns"])[order],
            "address": numbers["address"][order],
            "size_bytes": numbers["size_bytes"][order],
            "total_bytes": _masked(numbers["total_bytes"][order]),
            "reserved_bytes": _masked(numbers["reserved_bytes"][order]),
            "device": self._places["device"].column(order),
            "rank": np.full(len(order), rank, "int64"),
            "process": self._places["process"].column(order),
            "thread": self._places["thread"].column(order),
        }
        return pd.DataFrame(columns)


def _masked(numbers: Any) -> Any:
    return pd.arrays.IntegerArray(numbers, numbers == _ABSENT)
