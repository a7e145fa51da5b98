"""verdict(): a figure first, then what it says, in one line that nbval can compare."""

from __future__ import annotations

from effkit.units import has_own_steps, readable


def verdict(what: str, value: float, unit: str = "", *, above: float | None = None, below: float | None = None) -> str:
    """A figure of this run, then whether it lies above or below a limit: a line to be printed.

    The sign ≈ marks a figure that another run gives otherwise: nbval compares the words around it, not the figure.

    >>> print(verdict("backward over forward", 1.834, "times", above=1))
    backward over forward: ≈1.83 times, above 1
    >>> print(verdict("error of the prediction", -0.31, "frac", above=-0.25, below=0.25))
    error of the prediction: ≈-31%, NOT above -25%, below 25%

    Parameters
    ----------
    what
        What the figure is of.
    value
        The figure, in the unit.
    unit
        As in an account (``ns``, ``bytes``), ``frac`` to be read as percent, or any word.
    above, below
        Limits, in the unit; at least one.
    """
    if above is None and below is None:
        raise ValueError(f"verdict on {what!r} has no limit: give above or below")
    said = [
        f"{'' if holds else 'NOT '}{word} {shown(limit, unit)}"
        for word, limit, holds in (
            ("above", above, above is None or value > above),
            ("below", below, below is None or value < below),
        )
        if limit is not None
    ]
    ends = "" if unit == "frac" or has_own_steps(unit) or not unit else f" {unit}"
    return f"{what}: ≈{shown(value, unit)}{ends}, {', '.join(said)}"


def shown(value: float, unit: str) -> str:
    """A figure in three digits, or in the steps of its unit."""
    if unit == "frac":
        return f"{100 * value:.3g}%"
    if has_own_steps(unit):
        return readable(value, unit)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
