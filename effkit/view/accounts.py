"""Pictures of accounts and of padding plans."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.axes import Axes

from effkit.account import Account
from effkit.view.style import GREY, NAMED, axes, colours, label, legend_columns, unit_axis


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
