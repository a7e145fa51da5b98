"""Columns that grow piece by piece: strings kept once, values that few rows have, and exact times."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from decimal import Decimal
from itertools import compress, count, islice
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from effkit.trace.decoding import decoded

_ANYTHING = msgspec.json.Decoder()
_ACCEPTED: Mapping[Any, Callable[[Any], bool]] = {  # what of a kind can be kept; anything else is absent, as is null
    int: lambda value: type(value) is int and -(2**63) < value < 2**63,
    float: lambda value: type(value) in (int, float),
    str: lambda value: type(value) is str and value != "",
}
_NOTHING = {b"", b"null"}
_LATEST_US = 2**63 / 1000
_BEYOND = "a time beyond the range of 64-bit nanoseconds"


class Interned:
    """A column of few distinct values: each is kept once."""

    def __init__(self) -> None:
        self.values: dict[Hashable, int] = defaultdict(count().__next__)  # a new value has the next number
        self._codes: list[Any] = []
        self._told: dict[Any, list[bool]] = {}

    def add(self, values: Sequence[Hashable]) -> Any:
        """Append values, and return their codes."""
        self._codes.append(np.fromiter(map(self.values.__getitem__, values), "int32", len(values)))
        return self._codes[-1]

    def holds(self, codes: Any, wanted: Callable[[Any], bool]) -> Any:
        """For each code, whether its value is wanted; of each value that is asked once."""
        told = self._told.setdefault(wanted, [])
        told += map(wanted, islice(self.values, len(told), None))
        return np.array(told, dtype=bool)[codes]

    def column(self, order: Any, spelled: Callable[[Any], Any] = str, kind: str = "str") -> Any:
        """The values as spelled, in that order of rows; absent for a row of -1."""
        codes = np.concatenate([*self._codes, np.array([-1], "int32")])[order]
        return pd.array([spelled(value) for value in self.values], dtype=kind).take(codes, allow_fill=True)


class Sparse:
    """A column of values that few events have: their rows and the values, each of these kept once."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._rows: list[Any] = []
        self._values = Interned()

    def add(self, rows: Any, values: Sequence[Any]) -> None:
        if accepts := _ACCEPTED.get(self._kind):
            accepted = [accepts(value) for value in values]
            rows, values = rows[np.array(accepted, bool)], list(compress(values, accepted))
        self._rows.append(rows)
        self._values.add(values)

    def __len__(self) -> int:
        return len(self._values.values.keys() - _NOTHING)

    def column(self, order: Any) -> Any:
        """All rows in that order; absent where nothing was added."""
        place = np.full(len(order), -1, "int64")
        rows = np.concatenate(self._rows)
        place[rows] = np.arange(len(rows))
        return self._values.column(place[order], _compact, {int: "Int64", float: "Float64"}.get(self._kind, "str"))


def _compact(value: Any) -> Any:
    """JSON text without spaces; another value as it is."""
    if not isinstance(value, bytes):
        return value
    if value in _NOTHING:
        return None
    value = decoded(_ANYTHING, value)
    if isinstance(value, str):
        try:
            value = decoded(_ANYTHING, value.encode())  # some profilers write a list as a text
        except ValueError:
            return value
    return json.dumps(value, separators=(",", ":"))


def nanoseconds(microseconds: Sequence[float | Decimal]) -> Any:
    """Whole nanoseconds, of doubles or, where these were too coarse, of whole numbers and decimals."""
    times = np.array(microseconds)
    whole = np.floor(times.astype("float64"))
    if not (np.abs(whole) < _LATEST_US).all():
        raise ValueError(_BEYOND)
    if times.dtype != "float64":
        return np.array([round(time * 1000) for time in microseconds], "int64")
    return whole.astype("int64") * 1000 + np.rint((times - whole) * 1e3).astype("int64")


def since(base_ns: int, times_ns: Any, last_ns: Any = 0) -> Any:
    """Times that count from ``base_ns``, on the clock of that base; ValueError where an end is beyond 64 bits."""
    if int(np.abs(times_ns).max(initial=0)) + int(np.abs(last_ns).max(initial=0)) + abs(base_ns) >= 2**63:
        raise ValueError(_BEYOND)
    return times_ns + base_ns
