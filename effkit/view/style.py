"""Colours, axes and units that all pictures share."""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, MultipleLocator

from effkit.units import has_own_steps, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's palette: told apart with any colour vision. The first four suit stacked rows.
OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
GREY = "#777777"
_LEGEND_LETTERS = 96  # in a line of a legend as wide as a picture
NAMED = {
    "real": "#0072B2",
    "padding": "#E69F00",
    "step overhead": "#56B4E9",
    "waiting": "#CC79A7",
    "moving": "#009E73",
    "residual": "#DDDDDD",
    "unknown": "#BBBBBB",
    "not recorded": "#BBBBBB",
    "parameter": "#0072B2",
    "optimizer state": "#56B4E9",
    "buffer": "#999999",
    "input": "#F0E442",
    "gradient": "#009E73",
    "saved activation": "#E69F00",
    "offloaded activation": "#000000",
    "recomputed activation": "#D55E00",
    "workspace": "#CC79A7",
    "kernel": "#0072B2",
    "exposed communication": "#D55E00",
    "memcpy": "#009E73",
    "dataloader": "#E69F00",
    "not visible": "#BBBBBB",
    "cpu exec": "#56B4E9",
    "idle": "#EEEEEE",
    "gate": "#56B4E9",
    "permute": "#F0E442",
    "compress": "#000000",
    "experts": "#0072B2",
    "unpermute": "#999999",
    "dispatch moving": "#009E73",
    "dispatch waiting": "#A6DCCB",
    "combine moving": "#D55E00",
    "combine waiting": "#F3C7A6",
    "replicas moving": "#7A5195",
    "replicas waiting": "#D3C2DE",
    "waiting at the end": "#CC79A7",
    "handing over": "#F0A3C8",
    "encoder": "#0072B2",
    "cross-attention keys/values": "#8CC4E6",
    "prefill": "#0072B2",
    "self-attention": "#E69F00",
    "cross-attention": "#F5CE7F",
    "feed-forward": "#009E73",
    "norms and sums": "#A6DCCB",
    "embedding and final norm": "#999999",
    "output layer": "#CC79A7",
    "sampling and host": "#D55E00",
    "before and after the steps": "#F3C7A6",
    "draft": "#56B4E9",
    "verify": "#7A5195",
    "launches": "#D55E00",
    "reading": "#009E73",
    "arithmetic": "#0072B2",
}
# text stays text (a browser draws it, a test reads it) and equal pictures are equal bytes
_SVG: Any = {"svg.fonttype": "none", "svg.hashsalt": "effkit"}


def colour(item: str, position: int) -> str:
    """The colour of a row: the same word has the same colour in every picture."""
    return NAMED.get(item, OKABE_ITO[position % len(OKABE_ITO)])


def svg(figure: Figure, *, label: str) -> str:
    """A figure as an accessible ``<svg>`` element."""
    out = io.StringIO()
    with mpl.rc_context(_SVG):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    markup = out.getvalue()
    markup = markup[markup.index("<svg") :]
    markup = re.sub(r"<style.*?</style>", "", markup, flags=re.DOTALL)  # it would style the whole page
    return markup.replace("<svg", f'<svg role="img" aria-label="{html.escape(label, quote=True)}"', 1)


def png(figure: Figure) -> bytes:
    """A figure for places without a browser."""
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110, facecolor="white", metadata={"Software": None})
    return out.getvalue()


def axes(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The axes given, or those of a new figure of that size [inches]."""
    if ax is not None:
        return ax
    from matplotlib import pyplot  # only to make the figure that a notebook shows

    return pyplot.subplots(figsize=size, layout="constrained")[1]


def legend_columns(names: Sequence[str], most: int) -> int:
    """As many columns as the width of a picture has room for: more would push its axes together."""
    longest = max((len(str(name)) for name in names), default=1)
    return max(1, min(most, _LEGEND_LETTERS // (longest + 6)))


def unit_axis(axis: Axis, unit: str) -> None:
    """An axis in the unit, as people read it: bytes in steps of a power of two. Call it when all is drawn."""
    axis.set_major_formatter(lambda value, _: readable(value, unit).replace(f" {unit}", ""))
    reach = max(map(abs, axis.get_view_interval()))
    if unit == "bytes" and reach >= 1:
        axis.set_major_locator(MultipleLocator(2.0 ** math.ceil(math.log2(reach / 6))))
    else:
        axis.set_major_locator(MaxNLocator(6))
    axis.set_label_text("" if has_own_steps(unit) else unit)
