"""Every matplotlib line in the library. Drawing functions compute nothing; they never touch pyplot's state."""

from __future__ import annotations

import html
import io
import re
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from effkit.account import Account, readable
from effkit.receipt import Receipt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette: told apart with any colour vision. The first four suit stacked rows.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GREY = "#777777"
_NAMED = {
    "real": "#0072B2",
    "padding": "#E69F00",
    "step overhead": "#56B4E9",
    "waiting": "#CC79A7",
    "residual": "#DDDDDD",
}
# text stays text (a browser draws it, a test reads it) and equal pictures are equal bytes
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "effkit"}


def colour(item: str, position: int) -> str:
    """The colour of a row: the same word has the same colour in every picture."""
    return _NAMED.get(item, OKABE_ITO[position % len(OKABE_ITO)])


def account(account: Account, ax: Axes | None = None) -> Axes:
    """One horizontal bar, a segment per row, the residual hatched, the band as a whisker."""
    ax = _axes(ax, (7.0, 1.7))
    left = 0.0
    for position, (item, value) in enumerate(account.frame["value"].items()):
        share = account.share[item]
        ax.barh(0, value, left=left, color=colour(str(item), position), label=f"{item} {share:.1%}", height=0.6)
        left += value
    if account.residual:
        ax.barh(0, account.residual, left=left, color="white", edgecolor=GREY, hatch="///", height=0.6,
                label=f"residual {account.residual / account.total:+.1%}" if account.total else "residual")  # fmt: skip
    if account.low is not None and account.high is not None:
        ax.errorbar(account.total, 0, xerr=[[account.total - account.low], [account.high - account.total]],
                    color="black", capsize=5, label="band")  # fmt: skip
    ax.set_title(account.headline(), loc="left", fontsize=10)
    ax.set_yticks([])
    _unit_axis(ax, account.unit)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.35), ncols=4, frameon=False, fontsize=9)
    return ax


def plan(plan: Any, ax: Axes | None = None, *, num_batches: int = 12) -> Axes:
    """The first batches of a padding Plan side by side, one thin bar per row: real cells filled, padded ones pale."""
    ax = _axes(ax, (7.0, 2.6))
    lengths = plan.lengths["input_length"].to_numpy()
    position, ticks = 0, []
    for batch in range(min(num_batches, len(plan.batches))):
        rows = sorted((int(lengths[row].sum()) for row in plan.rows(batch)), reverse=True)
        spots = range(position, position + len(rows))
        ax.bar(
            spots,
            rows[0],
            width=1.0,
            color=_NAMED["padding"],
            alpha=0.45,
            label="padding" if batch == 0 else None,
        )
        ax.bar(spots, rows, width=1.0, color=_NAMED["real"], label="real" if batch == 0 else None)
        ticks.append(position + len(rows) / 2 - 0.5)
        position += len(rows) + max(1, len(rows) // 8)
    ax.set_xticks(ticks, [str(i) for i in range(len(ticks))])
    ax.set_xlabel("batch (one bar per row)")
    ax.set_ylabel("input cells")
    ax.set_ylim(0, 1.2 * ax.get_ylim()[1])  # room for the legend
    ax.set_title(
        f"{plan.strategy}: {plan.account().share['padding']:.0%} of the cells are padding",
        loc="left",
        fontsize=10,
    )
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    return ax


class Comparison:
    """Measured, predicted and receipt as bars under one another, in one figure that is drawn again and again.

    A new figure costs several times as much as moving the bars of an old one, and a slider cannot wait.
    """

    def __init__(self, base: Account) -> None:
        self._base = base
        self.figure = Figure(figsize=(7.4, 1.9))
        self._ax = self.figure.add_axes((0.155, 0.04, 0.84, 0.78))
        self._ax.set_ylim(-0.6, 2.6)
        self._ax.axis("off")
        self._items: dict[str, list[Rectangle]] = {}
        names = ("measured", "predicted", "measured here")
        self._labels = [
            self._ax.text(0, 2 - row, name, ha="right", va="center", fontsize=9) for row, name in enumerate(names)
        ]
        self._values = [self._ax.text(0, 2 - row, "", va="center", fontsize=9) for row in range(3)]
        (self._whisker,) = self._ax.plot([], [], color="black", marker="|", markersize=9, linewidth=1.5, zorder=4)
        self._outline = Rectangle((0, 0.65), 0, 0.7, fill=False, edgecolor="#D55E00", linestyle="--", linewidth=2)
        self._outline.set(hatch="//", zorder=3)  # a second sign beside the colour
        self._ax.add_patch(self._outline)
        self._shown: list[str] = []

    def svg(self, result: Account, receipt: Receipt | None, *, label: str) -> str:
        """The picture as an accessible ``<svg>`` element."""
        self._draw(result, receipt)
        out = io.StringIO()
        with mpl.rc_context(_SVG):
            self.figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
        markup = out.getvalue()
        markup = markup[markup.index("<svg") :]
        markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)  # it would style the whole page
        return markup.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)

    def png(self, result: Account, receipt: Receipt | None) -> bytes:
        """The picture for places without a browser."""
        self._draw(result, receipt)
        out = io.BytesIO()
        self.figure.savefig(out, format="png", dpi=110, facecolor="white", metadata={"Software": None})
        return out.getvalue()

    def _draw(self, result: Account, receipt: Receipt | None) -> None:
        bars = [self._base, result, receipt.measured if receipt else None]
        reach = max(max(bar.total, bar.high or 0) for bar in bars if bar is not None) or 1
        for row, bar in enumerate(bars):
            self._bar(row, bar)
        self._name()
        for row, bar in enumerate(bars):
            self._labels[row].set_visible(bar is not None)
            self._labels[row].set_position((-0.01 * reach, 2 - row))
            text = ""
            if bar is not None:
                text = readable(bar.total, bar.unit)
                if row == 1 and not bar.in_range:
                    text += "  outside the calibrated range"
                if row == 2 and receipt is not None:
                    text += f"  error {receipt.error:+.1%}"
            self._values[row].set_text(text)
            end = 0 if bar is None else max(bar.total, bar.high or 0)
            self._values[row].set_position((end + 0.012 * reach, 2 - row))
        if result.low is not None and result.high is not None:
            self._whisker.set_data([result.low, result.high], [1, 1])
        else:
            self._whisker.set_data([], [])
        self._outline.set_width(result.total)
        self._outline.set_visible(not result.in_range)
        self._ax.set_xlim(0, reach * 1.32)

    def _bar(self, row: int, bar: Account | None) -> None:
        values = {} if bar is None else {**bar.frame["value"], "residual": bar.residual}
        for item in values:
            if item not in self._items:
                self._add(str(item))
        left = 0.0
        for item, patches in self._items.items():
            width = max(0, int(values.get(item, 0)))
            patches[row].set_x(left)
            patches[row].set_width(width)
            patches[row].set_visible(width > 0)
            left += width

    def _add(self, item: str) -> None:
        shade = colour(item, len(self._items))
        self._items[item] = [Rectangle((0, 1.65 - row), 0, 0.7, color=shade, linewidth=0) for row in range(3)]
        for patch in self._items[item]:
            self._ax.add_patch(patch)

    def _name(self) -> None:
        """A legend of the rows that have a bar; made anew only when these change."""
        shown = [item for item, patches in self._items.items() if any(patch.get_width() for patch in patches)]
        if shown == self._shown:
            return
        self._shown = shown
        for old in self.figure.legends[:]:
            old.remove()
        self.figure.legend(
            [self._items[item][0] for item in shown], shown, loc="upper left", ncols=max(1, len(shown)),
            frameon=False, fontsize=9, bbox_to_anchor=(0.145, 1.03), handlelength=1.0,
        )  # fmt: skip


def _axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    if ax is not None:
        return ax
    from matplotlib import pyplot  # only to make the figure that a notebook shows

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def _unit_axis(ax: Axes, unit: str) -> None:
    ax.xaxis.set_major_formatter(lambda value, _: readable(value, unit).replace(f" {unit}", ""))
    ax.set_xlabel(unit if unit not in ("ns", "bytes") else "")
