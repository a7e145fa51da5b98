"""page(): a study on one HTML page that needs nothing beside it: no script, no address, one file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from effkit.account import Account
from effkit.advice.levers import Advice
from effkit.advice.overviews import Overview
from effkit.device import provenance
from effkit.receipt import Receipt
from effkit.units import readable

_GOALS = {"time": "less time", "memory": "less memory", "cost": "less money"}
# What a drawing says of its maker and its dialect: inside of HTML nobody reads it, and it looks like addresses
_NAMES = re.compile(r"<metadata>.*?</metadata>| xmlns(?::\w+)?=\"[^\"]*\"", re.DOTALL)


def page(what: str, overview: Overview, receipts: Sequence[Receipt], advice: Advice) -> str:
    """The page as text: ``report.html.jinja`` in this folder, every text in it escaped."""
    pages = Environment(loader=PackageLoader("effkit", "advice"), autoescape=True, undefined=StrictUndefined,
                        trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    pages.filters |= {"readable": readable, "written": format, "width": _width}
    pages.tests["missing"] = pd.isna
    here = provenance()
    threads = f"{here.get('num_threads', 0)} thread{'s' * (here.get('num_threads', 0) > 1)}"
    versions = [threads, f"torch {here['torch']}"] if "torch" in here else []
    return pages.get_template("report.html.jinja").render(
        title=what[:1].upper() + what[1:],
        style=Markup(resources.files("effkit.advice").joinpath("report.css").read_text(encoding="utf-8")),
        here=", ".join([f"{here['date']} on {here['device']}", *versions]),
        overview=overview,
        picture=_picture(overview),
        advice=advice,
        goal=_GOALS.get(advice.goal, advice.goal),
        together=_together(advice),
        saved=_saved,
        receipts=receipts,
        where="; ".join(dict.fromkeys(_where(receipt) for receipt in receipts if receipt.provenance)),
        zip=zip,
    )


def _picture(overview: Overview) -> Markup:
    """The accounts as bars; what they say is in the alternative text, and in the tables below."""
    shown = [account for account in overview.accounts if account.unit in ("ns", "bytes")]
    if not shown:
        return Markup()
    from matplotlib import pyplot

    from effkit import view
    from effkit.view.style import svg

    figure = view.page(shown)[0].get_figure(root=True)
    assert figure is not None, "axes are on a figure"
    label = ". ".join(map(_in_words, shown))
    try:
        drawn = svg(figure, label=label)
    finally:
        pyplot.close(figure)
    return Markup(_NAMES.sub("", drawn).replace("xlink:href", "href"))


def _in_words(account: Account) -> str:
    rows = ", ".join(f"{item} {share:.0%}" for item, share in account.share.items() if share >= 0.005)
    return f"{account.headline()}: {rows}"


def _width(share: str) -> str:
    """Of a bar, as wide as its share in words."""
    return f"{max(0.0, min(100.0, float(share.replace(',', '').rstrip('%')))):.1f}%"


def _together(advice: Advice) -> str:
    words = "each is predicted; of those that address one problem the best alone counts"
    if not advice.num_steps:
        return words
    many = f" on {advice.num_devices:,} devices" if advice.num_devices > 1 else ""
    price = f", at {advice.price_per_hour:,.2f} an hour" if advice.price_per_hour is not None else ""
    return f"{words}; over {advice.num_steps:,} steps{many}{price}, each of them alone"


def _saved(row: pd.Series[Any]) -> list[str]:
    """Over the whole run, a line each."""
    return [f"{row['gpu_hours']:,.1f} GPU-hours", *([f"{row['money']:,.2f}"] if "money" in row else [])]


def _where(receipt: Receipt) -> str:
    words = {"date": "{}", "device": "{}", "torch": "torch {}"}
    return ", ".join(word.format(fact) for name, word in words.items() if (fact := receipt.provenance.get(name)))
