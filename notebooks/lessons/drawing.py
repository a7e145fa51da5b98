"""Pictures that only lessons draw: curves over position, context, depth or steps; delays between pairs of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from effkit.units import readable
from effkit.view.style import GREY, OKABE_ITO, axes, label, unit_axis

_MARKERS = ("o", "s", "^", "D", "v", "P")


def curves(
    table: pd.DataFrame, unit: str, ax: Axes | None = None, *, title: str = "", log: bool = False, zero: bool = False,
    target: float | None = None, runs: Mapping[str, pd.DataFrame] | None = None,
) -> Axes:  # fmt: skip
    """One line per column over the index, which names the horizontal axis; values in the unit.

    ``log``: a logarithmic horizontal axis, for contexts that double. ``zero``: values from zero. ``target``: a dashed
    line there. ``runs``: for a column the curves that it is the mean of, one per seed, drawn thin.
    """
    ax = axes(ax, (7.4, 2.8), label(title))
    for position, name in enumerate(table):
        few = len(table) <= 12
        seeds = (runs or {}).get(name, table[[]]).interpolate(limit_area="inside")
        ax.plot(seeds, color=OKABE_ITO[position % len(OKABE_ITO)], linewidth=0.7, alpha=0.4)
        ax.plot(table.index, table[name], color=OKABE_ITO[position % len(OKABE_ITO)], linewidth=1.4, markersize=4,
                marker=_MARKERS[position % len(_MARKERS)] if few else None, label=label(name))  # fmt: skip
    ax.set_xlabel(label(table.index.name or ""))
    ax.grid(axis="y", color=GREY, alpha=0.2, linewidth=0.6)
    if target is not None:
        ax.axhline(target, color=GREY, linestyle="--", linewidth=1, label="target")
    if table.shape[1] > 1 or target is not None:
        ax.legend(frameon=False, fontsize=8)
    if log:
        ax.set_xscale("log", base=2)
        ax.set_xticks(list(table.index), [f"{value:,}" for value in table.index])
    else:
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=pd.api.types.is_integer_dtype(table.index.dtype)))
    if zero:
        ax.set_ylim(bottom=0)
    unit_axis(ax.yaxis, unit)
    return ax


def delays(matrix: Any, ax: Axes | None = None) -> Axes:
    """Times [ns] from each sender (row) to each receiver (column); of several rounds, their median."""
    times = np.asarray(matrix, dtype=float)
    if times.ndim == 3:
        times = np.median(times, axis=0)
    ax = axes(ax, (0.9 + 0.62 * len(times), 0.7 + 0.55 * len(times)), framed=True)
    ax.imshow(times, cmap="cividis", vmin=0)
    middle = np.nanmax(times) / 2
    for sender, receiver in np.argwhere(~np.isnan(times)):
        time_ns = times[sender, receiver]
        ax.text(receiver, sender, readable(round(time_ns), "ns"), ha="center", va="center", fontsize=7,
                color="white" if time_ns < middle else "black")  # fmt: skip
    ax.set(xticks=range(len(times)), yticks=range(len(times)), xlabel="receiver", ylabel="sender")
    return ax
