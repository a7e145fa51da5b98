"""Pictures of several ranks: who computes, waits and moves when; what balance is worth."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from effkit.units import readable
from effkit.view.style import GREY, axes, colour, unit_axis

_LANES = ("computing", "link")
_HATCHED = "waiting"  # told apart without colour, too


def timeline(stretches: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Each rank's computing above its link; waiting is hatched.

    ``stretches``: ``rank, lane, what, start_ns, end_ns``, of :func:`effkit.moe.timeline`.
    """
    ranks = sorted(stretches["rank"].unique())
    ax = axes(ax, (7.4, 1.0 + 0.62 * len(ranks)))
    labelled: set[str] = set()
    for position, what in enumerate(dict.fromkeys(stretches["what"])):
        hatch = "////" if _HATCHED in what else None
        for (rank, lane), rows in stretches[stretches["what"] == what].groupby(["rank", "lane"]):
            spans = list(zip(rows["start_ns"], rows["end_ns"] - rows["start_ns"], strict=True))
            top = ranks.index(rank) + 0.42 * _LANES.index(str(lane))
            ax.broken_barh(spans, (top, 0.38), facecolors=colour(what, position), hatch=hatch, edgecolor="white",
                           linewidth=0, label=None if what in labelled else what)  # fmt: skip
            labelled.add(what)
    ax.set_yticks([i + 0.42 * lane + 0.19 for i in range(len(ranks)) for lane in range(2)],
                  [f"rank {rank} {lane}" for rank in ranks for lane in _LANES], fontsize=8)  # fmt: skip
    ax.set(xlim=(0, stretches["end_ns"].max()), ylim=(len(ranks) - 0.1, -0.1))
    unit_axis(ax.xaxis, "ns")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.25), ncols=5)
    return ax


def policies(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The step under each policy, the first one's time as a line; what is dropped is said beside it.

    ``table``: by policy, ``step_ns`` and ``dropped_frac``, of :func:`effkit.moe.worth_balancing`.
    """
    ax = axes(ax, (7.4, 0.8 + 0.36 * len(table)))
    colours = [GREY] + [colour("experts", 0)] * (len(table) - 1)
    bars = ax.barh(range(len(table)), table["step_ns"], color=colours, height=0.66)
    ax.axvline(table["step_ns"].iloc[0], color=GREY, linewidth=0.8, linestyle=":")
    notes = [f", drops {dropped:.0%}" if dropped else "" for dropped in table["dropped_frac"]]
    times = [readable(int(step_ns), "ns") for step_ns in table["step_ns"]]
    ax.bar_label(bars, [f" {time}{note}" for time, note in zip(times, notes, strict=True)], fontsize=8)
    ax.set_yticks(range(len(table)), list(table.index), fontsize=9)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.25 * table["step_ns"].max())
    unit_axis(ax.xaxis, "ns")
    return ax
