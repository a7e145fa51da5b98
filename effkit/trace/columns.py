"""Columns that grow piece by piece: strings kept once, values that few rows have, and exact times."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from decimal import Decimal
from typing import Any

import msgspec
import numpy as np
import pandas as pd

_LATEST_US = 2**63 / 1000
_EXACT_US = 2**43  # up to here a double holds microseconds with three decimals


class Interned:
    """A column of few distinct values: each is kept once."""

    def __init__(self) -> None:
        self.values: dict[Hashable, int] = {}
        self._codes: list[Any] = []

    def add(self, values: Iterable[Hashable]) -> Any:
        """Append values; returns their codes."""
        table = self.values
        self._codes.append(np.array([table.setdefault(value, len(table)) for value in values], "int32"))
        return self._codes[-1]

    def holds(self, codes: Any, wanted: Callable[..., bool]) -> Any:
        """For each code, whether its value is wanted."""
        return np.array([wanted(value) for value in self.values], dtype=bool)[codes]

    def column(self, spelled: Callable[[Any], str] = str) -> Any:
        """The strings."""
        return pd.array([spelled(value) for value in self.values], dtype="str").take(np.concatenate(self._codes))


class Sparse:
    """A column of values that few events have: their rows and the values."""

    def __init__(self, kind: Any) -> None:
        self._kind = kind
        accepted: Mapping[Any, Any] = {int: int, float: (int, float), str: str, msgspec.Raw: bytes}
        self._accepted = accepted[kind]
        self._rows: list[int] = []
        self._values: list[Any] = []

    def add(self, rows: Any, values: Iterable[Any]) -> None:
        for row, value in zip(rows.tolist(), values, strict=True):
            if isinstance(value, self._accepted) and value != b"":
                self._rows.append(row)
                self._values.append(value)

    def __len__(self) -> int:
        return len(self._rows)

    def column(self, num_rows: int) -> Any:
        """All rows; absent where nothing was added."""
        if self._kind in (int, float):
            dtype = "Int64" if self._kind is int else "Float64"
            column = pd.array(np.zeros(num_rows), dtype=dtype)
            column[:] = pd.NA
            column[self._rows] = pd.array(self._values, dtype=dtype)
            return column
        table: dict[Any, int] = {}
        codes = np.full(num_rows, -1, "int64")
        codes[self._rows] = [table.setdefault(value, len(table)) for value in self._values]
        spelled = [_compact(value) if isinstance(value, bytes) else value for value in table]
        return pd.array(spelled, dtype="str").take(codes, allow_fill=True)


def _compact(text: bytes) -> str:
    value = json.loads(text)  # some profilers write a list as a text
    return value.replace(" ", "") if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def nanoseconds(microseconds: Any, base_ns: int = 0) -> Any:
    """Whole nanoseconds. A double holds three decimals of microseconds since a recent base; of those since 1970 it
    holds one or two, and the shortest decimal that means the same double is what the file says."""
    whole = np.floor(microseconds)
    if not (np.abs(whole) < _LATEST_US).all():
        raise ValueError("a time beyond the range of 64-bit nanoseconds")
    exact = whole.astype("int64") * 1000 + np.rint((microseconds - whole) * 1e3).astype("int64")
    for i in np.flatnonzero((np.abs(whole) > _EXACT_US) & (microseconds != whole)).tolist():
        exact[i] = round(Decimal(repr(float(microseconds[i]))) * 1000)
    return exact + base_ns
