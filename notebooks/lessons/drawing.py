"""Pictures that only lessons draw: curves, and the tables of the analyses: memory, levers, floors, ranks, policies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from effkit.receipt import Receipt
from effkit.units import readable
from effkit.view.style import GREY, NAMED, OKABE_ITO, axes, colour, label, unit_axis

_MARKERS = ("o", "s", "^", "D", "v", "P")
_APART = ("operators", "framework")
_LANES = ("computing", "link")
_HATCHED = "waiting"  # told apart without colour, too


def curves(
    table: pd.DataFrame, unit: str, ax: Axes | None = None, *, title: str = "", log: bool = False, zero: bool = False,
    target: float | None = None, target_name: str = "target", runs: Mapping[str, pd.DataFrame] | None = None,
) -> Axes:  # fmt: skip
    """One line per column over the index, which names the horizontal axis; values in the unit.

    ``log``: a logarithmic horizontal axis, for contexts that double. ``zero``: values from zero. ``target``: a dashed
    line there, by its name. ``runs``: for a column the curves that it is the mean of, one per seed, drawn thin.
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
        ax.axhline(target, color=GREY, linestyle="--", linewidth=1, label=target_name)
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
