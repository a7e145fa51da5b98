"""Packages whose names are imported when they are first asked for, so that a file from a cluster needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def lazily(package: str, homes: Mapping[str, Sequence[str]]) -> Callable[[str], Any]:
    """A package's ``__getattr__``: ``homes`` says which of its modules, or of its neighbours', holds which names.

    >>> lazily("effkit", {"units": ["readable"]})("readable").__name__
    'readable'
    """
    home_of = {name: home for home, names in homes.items() for name in names}

    def of(name: str) -> Any:
        if name in home_of:
            return getattr(import_module(f".{home_of[name]}", package), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    return of
