"""Colours, axes and units that all pictures share."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any, Generic, TypeVarTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from effkit.units import has_own_steps, readable

Shown = TypeVarTuple("Shown")
# Okabe and Ito's palette: told apart with any colour vision. The first four suit stacked rows.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GREY = "#777777"
_LEGEND_LETTERS = 96  # in a line of a legend as wide as a picture
_ITEMS = {  # by colour: which items have it; those of one account have different ones
    "#0072B2": ("real", "parameter", "kernel", "experts", "encoder", "prefill", "arithmetic", "matrix products",
                "computing"),
    "#E69F00": ("padding", "saved activation", "dataloader", "self-attention", "copies"),
    "#56B4E9": ("step overhead", "optimizer state", "cpu exec", "gate", "draft", "attention"),
    "#CC79A7": ("waiting", "workspace", "waiting at the end", "output layer", "waiting for data", "data loading"),
    "#009E73": ("moving", "gradient", "memcpy", "dispatch moving", "feed-forward", "reading", "norms and softmax"),
    "#DDDDDD": ("residual",),
    "#BBBBBB": ("unknown", "not recorded", "not visible"),
    "#999999": ("buffer", "unpermute", "embedding and final norm", "host busy, device idle"),
    "#F0E442": ("input", "permute", "asking for numbers"),
    "#000000": ("offloaded activation", "compress"),
    "#D55E00": ("recomputed activation", "exposed communication", "combine moving", "sampling and host", "launches",
                "all-to-all moving"),
    "#EEEEEE": ("idle",),
    "#CFCFCF": ("host between operators", "host and idle"),
    "#A6DCCB": ("dispatch waiting", "norms and sums", "elementwise and other", "unsharded gradient"),
    "#F3C7A6": ("combine waiting", "before and after the steps", "recomputation", "all-to-all waiting"),
    "#7A5195": ("replicas moving", "verify", "optimizer", "other collectives moving", "communication buffer"),
    "#D3C2DE": ("replicas waiting", "clearing gradients", "other collectives waiting"),
    "#F0A3C8": ("handing over", "step not begun or over"),
    "#8CC4E6": ("cross-attention keys/values", "kernels without an operator", "gathered parameter"),
    "#F5CE7F": ("cross-attention", "activation"),
}  # fmt: skip
NAMED = {item: shade for shade, items in _ITEMS.items() for item in items}
# text stays text (a browser draws it, a test reads it) and equal pictures are equal bytes
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "effkit"}


def colour(item: str, position: int) -> str:
    """The colour of a row: the same word has the same colour in every picture."""
    return NAMED.get(item, OKABE_ITO[position % len(OKABE_ITO)])


def colours(items: Sequence[str]) -> dict[str, str]:
    """A colour for each row of one picture: the word's own, else the next of the palette that no other row has."""
    own = {NAMED.get(item) for item in items}
    free = itertools.cycle([shade for shade in OKABE_ITO if shade not in own] or OKABE_ITO)
    return {item: NAMED.get(item) or next(free) for item in items}


def svg(figure: Figure, *, label: str) -> str:
    """A figure as an accessible ``<svg>``, through which a light or dark page shows; black becomes its text colour."""
    out = io.StringIO()
    with mpl.rc_context(_SVG):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    markup = out.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)  # it would style the whole page
    markup = markup.replace("stroke: #000000", "stroke: currentColor")  # a black fill is written by saying none
    return markup.replace(
        "<svg", f'<svg role="img" fill="currentColor" aria-label="{html.escape(label, quote=True)}"', 1
    )


class Picture(Generic[*Shown]):
    """A figure that is drawn again and again: a subclass has ``_draw``, which takes what is to be shown."""

    def _draw(self, *shown: *Shown) -> Figure:
        raise NotImplementedError

    def svg(self, *shown: *Shown, label: str) -> str:
        """As an accessible ``<svg>`` element."""
        return svg(self._draw(*shown), label=label)

    def png(self, *shown: *Shown) -> bytes:
        """For places without a browser."""
        out = io.BytesIO()
        self._draw(*shown).savefig(out, format="png", dpi=110, facecolor="white", metadata={"Software": None})
        return out.getvalue()


def label(name: Any, most: int = 44) -> str:
    r"""A name from outside as a picture shows it: on one line of so many letters, and never a formula.

    >>> label(("a$b$", 1)), label("a kernel", most=6)
    ('a\\$b\\$ 1', 'a ke…el')
    """
    text = line(name)
    if len(text) > most:
        text = f"{text[: 2 * most // 3]}…{text[-(most // 3) :]}"  # kernels often differ at their end
    return text.replace("$", r"\$")


def line(name: Any) -> str:
    return " ".join(" ".join(map(str, name if isinstance(name, tuple) else [name])).split())


def axes(ax: Axes | None, size: tuple[float, float], title: str = "", *, framed: bool = False) -> Axes:
    """The axes given, or those of a new figure of that size [inches]; open above and at the right unless framed."""
    if ax is None:
        from matplotlib import pyplot  # only to make the figure that a notebook shows

        ax = pyplot.subplots(figsize=size, layout="constrained")[1]
    if not framed:
        ax.spines[["top", "right"]].set_visible(False)
    if title:
        ax.set_title(title, loc="left", fontsize=10)
    return ax


def legend_columns(names: Sequence[str], most: int) -> int:
    """As many columns as the width of a picture has room for: more would push its axes together."""
    longest = max((len(str(name)) for name in names), default=1)
    return max(1, min(most, _LEGEND_LETTERS // (longest + 6)))


def unit_axis(axis: Axis, unit: str) -> None:
    """An axis in the unit, as people read it: bytes in steps of a power of two. Call it when all is drawn."""
    stepped = has_own_steps(unit)  # then each tick says its unit, but for zero, which is the same in all
    axis.set_major_formatter(lambda value, _: readable(value, unit) if stepped and value else f"{value:,.10g}")
    reach = max(map(abs, axis.get_view_interval()))
    if unit == "bytes" and reach >= 1:
        axis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(reach / 6))))
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_label_text("" if stepped else unit)
