"""Receipt: a prediction beside the measurement of the same setting, and the error ledger that receipts go into."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from effkit import markup, whole_files
from effkit.account import Account
from effkit.arguments import described
from effkit.records import Record, named
from effkit.units import readable

LEDGER_COLUMNS = (
    "lab", "model", "knob", "setting", "quantity", "unit",
    "predicted", "low", "high", "measured", "error", "in_range", "provenance",
)  # fmt: skip
_HEADS = ("predicted", "band", "measured", "error", "within band")
_TABLE = ' style="border-collapse:collapse;font-variant-numeric:tabular-nums;line-height:1.35;width:100%"'
_QUANTITY = ' style="text-align:left;font-weight:normal;padding:1px 0"'
_FIGURE = ' style="text-align:right;white-space:nowrap;font-weight:normal;padding:1px 0 1px 18px"'


@dataclass(frozen=True, eq=False)
class Receipt(Record):
    """A prediction beside the measurement of the same setting.

    Parameters
    ----------
    predicted, measured
        Two Accounts of the same unit. Companions are matched by title.
    setting
        What was predicted and then run.
    provenance
        Device, torch version, date.

    Examples
    --------
    >>> guess = Account.of("Steps", "steps", {"steps": 11}, total=11, source="plan", low=10, high=12)
    >>> truth = Account.of("Steps", "steps", {"steps": 10}, total=10, source="loop counter")
    >>> receipt = Receipt(guess, truth)
    >>> round(receipt.error, 3), receipt.within_band
    (0.1, True)
    """

    predicted: Account
    measured: Account
    setting: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if wrong := [one for one in (self.predicted, self.measured) if not isinstance(one, Account)]:
            raise TypeError(f"a receipt takes two Accounts, predicted and measured; given: {described(wrong[0])}")
        if self.predicted.unit != self.measured.unit:
            units = f"{self.predicted.unit} and {self.measured.unit}"
            raise ValueError(f"a receipt compares like with like; given: {units}")

    @property
    def error(self) -> float:
        """Signed error of the prediction as a fraction: predicted / measured - 1. Positive: predicted too much."""
        return _error(self.predicted.total, self.measured.total)

    @property
    def within_band(self) -> bool:
        """True when the measured total lies in the predicted band."""
        return _within(self.predicted, self.measured)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per quantity: predicted, low, high, measured [unit], error (signed fraction), and two verdicts."""
        rows = [
            {"quantity": guess.title, "unit": guess.unit, "predicted": guess.total, "low": guess.low,
             "high": guess.high, "measured": truth.total, "error": _error(guess.total, truth.total),
             "within_band": _within(guess, truth), "in_range": guess.in_range}
            for guess, truth in self._pairs()
        ]  # fmt: skip
        return pd.DataFrame(rows).set_index("quantity").astype({"low": "Int64", "high": "Int64"})

    def _pairs(self) -> Iterable[tuple[Account, Account]]:
        yield self.predicted, self.measured
        truths = {account.title: account for account in self.measured.companions}
        for guess in self.predicted.companions:
            if guess.title in truths:
                yield guess, truths[guess.title]

    def append_to(self, path: str | Path, *, lab: str, model: str, knob: str) -> None:
        """Append one line per quantity to an error ledger (CSV), which is created with a header if absent.

        All of them are written, or none. ValueError when the file exists and its header is not a ledger's: nothing is
        written.
        """
        path = Path(path)
        content = path.read_bytes() if path.exists() else None
        if content is not None:
            header = content.partition(b"\n")[0].decode("utf-8", errors="replace").strip()
            if header != ",".join(LEDGER_COLUMNS):
                first = repr(header[:80])
                raise ValueError(f"{path} is not an error ledger: its first line is {first}. Choose another file")
        setting, provenance = (json.dumps(dict(facts), sort_keys=True, default=str)
                               for facts in (self.setting, self.provenance))  # fmt: skip
        table = self.frame.reset_index().assign(lab=lab, model=model, knob=knob, setting=setting, provenance=provenance)
        table["error"] = table["error"].map("{:.6f}".format)
        text = table[[*LEDGER_COLUMNS]].to_csv(index=False, header=content is None, lineterminator="\n")
        path.parent.mkdir(parents=True, exist_ok=True)
        between = b"" if content is None or content.endswith(b"\n") else b"\n"
        whole_files.append(path, between + text.encode())

    def to_markdown(self) -> str:
        """A table with a row per quantity: predicted, band, measured, error, and whether it lay in the band."""
        rows = [[guess.title, *_cells(guess, truth)] for guess, truth in self._pairs()]
        return markup.markdown(["quantity", *_HEADS], rows)

    def _plain(self) -> dict[str, Any]:
        return {"predicted": self.predicted, "measured": self.measured, "error": self.error,
                "within_band": self.within_band, "setting": self.setting, "provenance": self.provenance}  # fmt: skip

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Receipt:
        return cls(
            Account.from_dict(data["predicted"]), Account.from_dict(data["measured"]),
            dict(data["setting"]), dict(data["provenance"]),
        )  # fmt: skip

    def _scalars(self) -> Iterator[tuple[str, float]]:
        for quantity, row in self.frame.iterrows():
            for name in ("predicted", "measured"):
                yield f"receipt/{named(quantity, name, row['unit'])}", float(row[name])
            yield f"receipt/{named(quantity)}_error_frac", float(row["error"])

    def sentence(self) -> str:
        """The receipt of the main quantity in one sentence."""
        guess = self.predicted
        verdict = "inside the band" if self.within_band else "outside the band" if guess.predicted else "no band given"
        tail = "" if guess.in_range else "; the prediction had gone beyond its calibrated range"
        return f"Receipt: {_beside(guess, self.measured)}, {verdict}{tail}."

    def __repr__(self) -> str:
        others = [f"  {guess.title}: {_beside(guess, truth)}" for guess, truth in list(self._pairs())[1:]]
        return "\n".join([self.sentence(), *others])

    def _repr_html_(self) -> str:
        return figures(self.predicted, self.measured)


def figures(guess: Account, truth: Account | None = None, *, caption: str = "") -> str:
    """An HTML table of a prediction's quantities, and beside them what was measured. Of a measured Account alone, that.

    A dash stands for what there is not.
    """
    truths = {account.title: account for account in truth.companions} if truth else {}
    heads = _HEADS if truth else _HEADS[:-1]
    rows = []
    for account in (guess, *guess.companions):
        measured = truth if account is guess else truths.get(account.title)
        texts = _cells(account, measured)
        if not (guess.predicted or truth):
            texts = ["–", "–", texts[0], "–"]
        title = html.escape(account.title)
        rows.append([
            markup.Cell(f"<b>{title}</b>" if account is guess else title + _shares(account), "th", _QUANTITY),
            *(markup.Cell(html.escape(text), attributes=_FIGURE) for text in texts[: len(heads)]),
        ])  # fmt: skip
    names = [markup.Cell("quantity", "th", _QUANTITY), *(markup.Cell(head, "th", _FIGURE) for head in heads)]
    table = markup.table(names, rows, caption=html.escape(caption), attributes=_TABLE)
    return f'<div style="max-width:710px;margin-bottom:8px;overflow-x:auto">{table}</div>'


def _shares(account: Account) -> str:
    if len(account.frame) < 2:
        return ""
    shares = ", ".join(f"{share:.1%} {item}" for item, share in account.share.items())
    return f'<small style="display:block;opacity:0.8">{html.escape(shares)}</small>'


def _error(predicted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if predicted == 0 else math.copysign(math.inf, predicted)
    return predicted / measured - 1


def _cells(guess: Account, truth: Account | None) -> list[str]:
    predicted = [readable(guess.total, guess.unit), _band(guess)]
    if truth is None:
        return [*predicted, "–", "–", "–"]
    error, inside = f"{_error(guess.total, truth.total):+.1%}", "yes" if _within(guess, truth) else "no"
    return [*predicted, readable(truth.total, truth.unit), error, inside]


def _beside(guess: Account, truth: Account) -> str:
    predicted, _, measured, error, _ = _cells(guess, truth)
    return f"predicted {predicted}, measured {measured}, error {error}"


def _band(predicted: Account) -> str:
    if predicted.low is None or predicted.high is None:
        return "none"
    if predicted.low >= predicted.high:
        return "exact"
    return f"{readable(predicted.low, predicted.unit)} to {readable(predicted.high, predicted.unit)}"


def _within(predicted: Account, measured: Account) -> bool:
    """A prediction without a band claims to be exact."""
    low = predicted.total if predicted.low is None else predicted.low
    high = predicted.total if predicted.high is None else predicted.high
    return low <= measured.total <= high
