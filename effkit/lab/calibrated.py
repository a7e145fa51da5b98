"""The calibration that an account carries."""

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
