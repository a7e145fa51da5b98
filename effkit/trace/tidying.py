"""Decoded events become columns: strings interned, times whole nanoseconds, absent values absent."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import cache
from operator import attrgetter
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pandas as pd

from effkit.gc_disabled import gc_disabled
from effkit.trace.columns import Interned, Sparse, nanoseconds, since
from effkit.trace.decoding import Decoder, Stream
from effkit.trace.impossible import set_apart
from effkit.trace.names import ANNOTATIONS, DEVICE, SPANS, STACKS, TODAY, communicates

EVENT_COLUMNS = ("name", "category", "start_ns", "dur_ns", "rank", "process", "thread", "stream", "correlation")
MEMORY_COLUMNS = (
    "time_ns", "address", "size_bytes", "total_bytes", "reserved_bytes", "device", "rank", "process", "thread",
)  # fmt: skip


class _Detail(NamedTuple):
    """Where Kineto keeps a detail, its type there, and which events may have it."""

    key: str
    kind: Any  # JSON text stays text: shapes and the like are read when asked for
    of: str


_HAVING: Mapping[str, tuple[str, Callable[[str], bool]]] = {  # by the value of which column
    "operators": ("category", lambda category: TODAY.get(category, category) in ("cpu_op", "user_annotation")),
    "device": ("category", lambda category: TODAY.get(category, category) in DEVICE),
    "communication": ("name", communicates),
}
DETAILS: Mapping[str, _Detail] = {
    "size_bytes": _Detail("bytes", int, "device"),
    "occupancy_percent": _Detail("est. achieved occupancy %", float, "device"),
    "shapes": _Detail("Input Dims", msgspec.Raw, "operators"),
    "dtypes": _Detail("Input type", msgspec.Raw, "operators"),
    "inputs": _Detail("Concrete Inputs", msgspec.Raw, "communication"),  # the splits of gloo's all-to-all
    "collective": _Detail("Collective name", str, "communication"),
    "dtype": _Detail("dtype", str, "communication"),
    "num_elements": _Detail("In msg nelems", int, "communication"),
    "group": _Detail("Process Group Ranks", msgspec.Raw, "communication"),
    "group_name": _Detail("Process Group Name", str, "communication"),
    "group_size": _Detail("Group size", int, "communication"),
    "splits": _Detail("In split size", msgspec.Raw, "communication"),
    "annotation": _Detail("annotation", str, "device"),  # of what a CUDA graph launched
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
    "graph_node": ("graph node id", Any),
    # what marked a kernel while its graph was captured, where torchtitan and torch write it
    "module": ("module_fqn", Any),
    "mark": ("name", Any),
    "older_mark": ("str", Any),
}

_ABSENT = -(2**63)
_MAY_LACK = ("stream", "correlation", "total_bytes", "reserved_bytes")
_CPU_DEVICE = 0  # c10::DeviceType, as the profiler writes it into "Device Type"
# the torch of older days did not escape the backslashes of a name, of a Windows path say, and none lets a line break in
_AS_GIVEN = str.maketrans({"\b": r"\b", "\f": r"\f", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


class Trace(NamedTuple):
    """One decoded trace.

    ``events``: one row per complete event, sorted by ``start_ns``; the ``category`` of one whose times cannot be begins
    with ``impossible``. ``memory``: one row per allocator event, with signed ``size_bytes`` and the allocator's own
    running totals after it; empty where memory was not recorded. ``metadata``: what the trace says of itself.
    ``num_left_out``: events of Python functions that were not asked for. ``num_halves``: of events whose begin and end
    are two entries (phases B and E), those of which only one is there.
    """

    events: pd.DataFrame
    memory: pd.DataFrame
    metadata: Mapping[str, Any]
    num_left_out: int
    num_halves: int


def read(
    source: bytes | Stream, *, rank: int | None = None, details: Sequence[str] = (), stacks: bool = False
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
    decoder = Decoder(_event_type(tuple(details)), _event_type(tuple(details), int | Decimal))
    frames = _Columns(details, stacks)
    try:
        # millions of fresh objects make the collector run over and over, and none of them is garbage yet
        with gc_disabled():
            for piece in decoder.pieces(io.BytesIO(source) if isinstance(source, bytes) else source):
                frames.add(piece)
        metadata = decoder.metadata
        base_ns = metadata.get("baseTimeNanoseconds", 0)
        rank = metadata.get("distributedInfo", {}).get("rank") if rank is None else rank
        rank = rank if isinstance(rank, int) and 0 <= rank < 2**31 else 0
        events, memory = frames.events(base_ns, rank), frames.memory(base_ns, rank)
        return Trace(events, memory, metadata, frames.num_left_out, frames.num_halves)
    except (msgspec.DecodeError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        reason = str(error) or "it takes more memory than there is"
        raise ValueError(f"not a profiler trace: {reason}. Expected Chrome JSON with traceEvents") from error


@cache
def _event_type(details: tuple[str, ...], time: Any = float) -> type[Any]:
    """The struct of an event with as few fields as will do: what is not a field is skipped without being decoded."""
    fields: list[Any] = [(name, kind, msgspec.field(name=key, default=None)) for name, (key, kind) in _ALWAYS.items()]
    for name in details:
        detail = DETAILS[name]
        # a detail of another type (“N/A” for a number) is no detail, and no reason to refuse a trace
        kind, absent = (msgspec.Raw, msgspec.Raw(b"")) if detail.kind is msgspec.Raw else (Any, None)
        fields.append((name, kind, msgspec.field(name=detail.key, default=absent)))
    args = msgspec.defstruct("args", fields, gc=False)
    event: list[Any] = [
        *((name, str, "") for name in ("ph", "name", "cat")),
        ("ts", time, 0),
        ("dur", float, 0.0),
        *((name, int | str, 0) for name in ("pid", "tid")),
        ("args", args | None, None),
    ]
    return msgspec.defstruct("Event", event, gc=False)


class _Rows:
    """Rows that come piece by piece, by column: texts, of which each is kept once, and numbers."""

    def __init__(self) -> None:
        self.texts: dict[str, Interned] = defaultdict(Interned)
        self._numbers: dict[str, list[Any]] = defaultdict(list)

    def add(self, events: list[Any], time: str, **columns: Any) -> dict[str, Any]:
        """Append lists of texts and arrays of numbers; returns the codes of the texts."""
        columns |= {"process": [event.pid for event in events], "thread": [event.tid for event in events],
                    time: nanoseconds([event.ts for event in events])}  # fmt: skip
        texts = {name: self.texts[name].add(values) for name, values in columns.items() if isinstance(values, list)}
        for name in columns.keys() - texts.keys():
            self._numbers[name].append(columns[name])
        return texts

    def columns(self, names: Sequence[str], time: str, base_ns: int, rank: int) -> tuple[dict[str, Any], Any]:
        """These columns in order of time, on the clock of the base; and that order."""
        numbers = {name: np.concatenate(parts) for name, parts in self._numbers.items()}
        order = np.argsort(numbers[time], kind="stable")
        numbers[time] = since(base_ns, numbers[time], numbers.get("dur_ns", 0))
        numbers["rank"] = np.full(len(order), rank, "int64")
        found = {name: self.texts[name].column(order, _SPELLED.get(name, str)) if name in self.texts
                 else numbers[name][order] for name in names}  # fmt: skip
        lacking = {name: found[name] for name in _MAY_LACK if name in found}
        return found | {name: pd.arrays.IntegerArray(each, each == _ABSENT) for name, each in lacking.items()}, order


_SPELLED: Mapping[str, Callable[[Any], str]] = {
    "name": lambda name: name.translate(_AS_GIVEN),
    "category": lambda category: TODAY.get(category, category),
}


def _annotation(args: Any) -> Any:
    """What marked a kernel, by its module or in words, while its CUDA graph was captured; None outside of graphs."""
    in_graph = args.graph_node and (args.module or args.mark or args.older_mark or "not visible")
    return args.annotation or in_graph or None


class _Columns:
    """Pieces of a trace go in, frames come out."""

    def __init__(self, details: Sequence[str], stacks: bool) -> None:
        self._left_out = () if stacks else STACKS
        self.num_left_out = self.num_halves = self._num_rows = 0
        self._begun: dict[Any, list[Any]] = defaultdict(list)  # of a thread, the innermost last
        self._events, self._memory = _Rows(), _Rows()
        self._details = {name: Sparse(DETAILS[name].kind) for name in details}

    def add(self, piece: list[Any]) -> None:
        whole = [event for event in piece if event.ph == "X"]
        whole += self._joined([event for event in piece if event.ph in ("B", "E")])[::-1]  # one around others first
        kept = [event for event in whole if event.cat not in self._left_out]
        self.num_left_out += len(whole) - len(kept)
        self._add_events([event for event in kept if event.cat not in SPANS])
        self._add_memory([event for event in piece if event.name == "[memory]" and event.args is not None])

    def _joined(self, halves: list[Any]) -> list[Any]:
        """The events that end here: the innermost that has begun on the thread, unless the end bears another name."""
        joined = []
        for event in halves:
            begun = self._begun[event.pid, event.tid]
            self.num_halves += 1
            if event.ph == "B":
                begun.append(event)
            elif begun and event.name in ("", begun[-1].name):
                self.num_halves -= 2
                joined.append(begin := begun.pop())
                begin.dur, begin.args = float(Decimal(event.ts) - Decimal(begin.ts)), begin.args or event.args
        return joined

    def _add_events(self, kept: list[Any]) -> None:
        args = [event.args for event in kept]
        streams = [_ABSENT if a is None or not isinstance(a.stream, int) else a.stream for a in args]
        links = [_ABSENT if a is None or not a.correlation else a.correlation for a in args]  # 0 links nothing
        codes = self._events.add(
            kept, "start_ns", name=[event.name for event in kept], category=[event.cat for event in kept],
            dur_ns=nanoseconds([event.dur for event in kept]), stream=np.array(streams, "int64"),
            correlation=np.array(links, "int64"),
        )  # fmt: skip
        has_args = np.array([a is not None for a in args], dtype=bool)
        having = {of: self._events.texts[column].holds(codes[column], told) & has_args
                  for of, (column, told) in _HAVING.items()}  # fmt: skip
        for name, column in self._details.items():
            rows = np.flatnonzero(having[DETAILS[name].of])
            told = _annotation if name == "annotation" else attrgetter(name)
            values = [told(args[row]) for row in rows.tolist()]
            if DETAILS[name].kind is msgspec.Raw:
                values = list(map(bytes, values))
            column.add(rows + self._num_rows, values)
        self._num_rows += len(kept)

    def _add_memory(self, moments: list[Any]) -> None:
        args = [event.args for event in moments]
        totals = {"total_bytes": [a.total for a in args], "reserved_bytes": [a.reserved for a in args]}
        self._memory.add(
            moments, "time_ns", address=np.array([a.address or 0 for a in args], "uint64"),
            size_bytes=np.array([a.bytes or 0 for a in args], "int64"),
            device=["cpu" if a.device_type == _CPU_DEVICE else f"device{a.device_id}" for a in args],
            # older profilers do not say it
            **{name: np.array([_ABSENT if a is None else a for a in told], "int64") for name, told in totals.items()},
        )  # fmt: skip

    def events(self, base_ns: int, rank: int) -> pd.DataFrame:
        columns, order = self._events.columns(EVENT_COLUMNS, "start_ns", base_ns, rank)
        details = {name: detail.column(order) for name, detail in self._details.items() if len(detail)}
        frame = pd.DataFrame(columns | details)
        if "Operator" in self._events.texts["category"].values:
            frame.loc[frame["name"].str.startswith(ANNOTATIONS), "category"] = "user_annotation"
        return set_apart(frame)

    def memory(self, base_ns: int, rank: int) -> pd.DataFrame:
        return pd.DataFrame(self._memory.columns(MEMORY_COLUMNS, "time_ns", base_ns, rank)[0])
