"""What papers claim beside what a cell shows: one line per paper."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from effkit.view.style import GREY, OKABE_ITO, Picture

_STATUS_MARKS = {"measured live": ("o", OKABE_ITO[2]), "recomputed from published figures": ("s", OKABE_ITO[0]),
                 "what-if only": ("^", OKABE_ITO[1])}  # fmt: skip


class ClaimsPicture(Picture[pd.DataFrame]):
    """Ratios on a logarithmic axis, shares beside them: a bar for what is published, a mark for what a cell found."""

    def __init__(self) -> None:
        self._figure = Figure(figsize=(9.6, 4.8))

    def _draw(self, rows: pd.DataFrame) -> Figure:
        """``rows``: indexed by paper; ``unit``, ``ours``, ``low`` and ``high`` of theirs, ``status``."""
        self._figure.clear()
        groups = [rows[rows["unit"] == unit] for unit in ("times", "frac")]
        tall = max(1, *map(len, groups))
        height = 1.3 + 0.26 * tall
        self._figure.set_size_inches(9.6, height)
        for ax, group, title in zip(self._figure.subplots(1, 2), groups, ("ratio [times]", "share [%]"), strict=True):
            self._group(ax, group, title, tall)
        self._figure.subplots_adjust(left=0.17, right=0.985, wspace=0.5, top=1 - 0.5 / height, bottom=0.62 / height)
        return self._figure

    def _group(self, ax: Any, group: pd.DataFrame, title: str, tall: int) -> None:
        scale = 100 if "%" in title else 1
        for y, row in enumerate(group.itertuples()):
            low, high = row.low * scale, row.high * scale
            ax.plot([low, high], [y, y], color=GREY, linewidth=5, alpha=0.45, solid_capstyle="butt",
                    label="published" if y == 0 else None)  # fmt: skip
            ax.plot([high], [y], color=GREY, marker="|", markersize=11, markeredgewidth=2.2)
            marker, colour = _STATUS_MARKS.get(row.status, ("x", GREY))
            ax.plot([row.ours * scale], [y], color=colour, marker=marker, markersize=6, linestyle="none")
        ax.set_yticks(range(len(group)), list(group.index), fontsize=8)
        ax.set_ylim(tall - 0.4, -0.8)
        if scale == 1 and len(group):
            ax.set_xscale("log")
            ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
            ax.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:e}"[0] in "25" else "")
            ax.tick_params(axis="x", which="both", labelsize=8)
        ax.set_title(title, fontsize=9, loc="left")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="x", color=GREY, alpha=0.2, linewidth=0.6)
        for status, (marker, colour) in _STATUS_MARKS.items():
            ax.plot([], [], color=colour, marker=marker, linestyle="none", markersize=6, label=status)
        if scale == 1:
            handles, labels = ax.get_legend_handles_labels()
            self._figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=8)
