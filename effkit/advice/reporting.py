"""write(): a study on one HTML page that needs nothing beside it: no script, no address, one file."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from effkit.account import Account, readable
from effkit.advice.levers import Advice, Lever
from effkit.advice.overviews import Overview
from effkit.device import provenance
from effkit.receipt import Receipt
from effkit.whole_files import replacing

if TYPE_CHECKING:
    from effkit.advice.studies import Study

_STYLE = "report.css"
_NOTHING_TO_MEASURE = "No lever was measured: there is none here that could be run."
# What a drawing says of its maker and its dialect: inside of HTML nobody reads it, and it looks like addresses
_NAMES = re.compile(r"<metadata>.*?</metadata>| xmlns(?::\w+)?=\"[^\"]*\"", re.DOTALL)
_NOT_MEASURED = "No lever was measured: advice[0].measure() runs one, and its receipt is shown here from then on."


def write(study: Study, path: Path, advice: Advice) -> Path:
    """Write the page; whole, or not at all.

    Parameters
    ----------
    study
        Whose overview and receipts are shown.
    path
        Where to: a file in a folder that exists.
    advice
        To show.

    Raises
    ------
    FileNotFoundError, IsADirectoryError
        When the folder is absent, or the path is one.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of the file to write, {path / 'report.html'} say")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it, or give another path")
    text = page(study, advice)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def page(study: Study, advice: Advice) -> str:
    """The page as text."""
    overview = study.overview()
    title = study.what[:1].upper() + study.what[1:]
    sections = [
        _header(title, overview, advice),
        _section("What was found", _sentences(overview.found)),
        _section("Where it goes", _picture(overview) + "".join(map(_account, overview.accounts))),
        _section("How near to this device’s ceilings", _ceilings(overview)),
        _section(f"What would help: {_goal(advice)}", _advice(advice)),
        _section("Receipts: predicted, then measured", _receipts(study.receipts, advice)),
        _section("What was not visible", _sentences(overview.unseen, "unseen")),
    ]
    style = resources.files("effkit.advice").joinpath(_STYLE).read_text(encoding="utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_text(title)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(filter(None, sections))
        + "\n</main>\n</body>\n</html>\n"
    )


def _text(value: object) -> str:
    return html.escape(str(value), quote=True)


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{_text(title)}</h2>\n{body}\n</section>" if body else ""


def _header(title: str, overview: Overview, advice: Advice) -> str:
    here = provenance()
    threads = f"{here['num_threads']} thread{'s' if here['num_threads'] > 1 else ''}"
    facts = f"{here['date']} on {here['device']}, {threads}, torch {here['torch']}"
    tiles = [(readable(one.total, one.unit), one.title) for one in overview.accounts[:3]]
    if advice.levers:
        tiles.append((f"−{advice.together:.0%}", f"predicted, all advice for {advice.goal} together"))
    shown = "".join(f"<li><b>{_text(value)}</b><span>{_text(what)}</span></li>" for value, what in tiles)
    return (
        f'<header>\n<h1>{_text(title)}</h1>\n<p class="facts">Written {_text(facts)}</p>\n'
        f'<ul class="tiles">{shown}</ul>\n</header>'
    )


def _sentences(sentences: Sequence[str], name: str = "found") -> str:
    items = "".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<ul class="{name}">{items}</ul>' if items else ""


def _picture(overview: Overview) -> str:
    """The accounts as bars; what they say is in the alternative text, and in the tables below."""
    shown = [one for one in overview.accounts if one.unit in ("ns", "bytes")]
    if not shown:
        return ""
    from matplotlib import pyplot

    from effkit import view
    from effkit.view.style import svg

    figure = view.page(shown)[0].get_figure(root=True)
    assert figure is not None, "axes are on a figure"
    for patch in (figure.patch, *(ax.patch for ax in figure.axes)):
        patch.set_alpha(0)  # light or dark, the page shows through
    label = ". ".join(_in_words(one) for one in shown)
    try:
        drawn = svg(figure, label=label)
    finally:
        pyplot.close(figure)
    drawn = _NAMES.sub("", drawn).replace("xlink:href", "href")
    return f'<div class="picture">{drawn.replace("stroke: #000000", "stroke: currentColor")}</div>'


def _in_words(one: Account) -> str:
    rows = ", ".join(f"{item} {share:.0%}" for item, share in one.share.items() if share >= 0.005)
    return f"{one.headline()}: {rows}"


def _table(caption: str, heads: Sequence[str], rows: Iterable[Sequence[str]], name: str) -> str:
    """Cells are HTML already; on a narrow screen each stands under its own head."""
    head = "".join(f'<th scope="col">{_text(one)}</th>' for one in heads)
    body = "".join(
        "<tr>" + "".join(f'<td data-head="{_text(title)}">{cell}</td>' for title, cell in zip(heads, row, strict=True))
        + "</tr>\n"
        for row in rows
    )  # fmt: skip
    shown = f"<caption>{caption}</caption>" if caption else ""
    return f'<table class="{name}">{shown}<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table>'


def _account(one: Account) -> str:
    rows = [[f'<span class="item">{_text(item)}</span>', _text(amount), _bar(share), _text(share), _text(basis or "–")]
            for item, amount, share, basis in one._lines()]  # fmt: skip
    caption = f"{_text(one.headline())}<small>total from {_text(one.source)}</small>"
    return _table(caption, ("item", "amount", "", "share", "basis"), rows, "account")


def _bar(share: str) -> str:
    width = max(0.0, min(100.0, float(share.replace(",", "").rstrip("%"))))
    return f'<span class="bar" style="width:{width:.1f}%"></span>'


def _ceilings(overview: Overview) -> str:
    rows = [
        [f'<span class="item">{_text(name)}</span>', f"{row['reached_frac']:.1%}", _text(row["ceiling_text"]),
         _text(row["definition"])]
        for name, row in overview.ceilings.iterrows()
    ]  # fmt: skip
    return _table("", ("of", "reached", "ceiling", "definition"), rows, "ceilings") if rows else ""


def _goal(advice: Advice) -> str:
    return {"time": "less time", "memory": "less memory", "cost": "less money"}.get(advice.goal, advice.goal)


def _advice(advice: Advice) -> str:
    notes = "".join(f'<p class="note">{_text(note)}</p>' for note in advice.notes)
    if not advice.levers:
        return f"<p>Nothing here is predicted to help.</p>{notes}{_rejected(advice)}"
    frame = advice.frame
    rows = []
    for number, (lever, (_, row)) in enumerate(zip(advice.levers, frame.iterrows(), strict=True), 1):
        cells = [
            str(number), f'<span class="item">{_text(lever.name)}</span><br>{_text(lever.found)}',
            f"{_amount(lever.base, lever.base.total)} → {_amount(lever.base, lever.predicted.total)}"
            + ("" if lever.predicted.in_range else '<br><em class="beyond">beyond what was calibrated</em>'),
            f"<b>{lever.gain_frac:.0%}</b>", _band(lever), f"{row['after_those_above']:.0%}",
            "<br>".join(map(_text, lever.side_effects)) or "–",
        ]  # fmt: skip
        if "gpu_hours" in frame:
            cells.append(_saved(row))
        rows.append(cells)
    heads = ["", "lever", "predicted", "saves", "band", "after those above", "but"]
    table = _table(_together(advice), [*heads, *(["over the run"] if "gpu_hours" in frame else [])], rows, "advice")
    return f"{table}{notes}<h3>To paste</h3>{''.join(map(_code, advice.levers))}{_rejected(advice)}"


def _together(advice: Advice) -> str:
    words = "each is predicted; of those that address one problem the best alone counts"
    if advice.num_steps:
        many = f" on {advice.num_devices:,} devices" if advice.num_devices > 1 else ""
        price = f", at {advice.price_per_hour:,.2f} an hour" if advice.price_per_hour is not None else ""
        words += f"; over {advice.num_steps:,} steps{many}{price}, each of them alone"
    return f"Together {advice.together:.0%} less<small>{words}</small>"


def _amount(base: Account, value: int) -> str:
    return _text(readable(value, base.unit))


def _band(lever: Lever) -> str:
    least, most = lever.gain_band
    return f"{least:.0%} to {most:.0%}"


def _saved(row: pd.Series[Any]) -> str:
    if pd.isna(row["gpu_hours"]):
        return "–"
    money = row.get("money")
    return f"{row['gpu_hours']:,.1f} GPU-hours" + ("" if money is None or pd.isna(money) else f"<br>{money:,.2f}")


def _code(lever: Lever) -> str:
    return f"<figure><figcaption>{_text(lever.name)}</figcaption><pre><code>{_text(lever.code)}</code></pre></figure>"


def _rejected(advice: Advice) -> str:
    if not advice.rejected:
        return ""
    items = "".join(
        f"<li>{_text(lever.name)}: {lever.gain_frac:+.0%} ({_band(lever)}); {_text(lever.found)}</li>"
        for lever in advice.rejected
    )
    return f"<details><summary>Looked at, and not suggested: {len(advice.rejected)}</summary><ul>{items}</ul></details>"


def _receipts(receipts: Sequence[Receipt], advice: Advice) -> str:
    if not receipts:
        live = any(lever.run is not None for lever in advice.levers)
        return f'<p class="note">{_NOT_MEASURED if live else _NOTHING_TO_MEASURE}</p>'
    rows = [
        [f'<span class="item">{_text(receipt.setting.get("lever", quantity))}</span><br>{_text(quantity)}',
         _text(readable(row["predicted"], row["unit"])), _between(row),
         _text(readable(row["measured"], row["unit"])), f"<b>{row['error']:+.1%}</b>", _verdict(row)]
        for receipt in receipts for quantity, row in receipt.frame.iterrows()
    ]  # fmt: skip
    where = "; ".join(dict.fromkeys(_where(receipt) for receipt in receipts if receipt.provenance))
    caption = f"The error is predicted / measured − 1<small>{_text(where)}</small>"
    return _table(caption, ("lever", "predicted", "band", "measured", "error", "inside the band"), rows, "receipts")


def _between(row: pd.Series[Any]) -> str:
    if pd.isna(row["low"]):
        return "none"
    return _text(" to ".join(readable(row[end], row["unit"]) for end in ("low", "high")))


def _verdict(row: pd.Series[Any]) -> str:
    inside, in_range = (bool(row[name]) for name in ("within_band", "in_range"))
    word = '<span class="yes">✓ yes</span>' if inside else '<span class="no">✗ no</span>'
    return word if in_range else f'{word}<br><em class="beyond">beyond what was calibrated</em>'


def _where(receipt: Receipt) -> str:
    p = receipt.provenance
    facts = [str(p[name]) for name in ("date", "device") if p.get(name)]
    return ", ".join([*facts, *([f"torch {p['torch']}"] if p.get("torch") else [])])
