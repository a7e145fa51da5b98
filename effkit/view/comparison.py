"""The picture of a what-if: measured, predicted and receipt."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effkit.account import Account
from effkit.receipt import Receipt
from effkit.units import readable
from effkit.view.style import Picture, colour, label, legend_columns

_ONE_LINE, _COLUMNS = 6, 4  # rows that a legend names on one line; in how many columns at most more of them stand


class Comparison(Picture[Account, Receipt | None]):
    """Measured, predicted and receipt as bars under one another, in one figure that is drawn again and again.

    A new figure costs several times as much as moving the bars of an old one, and a slider cannot wait.
    """

    def __init__(self, base: Account) -> None:
        self._base = base
        self.figure = Figure()
        self._ax = self.figure.add_axes((0.155, 0.04, 0.84, 0.8))
        self._fit(list(base.frame.index))
        self._ax.set_ylim(-0.6, 2.6)
        self._ax.axis("off")
        self._items: dict[str, list[Rectangle]] = {}
        self._labels = [self._ax.text(0, 2 - row, name, ha="right", va="center", fontsize=9)
                        for row, name in enumerate(("measured", "predicted", "measured here"))]  # fmt: skip
        self._values = [self._ax.text(0, 2 - row, "", va="center", fontsize=9) for row in range(3)]
        (self._whisker,) = self._ax.plot([], [], color="black", marker="|", markersize=9, linewidth=1.5, zorder=4)
        self._outline = self._ax.add_patch(Rectangle((0, 0.65), 0, 0.7, fill=False, edgecolor="#D55E00", zorder=3))
        self._outline.set(linestyle="--", linewidth=2, hatch="//")  # signs beside the colour
        self._note = self.figure.text(0.155, 0.01, "", fontsize=8, va="bottom")
        self._shown: list[str] = []

    def png(self, result: Account, receipt: Receipt | None, note: str = "") -> bytes:
        """For places without a browser; ``note`` says below the bars which setting they are of."""
        self._note.set_text(label(note, most=100))
        drawn = super().png(result, receipt)
        self._note.set_text("")
        return drawn

    def _draw(self, result: Account, receipt: Receipt | None) -> Figure:
        bars = [self._base, result, receipt.measured if receipt else None]
        notes = ("", "" if result.in_range else "  out of range",
                 f"  error {receipt.error:+.1%}" if receipt else "")  # fmt: skip
        reach = max(max(bar.total, bar.high or 0) for bar in bars if bar is not None) or 1
        for row, (bar, name, value) in enumerate(zip(bars, self._labels, self._values, strict=True)):
            self._bar(row, bar)
            name.set(visible=bar is not None, position=(-0.01 * reach, 2 - row))
            text = "" if bar is None else readable(bar.total, bar.unit) + notes[row]
            end = 0 if bar is None else max(bar.total, bar.high or 0, bar.total - bar.residual)
            value.set(text=text, position=(end + 0.012 * reach, 2 - row))
        self._name()
        band = [end for end in (result.low, result.high) if end is not None]
        self._whisker.set_data(band, [1] * len(band))
        self._outline.set(width=result.total, visible=not result.in_range)
        self._ax.set_xlim(0, reach * 1.32)
        return self.figure

    def _fit(self, items: list[str]) -> None:
        """Room above the bars for a legend of these rows, of which many take several lines."""
        self._columns = legend_columns(items, _COLUMNS) if len(items) > _ONE_LINE else None
        height = 1.9 + (0.17 * math.ceil(len(items) / self._columns) if self._columns else 0.0)
        self.figure.set_size_inches(7.4, height)
        self._ax.set_position((0.155, 0.04, 0.84, 1.48 / height))

    def _bar(self, row: int, bar: Account | None) -> None:
        values = {} if bar is None else {**bar.frame["value"], "residual": bar.residual}
        for item in [item for item in values if item not in self._items]:
            shade = colour(item, len(self._items))
            self._items[item] = [Rectangle((0, 1.65 - place), 0, 0.7, color=shade, linewidth=0) for place in range(3)]
            for patch in self._items[item]:
                self._ax.add_patch(patch)
        left = 0.0
        for item, patches in self._items.items():
            width = max(0, int(values.get(item, 0)))
            patches[row].set(x=left, width=width, visible=width > 0)
            left += width

    def _name(self) -> None:
        """A legend of the rows that have a bar; made anew only when these change."""
        shown = [item for item, patches in self._items.items() if any(patch.get_width() for patch in patches)]
        if shown == self._shown:
            return
        self._shown = shown
        self._fit(max(shown, list(self._base.frame.index), key=len))
        for old in self.figure.legends[:]:
            old.remove()
        self.figure.legend(
            [self._items[item][0] for item in shown], [label(item) for item in shown], loc="upper left",
            ncols=self._columns or max(1, len(shown)), frameon=False, fontsize=8 if self._columns else 9,
            bbox_to_anchor=(0.145, 1.03), handlelength=1.0,
        )  # fmt: skip
