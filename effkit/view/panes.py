"""Pictures of the panes of a Capture."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from effkit.account import Account
from effkit.units import readable
from effkit.view import accounts
from effkit.view.style import GREY, NAMED, OKABE_ITO, Picture, axes, colour, label, line, unit_axis

_MOST_BARS = 12
_LONGEST_NAME, _LONGEST_TITLE = 44, 90
_WORTH_NAMING = 0.005
_MS = "ms", 10**6  # an axis of times in ns
_PARTS = {f"{word.replace(' ', '_')}_ns": word for word in (
    "kernel", "exposed communication", "memcpy", "dataloader", "not visible", "cpu exec", "idle")}  # fmt: skip


def overview(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """One bar per step (per rank, where there are several), split into where its wall time goes."""
    ranks = frame.index.get_level_values("rank")
    means = ranks.nunique() > 1
    bars = frame.groupby("rank").mean(numeric_only=True) if means else frame.droplevel("rank")
    if not bars["dur_ns"].sum():
        return _nothing(ax, "no step was recorded")
    bars = bars.sort_values("dur_ns", ascending=False, kind="stable").head(_MOST_BARS).sort_index()
    ax = axes(ax, (7.4, 1.3 + 0.3 * len(bars)), f"Where the time of a step goes{', on average' if means else ''}")
    left = pd.Series(0.0, bars.index)
    names = [f"{'rank' if means else 'step'} {number}" for number in bars.index]
    for name in bars.columns.intersection(list(_PARTS), sort=False):
        word, width = _PARTS[name], bars[name].astype("float64").fillna(0.0)
        if width.sum() <= 0:
            continue
        share = width.sum() / bars["dur_ns"].sum()
        said = f"{word} {share:.0%}" if share >= _WORTH_NAMING else None
        ax.barh(names, width, left=left, color=NAMED[word], hatch="//" if word == "not visible" else None,
                edgecolor="white", linewidth=0.5, height=0.7, label=said)  # fmt: skip
        left += width
    ax.invert_yaxis()
    unit_axis(ax.xaxis, "ns")
    _legend_below(ax, len(bars))
    return ax


def operators(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The operators that take the most time of their own: on the device where it was recorded, else on the host."""
    if frame.empty:
        return _nothing(ax, "no operator was recorded")
    where = "device" if frame["device_self_ns"].notna().any() else "host"
    return _top(frame[f"{where}_self_ns"], f"Self time of operators on the {where}", ax)


def kernels(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The kernels that take the most time; those that use tensor cores, by their name, are marked."""
    if frame.empty:
        return _nothing(ax, "no kernel was recorded")
    ax = _top(frame["total_ns"], "Time of kernels", ax)
    uses = frame.sort_values("total_ns", ascending=False, kind="stable").head(_MOST_BARS)["tensor_cores"].fillna(False)
    marked = [bar for bar, used in zip(ax.patches, uses, strict=False) if used]
    for bar in marked:
        bar.set_color(NAMED["moving"])
    if marked:
        ax.legend(marked[:1], ["tensor cores, by its name"], frameon=False, fontsize=9, loc="lower right")
    return ax


def _labels(names: Sequence[Any], most: int = 44) -> list[str]:
    """The same of several names, told apart also where these differ in their middle alone."""
    texts = list(map(line, names))
    first = [label(text, most) for text in texts]
    short = first.copy()
    for number, text in enumerate(texts):
        alike = [other for other, one in zip(texts, first, strict=True) if one == first[number] and other != text]
        if alike:  # begin before the first letter in which it differs from the one that is most like it
            start = max(len(os.path.commonprefix([text, other])) for other in alike) - most // 6  # noqa: RUF071 of letters
            short[number] = label(f"{text[: most // 4]}…{text[max(start, most // 4) :]}", most)
    return [f"{one} ({number + 1})" if short.count(one) > 1 else one for number, one in enumerate(short)]


def _legend_below(ax: Axes, num_bars: int) -> None:
    below = -0.3 / (0.5 + 0.2 * num_bars)
    ax.legend(loc="upper center", bbox_to_anchor=(0.45, below), ncols=4, frameon=False, fontsize=9)


def _nothing(ax: Axes | None, words: str) -> Axes:
    ax = axes(ax, (7.4, 0.8), words)
    ax.axis("off")
    return ax


def _top(times: pd.Series[Any], title: str, ax: Axes | None, unit: str = "ns") -> Axes:
    shown = times.astype("Float64").fillna(0.0).sort_values(ascending=False, kind="stable").head(_MOST_BARS)
    total = float(times.sum()) or 1.0
    said = f"{label(title, _LONGEST_TITLE)}: {readable(total, unit)}"
    ax = axes(ax, (7.4, 0.9 + 0.24 * len(shown)), said)
    places = range(len(shown))
    bars = ax.barh(places, shown.astype("float64"), color=NAMED["real"], height=0.7)
    ax.bar_label(bars, [f" {value / total:.0%}" for value in shown], fontsize=8, color=GREY)
    ax.set_yticks(places, _labels(list(shown.index), _LONGEST_NAME), fontsize=8)
    ax.invert_yaxis()
    unit_axis(ax.xaxis, unit)
    return ax


def communication(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Per kind of collective waiting for the slowest rank, then moving bytes; grey where these are not told apart."""
    if frame.empty:
        return _nothing(ax, "no collective was recorded")
    frame = frame.head(_MOST_BARS)
    ax = axes(ax, (7.4, 1.3 + 0.4 * len(frame)), "Communication, summed over ranks")
    names = range(len(frame))
    waiting, moving, total = (frame[column].astype("Float64").fillna(0.0).astype("float64")
                              for column in ("waiting_ns", "moving_ns", "dur_ns"))  # fmt: skip
    if (waiting + moving).any():
        ax.barh(names, waiting, color=NAMED["waiting"], label="waiting", height=0.6)
        ax.barh(names, moving, left=waiting, color=NAMED["moving"], label="moving", height=0.6)
    if (unknown := total - waiting - moving).sum() > 0:
        ax.barh(names, unknown, left=waiting + moving, color=NAMED["not visible"], hatch="//", edgecolor="white",
                label="not told apart: one rank only", height=0.6)  # fmt: skip
    for place, (end, size) in enumerate(zip(total, frame["size_bytes"], strict=True)):
        words = "bytes not visible" if pd.isna(size) else readable(int(size), "bytes")
        ax.text(end, place, f" {words}", va="center", fontsize=8, color=GREY)
    ax.margins(x=0.18)
    texts = [f"{collective} ({backend or 'other'})" for backend, collective, *_ in frame.index]
    ax.set_yticks(names, _labels(texts, _LONGEST_NAME))
    ax.invert_yaxis()
    unit_axis(ax.xaxis, "ns")
    _legend_below(ax, len(frame))
    return ax


def rank_pairs(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Who sends how many bytes to whom in the all-to-alls."""
    table = frame.pivot_table(index="sender", columns="receiver", values="size_bytes", aggfunc="sum")
    if table.empty:
        return _nothing(ax, "no all-to-all whose bytes were recorded")
    rows, columns = (min(7.0, 1.6 + 0.35 * side) for side in table.shape)
    assumed = ", equal shares assumed" if (frame["basis"] == "assumed").any() else ""
    ax = axes(ax, (columns + 1.2, rows), f"Bytes of all-to-alls{assumed}", framed=True)
    picture = ax.imshow(table.to_numpy("float64"), cmap="cividis", vmin=0, aspect="auto")
    ax.set_xticks(range(table.shape[1]), [str(rank) for rank in table.columns])
    ax.set_yticks(range(table.shape[0]), [str(rank) for rank in table.index])
    ax.set(xlabel="receiving rank", ylabel="sending rank")
    unit_axis(ax.figure.colorbar(picture, ax=ax).ax.yaxis, "bytes")
    return ax


def memory_timeline(frame: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """How full the memory was over time; reserved memory as a line above, where it was recorded."""
    if frame.empty:
        return _nothing(ax, "nothing came or went while memory was recorded: memory() says what was there")
    ax = axes(ax, (7.4, 2.4), f"Allocated memory, peak {readable(int(frame['allocated_bytes'].max()), 'bytes')}")
    start, length = frame["time_ns"].min(), np.ptp(frame["time_ns"])
    word, unit = frame.attrs.get("axis", _MS)
    for position, (device, rows) in enumerate(frame.groupby("device")):
        # the last level has no end of its own
        rows = pd.concat([rows, rows.tail(1).assign(time_ns=start + length + max(1, length // 50))])
        times = (rows["time_ns"] - start) / unit
        ax.fill_between(times, rows["allocated_bytes"], step="post", color=colour(str(device), position), alpha=0.7,
                        linewidth=0, label=f"allocated on {label(device)}")  # fmt: skip
        if rows["reserved_bytes"].notna().any():
            reserved = rows["reserved_bytes"].to_numpy("float64", na_value=float("nan"))
            ax.step(times, reserved, where="post", color="black", linewidth=1, linestyle="--",
                    label=f"reserved on {label(device)}")  # fmt: skip
    ax.set_ylim(bottom=0)
    unit_axis(ax.yaxis, "bytes")
    ax.set_xlabel(word)
    ax.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)
    return ax


def memory(account: Account, ax: Axes | None = None) -> Axes:
    """The account at the peak: one bar, or a bar for each row where these have long names."""
    if account.frame.index.str.len().max() > _LONGEST_NAME // 2:
        return _top(account.frame["value"], account.title, ax, account.unit)
    return accounts.account(account, ax)


PANES: Mapping[str, Callable[..., Axes]] = {
    "overview": overview, "operators": operators, "kernels": kernels, "communication": communication,
    "rank_pairs": rank_pairs, "memory": memory, "memory_timeline": memory_timeline,
}  # fmt: skip


class MemoryPicture(Picture[Account, int]):
    """A timeline with a mark that is moved again and again, and who holds the memory at that moment."""

    def __init__(self, timeline: pd.DataFrame) -> None:
        self.figure = Figure(figsize=(7.4, 3.6))
        self._start_ns, self._unit = int(timeline["time_ns"].min()), timeline.attrs.get("axis", _MS)[1]
        upper, self._lower = self.figure.subplots(2, 1, height_ratios=(3, 2))
        memory_timeline(timeline, upper)
        self._mark = upper.axvline(0, color=OKABE_ITO[5], linewidth=2)
        self.figure.subplots_adjust(left=0.12, right=0.98, top=0.93, bottom=0.04, hspace=0.45)

    def _draw(self, account: Account, time_ns: int) -> Figure:
        moment = (time_ns - self._start_ns) / self._unit
        self._mark.set_xdata([moment, moment])
        self._lower.clear()
        self._lower.axis("off")
        left = 0.0
        for position, (item, value) in enumerate(account.frame["value"].items()):
            self._lower.barh(0, value, left=left, color=OKABE_ITO[position % len(OKABE_ITO)], height=0.5,
                             label=f"{label(item)} {readable(int(value), 'bytes')}")  # fmt: skip
            left += value
        self._lower.set_ylim(-3.2, 0.4)
        self._lower.legend(loc="upper left", bbox_to_anchor=(0, 0.75), ncols=2, frameon=False, fontsize=8)
        return self.figure
