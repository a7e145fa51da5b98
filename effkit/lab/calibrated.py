"""Which accounts can be predicted from."""

from __future__ import annotations

from typing import TypeVar

from effkit.account import Account

Kind = TypeVar("Kind")


def calibration_of(base: Account, kind: type[Kind], lab: str) -> Kind:
    """What ``base`` was calibrated with.

    Parameters
    ----------
    base
        What ``lab``'s ``measure()`` returned.
    kind
        The class of the lab's calibrations.
    lab
        The name of the lab, for the sentence of the error.

    Raises
    ------
    TypeError
        When ``base`` is no Account.
    ValueError
        When it carries no calibration of this lab.
    """
    if not isinstance(base, Account):
        raise TypeError(f"{lab}.predict() takes an Account of {lab}.measure(); given: {type(base).__name__}")
    if not isinstance(base.calibration, kind):
        raise ValueError(f"this account carries no calibration; {lab}.measure() makes one that does")
    return base.calibration
