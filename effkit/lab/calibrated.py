"""The calibration that an account carries, and times that are told relative to it."""

from __future__ import annotations

from typing import TypeVar

from effkit.account import Account
from effkit.arguments import described

Kind = TypeVar("Kind")


def calibration_of(base: Account, kind: type[Kind], lab: str) -> Kind:
    """The calibration, a ``kind``, that an account of ``lab``'s ``measure()`` carries.

    TypeError when ``base`` is no Account. ValueError when it carries no calibration of this lab.
    """
    if not isinstance(base, Account):
        raise TypeError(f"base is an Account, of {lab}.measure(); given: {described(base)}")
    if not isinstance(base.calibration, kind):
        raise ValueError(f"this account carries no calibration; {lab}.measure() makes one that does")
    return base.calibration


def relative_source(scale: float) -> str:
    """What a source says of times that were multiplied by ``scale``, a base's time then over that beside them now."""
    changed = max(scale, 1 / scale) > 1.1  # else it is not worth a word
    told = "; relative to the base measured in turn" * (scale != 1.0)
    return told + f", which took {1 / scale:.2g} times as long as before" * changed
