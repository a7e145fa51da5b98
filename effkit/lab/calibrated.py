"""The calibration that an account carries."""

from __future__ import annotations

from typing import TypeVar

from effkit.account import Account

Kind = TypeVar("Kind")


def calibration_of(base: Account, kind: type[Kind], lab: str) -> Kind:
    """The calibration, a ``kind``, that an account of ``lab``'s ``measure()`` carries.

    TypeError when ``base`` is no Account. ValueError when it carries no calibration of this lab.
    """
    if not isinstance(base, Account):
        raise TypeError(f"{lab}.predict() takes an Account of {lab}.measure(); given: {type(base).__name__}")
    if not isinstance(base.calibration, kind):
        raise ValueError(f"this account carries no calibration; {lab}.measure() makes one that does")
    return base.calibration
