"""What browse() shows: the table of claims, filtered by theme, resource and status."""

from __future__ import annotations

import html
from typing import Any

import ipywidgets as widgets
import pandas as pd

from effkit import markup
from effkit.claims.table import UNITS, claims, rows, words
from effkit.markup import Cell
from effkit.screen import Screen
from effkit.view.claims import ClaimsPicture

_ALL = "all"
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
