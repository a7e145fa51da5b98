"""browse(): the table of claims with lists to choose from, and a picture of what is published beside what is stored."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from effkit import markup
from effkit.claims.table import claims, rows, words
from effkit.markup import Cell
from effkit.screen import Screen
from effkit.view.style import GREY, OKABE_ITO, Picture

_ALL = "all"
# By verdict. Only what closes has a filled mark; where no effect was seen the mark is an empty one.
_MARKS: Mapping[str, dict[str, Any]] = {
    "closes": {"marker": "o", "color": OKABE_ITO[2]},
    "does not close": {"marker": "s", "color": OKABE_ITO[5], "markerfacecolor": "none"},
    "contradicts itself": {"marker": "D", "color": OKABE_ITO[3], "markerfacecolor": "none"},
    "no effect seen here": {"marker": "o", "color": GREY, "markerfacecolor": "none"},
    "not comparable at this scale": {"marker": "^", "color": OKABE_ITO[0], "markerfacecolor": "none"},
    "not a test": {"marker": "x", "color": GREY},
}
_SHOWN = ("claim", "figure", "theirs", "stored", "how", "verdict")
_DRAWN = ["unit", "stored", "low", "high", "open", "verdict"]


class ClaimsBrowser(Screen):
    """Four lists to choose from, and the claims that fit.

    ``controls`` are ``theme``, ``resource``, ``how`` and ``verdict``, each ``"all"`` or one of the table's words;
    ``result`` the rows on the screen, as :func:`effkit.claims` gives them.
    """

    def __init__(self) -> None:
        frame = claims()
        choices = {name: words(frame[name]) for name in ("theme", "resource", "how", "verdict")}
        self.controls = {
            name: widgets.Dropdown(options=[_ALL, *options], description=name.capitalize(),
                                   tooltip=f"Only rows of one {name}", layout=widgets.Layout(width="240px"))
            for name, options in choices.items()
        }  # fmt: skip
        self._picture = ClaimsPicture()
        super().__init__([widgets.HBox(list(self.controls.values()))], "claims")
        self.result: pd.DataFrame
        for control in self.controls.values():
            control.observe(self._show, names="value")
        self._show()

    def _drawn(self) -> pd.DataFrame:
        """Rows with a published figure, as the picture wants them."""
        drawn = {}
        for paper in self.result.index:
            row = rows()[paper]
            if row.published is None:
                continue
            low, _, high = row.published
            drawn[paper] = {"unit": row.unit, "stored": row.stored, "low": low, "high": high,
                            "open": math.isinf(high), "verdict": row.verdict}  # fmt: skip
        return pd.DataFrame.from_dict(drawn, orient="index", columns=_DRAWN)

    def _show(self, _: Any = None) -> None:
        chosen = {name: None if control.value == _ALL else control.value for name, control in self.controls.items()}
        self.result = frame = claims(**chosen)
        numbers = int(frame["gap"].notna().sum())
        sentence = f"{len(frame)} of {len(rows())} papers; {numbers} with a published number of the same kind."
        picture = self._picture.svg(self._drawn(), label=sentence) if numbers else ""
        cells = (
            [Cell(html.escape(str(paper)), "th"), *row[list(_SHOWN)],
             Cell(f'<a target="_blank" href="{html.escape(row["link"])}">{row["link"].partition("_")[0]}</a>')]
            for paper, row in frame.iterrows()
        )  # fmt: skip
        style = ' style="text-align:left;font-size:smaller;line-height:1.3"'
        picture = picture.replace("<svg", '<svg style="max-width:100%;height:auto"', 1)
        table = markup.table(["paper", *_SHOWN, "notebook"], cells, attributes=style)
        self._tell(sentence, f'{picture}<div style="max-height:420px;overflow:auto">{table}</div>')

    def __repr__(self) -> str:
        return f"ClaimsBrowser of {len(rows())} papers"

    def _png(self) -> bytes:
        return self._picture.png(self._drawn())


class ClaimsPicture(Picture[pd.DataFrame]):
    """Ratios on a logarithmic axis, shares beside them: a bar for what is published, a mark for the stored figure.

    What is published as "over" is open: an arrow to the right, from the least that is claimed.
    """

    def __init__(self) -> None:
        self._figure = Figure(figsize=(9.6, 4.8))

    def _draw(self, rows: pd.DataFrame) -> Figure:
        """``rows``: indexed by paper, with the columns ``_DRAWN``; ``low`` and ``high`` are of theirs."""
        self._figure.clear()
        groups = [rows[rows["unit"] == unit] for unit in ("times", "frac")]
        tall = max(1, *map(len, groups))
        height = 1.6 + 0.26 * tall
        self._figure.set_size_inches(9.6, height)
        for ax, group, title in zip(self._figure.subplots(1, 2), groups, ("ratio [times]", "share [%]"), strict=True):
            self._group(ax, group, title, tall)
        self._figure.subplots_adjust(left=0.17, right=0.985, wspace=0.5, top=1 - 0.5 / height, bottom=0.9 / height)
        return self._figure

    def _group(self, ax: Any, group: pd.DataFrame, title: str, tall: int) -> None:
        scale = 100 if "%" in title else 1
        right = 1.3 * group[["stored", "low"]].max().max() * scale  # where an open claim's arrow ends
        for y, row in enumerate(group.itertuples()):
            low, high = row.low * scale, row.high * scale
            if row.open:
                ax.plot([low, right], [y, y], linestyle="none")  # the arrow alone would not widen the axis
                ax.annotate("", (right, y), (low, y), arrowprops={"arrowstyle": "->", "color": GREY, "shrinkA": 0})
            else:
                ax.plot([low, high], [y, y], color=GREY, linewidth=5, alpha=0.45, solid_capstyle="butt")
            ax.plot([row.stored * scale], [y], markersize=6, linestyle="none", **_MARKS[row.verdict])
            # taller than the marks and above them, so that none of them hides what is published
            ax.plot([low if row.open else high], [y], color="black", marker="|", markersize=13, markeredgewidth=1.6)
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
        if scale == 1:
            bars = [Line2D([], [], color=GREY, linewidth=5, alpha=0.45, label="published (an arrow: or more)")]
            marks = [Line2D([], [], markersize=6, linestyle="none", label=name, **_MARKS[name]) for name in _MARKS]
            self._figure.legend(handles=bars + marks, loc="lower center", ncols=4, frameon=False, fontsize=8)


def browse() -> ClaimsBrowser:
    """The table with widgets to filter it by."""
    return ClaimsBrowser()
