"""browse(): the table of claims with lists to choose from, and a picture of theirs beside ours."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as widgets
import pandas as pd
from matplotlib.figure import Figure

from effkit import markup
from effkit.claims.table import UNITS, claims, rows, words
from effkit.markup import Cell
from effkit.screen import Screen
from effkit.view.style import GREY, OKABE_ITO, Picture

_ALL = "all"
_STATUS_MARKS = {"measured live": ("o", OKABE_ITO[2]), "recomputed from published figures": ("s", OKABE_ITO[0]),
                 "what-if only": ("^", OKABE_ITO[1])}  # fmt: skip
_SHOWN = ("claim", "figure", "theirs", "ours", "status")


class ClaimsBrowser(Screen):
    """Three lists to choose from, and the claims that fit.

    ``controls`` are ``theme``, ``resource`` and ``status``, each ``"all"`` or one of the table's words; ``result`` the
    rows on the screen, as :func:`effkit.claims` gives them.
    """

    def __init__(self) -> None:
        frame = claims()
        choices = {"theme": words(frame["theme"]), "resource": words(frame["resource"]),
                   "status": sorted(frame["status"].unique())}  # fmt: skip
        self.controls = {
            name: widgets.Dropdown(options=[_ALL, *options], description=name.capitalize(),
                                   tooltip=f"Only rows of one {name}", layout=widgets.Layout(width="290px"))
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
            if (published := row.published) is None or published.low is None or published.high is None:
                continue
            _, _, per_one = UNITS[row.unit]
            # "over" is open to the right: its end is what is claimed at least
            end = published.low if row.theirs.startswith("over") else published.high
            low, high = published.low / per_one, end / per_one
            drawn[paper] = {"unit": row.unit, "ours": row.ours, "low": low, "high": high, "status": row.status}
        return pd.DataFrame.from_dict(drawn, orient="index", columns=["unit", "ours", "low", "high", "status"])

    def _show(self, _: Any = None) -> None:
        chosen = {name: None if control.value == _ALL else control.value for name, control in self.controls.items()}
        self.result = frame = claims(**chosen)
        numbers = int(frame["gap"].notna().sum())
        sentence = f"{len(frame)} of {len(rows())} papers; {numbers} with a published number of the same kind as ours."
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


def browse() -> ClaimsBrowser:
    """The table with widgets to filter it by."""
    return ClaimsBrowser()
