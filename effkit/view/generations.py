"""Pictures of generations: parts of a step beside their floors, and curves over position, context or depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import pandas as pd
from matplotlib.ticker import MaxNLocator

from effkit.units import readable
from effkit.view.style import GREY, OKABE_ITO, axes, colour, label, unit_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_APART = ("operators", "framework")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def roofline(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Each part's time as a grey bar; in it what was measured apart, operators and framework, and a line at the floor.

    ``table``: of :func:`effkit.decoder.roofline`; its last row, the whole step, is left out.
    """
    parts = table.drop(index="step", errors="ignore")
    ax = axes(ax, (7.4, 0.9 + 0.36 * len(parts)))
    places, begin = range(len(parts)), 0 * parts["time_ns"]
    ax.barh(places, parts["time_ns"], color="#DDDDDD", height=0.72, label="measured")
    for position, kind in enumerate(_APART):
        ax.barh(
            places, parts[f"{kind}_ns"], left=begin, color=colour(kind, position), height=0.36, label=f"{kind} alone"
        )
        begin = begin + parts[f"{kind}_ns"]
    ax.vlines(parts["floor_ns"], [place - 0.36 for place in places], [place + 0.36 for place in places], color="black",
              linewidth=1.2, label="floor")  # fmt: skip
    for place, (_, row) in zip(places, parts.iterrows(), strict=True):
        said = f" {readable(int(row['time_ns']), 'ns')}, floor {row['reached_frac']:.0%} ({row['binds']})"
        ax.text(max(row["time_ns"], begin.iloc[place]), place, said, va="center", fontsize=8)
    ax.set_yticks(places, list(parts.index), fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.5 * parts["time_ns"].max())
    unit_axis(ax.xaxis, "ns")
    ax.legend(frameon=False, fontsize=8, loc="lower right")
    return ax


def curves(
    table: pd.DataFrame, unit: str, ax: Axes | None = None, *, title: str = "", log: bool = False, zero: bool = False,
    target: float | None = None, runs: Mapping[str, pd.DataFrame] | None = None,
) -> Axes:  # fmt: skip
    """One line per column over the index, which names the horizontal axis; values in the unit.

    ``log``: a logarithmic horizontal axis, for contexts that double. ``zero``: values from zero. ``target``: a dashed
    line there. ``runs``: for a column the curves that it is the mean of, one per seed, drawn thin.
    """
    ax = axes(ax, (7.4, 2.8))
    ax.set_title(label(title), loc="left", fontsize=10)
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
