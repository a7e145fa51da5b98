"""Units: how a quantity is told to a person. The only place that formats one."""

from __future__ import annotations

from collections.abc import Mapping

# unit -> the steps a person reads it in: (from this size on, divide by, name, decimals)
_STEPS: Mapping[str, tuple[tuple[float, float, str, int], ...]] = {
    "ns": ((6e10, 1e9, "s", 1), (1e9, 1e9, "s", 2), (1e6, 1e6, "ms", 1), (1e3, 1e3, "us", 1), (0, 1, "ns", 0)),
    "bytes": ((2**30, 2**30, "GiB", 2), (2**20, 2**20, "MiB", 1), (2**10, 2**10, "KiB", 1), (0, 1, "B", 0)),
    "FLOPs": ((1e15, 1e15, "PFLOPs", 2), (1e12, 1e12, "TFLOPs", 2), (1e9, 1e9, "GFLOPs", 2), (1e6, 1e6, "MFLOPs", 1),
              (0, 1, "FLOPs", 0)),
    "FLOP/s": ((0, 1e9, "GFLOP/s", 0),),
    "B/s": ((0, 1e9, "GB/s", 1),),
    "B": ((0, 2**30, "GiB", 0),),
    "ppm": ((0, 1e4, "%", 2),),
    "thousandths": ((0, 1e3, "times", 1),),
}  # fmt: skip


def has_own_steps(unit: str) -> bool:
    """Whether :func:`readable` says the unit itself in steps of its own (``ms``, ``MiB``), so that no label need."""
    return unit in _STEPS


def readable(value: float, unit: str) -> str:
    """A quantity as a person reads it.

    >>> readable(61_300_000, "ns"), readable(3 * 2**20, "bytes"), readable(12_345, "cells")
    ('61.3 ms', '3.0 MiB', '12,345 cells')
    """
    for threshold, divisor, name, decimals in _STEPS.get(unit, ()):
        if abs(value) >= threshold:
            return f"{value / divisor:,.{decimals}f} {name}"
    return f"{value:,.0f} {unit}"
