"""Columns that grow piece by piece: strings kept once, values that few rows have, and exact times."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import pandas as pd

from effkit.trace.decoding import decoded

_ANYTHING = msgspec.json.Decoder()
_ACCEPTED: Mapping[Any, Callable[[Any], bool]] = {  # what of a kind can be kept; anything else is absent
    int: lambda value: type(value) is int and -(2**63) < value < 2**63,
    float: lambda value: type(value) in (int, float),
    str: lambda value: type(value) is str and value != "",
    msgspec.Raw: lambda value: value not in (b"", b"null"),
}
_LATEST_US = 2**63 / 1000
_BEYOND = "a time beyond the range of 64-bit nanoseconds"


class _Codes(dict[Hashable, int]):
    """A number for each value, the next one for a new one: looked up without a line of Python where it is known."""

    def __missing__(self, value: Hashable) -> int:
        self[value] = code = len(self)
        return code


class Interned:
    """A column of few distinct values: each is kept once."""

    def __init__(self) -> None:
        self.values = _Codes()
        self._codes: list[Any] = []

    def add(self, values: Sequence[Hashable]) -> Any:
        """Append values, and return their codes."""
        self._codes.append(np.fromiter(map(self.values.__getitem__, values), "int32", len(values)))
        return self._codes[-1]

    def holds(self, codes: Any, wanted: Callable[..., bool]) -> Any:
        """For each code, whether its value is wanted."""
        return np.array([wanted(value) for value in self.values], dtype=bool)[codes]

    def column(self, order: Any, spelled: Callable[[Any], str] = str) -> Any:
        """The strings, in that order of rows."""
        codes = np.concatenate(self._codes)[order] if self._codes else np.array([], "int32")
        return pd.array([spelled(value) for value in self.values], dtype="str").take(codes)


class Sparse:
    """A column of values that few events have: their rows and the values."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        self._rows: list[int] = []
        self._values: list[Any] = []

    def add(self, rows: Any, values: Iterable[Any]) -> None:
        accepted = _ACCEPTED[self._kind]
        for row, value in zip(rows.tolist(), values, strict=True):
            if accepted(value):
                self._rows.append(row)
                self._values.append(value)

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, order: Any) -> Any:
        """All rows in that order; absent where nothing was added."""
        place = np.full(len(order), -1, "int64")
        place[self._rows] = np.arange(len(self._rows))
        if self._kind in (int, float):
            values = pd.array(self._values, dtype="Int64" if self._kind is int else "Float64")
            return values.take(place[order], allow_fill=True)
        table = _Codes()
        codes = np.array([*map(table.__getitem__, self._values), -1], "int64")
        spelled = [_compact(value) if isinstance(value, bytes) else value for value in table]
        return pd.array(spelled, dtype="str").take(codes[place[order]], allow_fill=True)


def _compact(text: bytes) -> str:
    value = decoded(_ANYTHING, text)
    if isinstance(value, str):
        try:
            value = decoded(_ANYTHING, value.encode())  # some profilers write a list as a text
        except ValueError:
            return value
    return json.dumps(value, separators=(",", ":"))


def nanoseconds(microseconds: Sequence[float | Decimal]) -> Any:
    """Whole nanoseconds, of doubles or, where these were too coarse, of decimals."""
    times = np.array(microseconds, "float64")
    whole = np.floor(times)
    if not (np.abs(whole) < _LATEST_US).all():
        raise ValueError(_BEYOND)
    if microseconds and isinstance(microseconds[0], Decimal):
        return np.array([round(time * 1000) for time in microseconds], "int64")
    return whole.astype("int64") * 1000 + np.rint((times - whole) * 1e3).astype("int64")


def since(base_ns: int, times_ns: Any, last_ns: Any = 0) -> Any:
    """Times that count from ``base_ns``, on the clock of that base; ValueError where an end is beyond 64 bits."""
    if int(np.abs(times_ns).max(initial=0)) + int(np.abs(last_ns).max(initial=0)) + abs(base_ns) >= 2**63:
        raise ValueError(_BEYOND)
    return times_ns + base_ns
