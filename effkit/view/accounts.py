"""Pictures of accounts, alone or under one another on a page, and of padding plans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.transforms import ScaledTranslation

from effkit.account import Account
from effkit.view.style import GREY, NAMED, axes, colours, label, legend_columns, unit_axis

_COLUMNS = 3  # of a legend, at most
_LETTER_INCHES, _BESIDE_INCHES = 0.071, 0.42  # of a legend's column: each letter, and what is not letters
_BAR_INCHES, _AROUND_INCHES, _LINE_INCHES, _WIDTH_INCHES = 0.5, 0.66, 0.175, 7.6
_BELOW_POINTS = 24  # from the axis to its legend: room for the numbers at the ticks
_ROOM_FRAC = 0.06  # of a bar, which its share can be written on


def account(account: Account, ax: Axes | None = None) -> Axes:
    """One horizontal bar, a segment per row, the residual hatched, the band as a whisker."""
    names = [f"{label(item)} {share:.1%}" for item, share in account.share.items()]
    columns = legend_columns(names, 4)
    num_lines = math.ceil((len(names) + 1) / columns)
    ax = axes(ax, (7.0, 1.7 + 0.22 * max(0, num_lines - 3)), label(account.headline(), 120))
    left = 0.0
    shades = colours(list(account.frame.index))
    for name, (item, value) in zip(names, account.frame["value"].items(), strict=True):
        ax.barh(0, value, left=left, color=shades[str(item)], label=name, height=0.6)
        left += value
    if account.residual:
        face = "white" if account.residual > 0 else "none"  # a negative one lies over the last rows
        ax.barh(0, account.residual, left=left, color=face, edgecolor=GREY, hatch="///", height=0.6,
                label=f"residual {account.residual / account.total:+.1%}" if account.total else "residual")  # fmt: skip
    if account.low is not None and account.high is not None:
        ax.errorbar(account.total, 0, xerr=[[account.total - account.low], [account.high - account.total]],
                    color="black", capsize=5, label="band")  # fmt: skip
    ax.set_xlim(0, 1.05 * max(left, account.total, account.high or 0) or 1)  # rows may add up to more than the total
    ax.set_yticks([])
    unit_axis(ax.xaxis, account.unit)
    ax.spines["left"].set_visible(False)
    below = -0.62 if ax.get_xlabel() else -0.35
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, below), ncols=columns, frameon=False, fontsize=9)
    return ax


def plan(plan: Any, ax: Axes | None = None, *, num_batches: int = 12) -> Axes:
    """The first batches of a padding Plan side by side, one thin bar per row: real cells filled, padded ones pale."""
    padding = plan.account().share["padding"]
    ax = axes(ax, (7.0, 2.6), f"{plan.strategy}: {padding:.0%} of the cells are padding")
    lengths = plan.lengths["input_length"].to_numpy()
    position, ticks = 0, []
    for batch in range(min(num_batches, len(plan.batches))):
        rows = sorted((int(lengths[row].sum()) for row in plan.rows(batch)), reverse=True)
        spots = range(position, position + len(rows))
        ax.bar(spots, rows[0], width=1.0, color=NAMED["padding"], alpha=0.45, label=None if batch else "padding")
        ax.bar(spots, rows, width=1.0, color=NAMED["real"], label=None if batch else "real")
        ticks.append(position + len(rows) / 2 - 0.5)
        position += len(rows) + max(1, len(rows) // 8)
    ax.set_xticks(ticks, [str(i) for i in range(len(ticks))])
    reach = 1.2 * ax.get_ylim()[1]  # room for the legend
    ax.set(xlabel="batch (one bar per row)", ylabel="input cells", ylim=(0, reach))
    ax.legend(frameon=False, fontsize=9, loc="upper right", ncols=2)
    return ax


def page(accounts: Sequence[Account], axes: Sequence[Axes] | None = None) -> Sequence[Axes]:
    """Several accounts under one another, a bar and a legend each; returns the axes, one per account that was drawn.

    Those in ns and bytes are drawn, those of a single row only where there are no others; on ``axes``, one for each of
    them, or those of a new figure. ValueError when there is nothing to draw, or too few axes are given.
    """
    fitting = [account for account in accounts if account.unit in ("ns", "bytes")]
    shown = [account for account in fitting if len(account.frame) > 1] or fitting
    if not shown:
        raise ValueError("page() draws accounts in ns or bytes; given: none of these")
    if axes is None:
        from matplotlib import pyplot  # only to make the figure that a notebook shows

        lines = sum(math.ceil((len(a.frame) + bool(a.residual) + a.predicted) / _columns(a)) for a in shown)
        height = len(shown) * (_BAR_INCHES + _AROUND_INCHES) + _LINE_INCHES * lines  # lines of legends
        layout = ConstrainedLayoutEngine(h_pad=0.09, hspace=0.04)
        _, places = pyplot.subplots(len(shown), 1, figsize=(_WIDTH_INCHES, height), layout=layout, squeeze=False)
        axes = list(places[:, 0])
    if len(axes) < len(shown):
        raise ValueError(f"page() takes an axes for each of the {len(shown)} accounts; given: {len(axes)}")
    for one, ax in zip(shown, axes, strict=False):
        _on_page(one, ax)
    return list(axes[: len(shown)])


def _columns(account: Account) -> int:
    longest = max((len(f"{item} {share:.1%}") for item, share in account.share.items()), default=1)
    return max(1, min(_COLUMNS, int(_WIDTH_INCHES / (_LETTER_INCHES * longest + _BESIDE_INCHES))))


def _on_page(shown: Account, ax: Axes) -> None:
    """The usual picture of an account, with rows told apart and the legend at a fixed distance. The usual legend hangs
    a share of the axes' height below them: under one another, where the height is found by making room for legends,
    they would lie on each other."""
    account(shown, ax)
    for bars, share in zip(ax.containers, shown.share, strict=False):
        (bar,) = bars
        bar.set(edgecolor="white", linewidth=0.6)
        light = np.dot((0.299, 0.587, 0.114), bar.get_facecolor()[:3]) >= 0.55
        if share >= _ROOM_FRAC:
            ax.annotate(f"{share:.0%}", (bar.get_x() + bar.get_width() / 2, 0), ha="center", va="center", fontsize=9,
                        color="#111111" if light else "#FFFFFF")  # fmt: skip
    ax.set_ylim(-0.31, 0.31)
    ax.set_xlim(left=min(0, ax.get_xlim()[0]))
    ax.set_title(ax.get_title(loc="left"), loc="left", fontsize=10, fontweight="bold")
    ax.tick_params(axis="x", labelsize=9)
    below = ax.transAxes + ScaledTranslation(0, -_BELOW_POINTS / 72, ax.figure.dpi_scale_trans)
    ax.legend(loc="upper left", bbox_to_anchor=(0, 0), bbox_transform=below, borderaxespad=0, borderpad=0,
              ncols=_columns(shown), frameon=False, fontsize=8.5, handlelength=1.2, handleheight=0.9,
              columnspacing=1.4, labelspacing=0.35)  # fmt: skip
