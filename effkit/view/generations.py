"""Pictures of generations: parts of a step beside their floors."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from effkit.units import readable
from effkit.view.style import axes, colour, unit_axis

_APART = ("operators", "framework")


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
