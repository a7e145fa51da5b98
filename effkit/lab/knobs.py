"""Knobs: what a setting may hold, checked from the fields' metadata, and how a setting is changed.

A lab's setting is a frozen dataclass whose fields are made by :func:`whole`, :func:`number`, :func:`share`,
:func:`one_of` and :func:`flag`, and whose ``__post_init__`` calls :func:`check`: all labs refuse in the same words.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from effkit.arguments import checked_number, checked_whole, checked_word

Setting = TypeVar("Setting")
Check = Callable[[str, Any], Any]  # (knob, value) -> the value as it is kept


def whole(default: Any = dataclasses.MISSING, *, least: int = 1) -> Any:
    """A field of whole numbers from ``least`` on; numpy's integers become Python's, True and 1.5 are refused."""
    return _field(default, lambda name, value: checked_whole(name, value, least))


def number(default: Any = dataclasses.MISSING, *, least: float = 0.0) -> Any:
    """A field of real numbers from ``least`` on."""
    return _field(default, lambda name, value: checked_number(name, value, least, float("inf")))


def share(default: Any = dataclasses.MISSING, *, positive: bool = False) -> Any:
    """A field of fractions from 0 to 1; with ``positive``, 0 is refused."""
    return _field(default, lambda name, value: checked_share(name, value, positive=positive))


def one_of(default: Any = dataclasses.MISSING, *, words: Sequence[Any]) -> Any:
    """A field that takes one of these values."""
    return _field(default, lambda name, value: checked_word(name, value, words))


def flag(default: Any = dataclasses.MISSING) -> Any:
    """A field that is True or False."""

    def check_flag(name: str, value: Any) -> bool:
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{name} is True or False; given: {value!r}")
        return bool(value)

    return _field(default, check_flag)


def check(setting: Any) -> None:
    """Check every field of a frozen dataclass, and keep the values as plain Python numbers.

    ValueError for the first field whose value cannot be; the sentence names it, what it takes and what was given.
    """
    for field in dataclasses.fields(setting):
        if of_field := field.metadata.get("check"):
            object.__setattr__(setting, field.name, of_field(field.name, getattr(setting, field.name)))


def changed(setting: Setting, changes: Mapping[str, Any]) -> Setting:
    """A copy of a dataclass with these fields changed; a value of None leaves the field as it is.

    ValueError for a name that the setting has not, or a value that cannot be.
    """
    names = [field.name for field in dataclasses.fields(setting)]  # type: ignore[arg-type]
    return dataclasses.replace(setting, **asked(changes, names))  # type: ignore[type-var]


def asked(changes: Mapping[str, Any], knobs: Iterable[str]) -> dict[str, Any]:
    """The changes that are asked for: those that are not None. ValueError for a name that is no knob."""
    knobs = list(knobs)
    if unknown := sorted(set(changes) - set(knobs)):
        raise ValueError(f"no such knob: {', '.join(unknown)}; the knobs are {', '.join(knobs)}")
    return {name: value for name, value in changes.items() if value is not None}


def checked_share(name: str, value: Any, *, positive: bool = False) -> float:
    """The value, if it is a fraction from 0 to 1; with ``positive``, above 0."""
    said = f"a share in {'(' if positive else '['}0, 1]"
    fraction = checked_number(name, value, 0.0, 1.0, said)
    if positive and fraction == 0:
        raise ValueError(f"{name} is {said}; given: {value!r}")
    return fraction


def _field(default: Any, of_field: Check) -> Any:
    return dataclasses.field(default=default, metadata={"check": of_field})
