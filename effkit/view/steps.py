"""Pictures of steps: a training step's memory, what combinations of levers cost, a generation's step by its floors."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from effkit.receipt import Receipt
from effkit.units import readable
from effkit.view.style import GREY, NAMED, OKABE_ITO, axes, colour, label, unit_axis

_APART = ("operators", "framework")


def live_bytes(levels: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """What is alive during each operator of a step, stacked by category; phases apart, the peak marked.

    ``levels``: a row per operator, ``phase`` and ``operator``, and a column of bytes per category.
    """
    ax = axes(ax, (7.4, 2.8))
    amounts = levels.drop(columns=["phase", "operator"])
    amounts = amounts.loc[:, (amounts > 0).any()]
    shades = [colour(name, position) for position, name in enumerate(amounts)]
    ax.stackplot(levels.index, amounts.T, labels=list(amounts), colors=shades, step="mid", linewidth=0)
    alive = amounts.sum(axis="columns").to_numpy()
    at = int(alive.argmax())
    ax.plot([at], [alive[at]], marker="v", color="black", markersize=6, clip_on=False)
    ax.set_ylim(0, 1.3 * alive.max())  # room for the legend
    begins = levels["phase"] != levels["phase"].shift()
    for start, phase in levels.loc[begins, "phase"].items():
        ax.axvline(start, color=GREY, linewidth=0.8, linestyle=":")
        ax.text(start, 1.14 * alive.max(), f" {phase}", fontsize=8, color=GREY, va="top")
    ax.set(xlim=(0, len(levels) - 1), xlabel="operator")
    unit_axis(ax.yaxis, "bytes")
    where = f"{levels['phase'].iloc[at]}, at {label(levels['operator'].iloc[at])}"
    ax.set_title(f"Peak {readable(int(alive[at]), 'bytes')} in {where}", loc="left", fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4)
    return ax


def front(table: pd.DataFrame, receipts: Sequence[Receipt] = (), ax: Axes | None = None) -> Axes:
    """Time against peak memory of combinations of levers: those on the front joined, lossy ones hollow.

    A cross is a measurement, tied to its prediction.
    """
    ax = axes(ax, (7.4, 3.4), "What each byte saved costs in time")
    best = table[table["on_front"]].sort_values("step_ns")
    ax.step(best["step_ns"], best["peak_bytes"], where="post", color=OKABE_ITO[0], linewidth=1)
    for lossless, rows in table.groupby("lossless"):
        faces = [OKABE_ITO[0] if here else GREY for here in rows["on_front"]]
        ax.scatter(rows["step_ns"], rows["peak_bytes"], s=np.where(rows["on_front"], 36, 12), edgecolors=faces,
                   facecolors=faces if lossless else "none", zorder=3,
                   label="exact gradients" if lossless else "changes gradients or updates")  # fmt: skip
    for number, receipt in enumerate(receipts):
        guess, truth = ([a.total, *(c.total for c in a.companions if c.unit == "ns")][::-1][-2:]
                        for a in (receipt.predicted, receipt.measured))  # fmt: skip
        ax.plot([guess[0], truth[0]], [guess[1], truth[1]], color=NAMED["exposed communication"], linewidth=1)
        ax.plot(*truth, marker="x", color=NAMED["exposed communication"], markersize=8, linestyle="",
                label=None if number else "measured")  # fmt: skip
    unit_axis(ax.xaxis, "ns")
    unit_axis(ax.yaxis, "bytes")
    ax.set(xlabel="time of one step, predicted", ylabel="peak", ylim=(0, None))
    ax.legend(frameon=False, fontsize=9)
    return ax


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
