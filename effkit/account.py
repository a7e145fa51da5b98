"""Account and Receipt: the two ledgers that everything in effkit ends in.

An Account explains one measured total by rows. A Receipt lays a predicted Account beside a measured one.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASES = ("measured", "derived", "assumed")
LEDGER_COLUMNS = (
    "lab", "model", "knob", "setting", "quantity", "unit",
    "predicted", "low", "high", "measured", "error", "in_range", "provenance",
)  # fmt: skip

# unit -> the steps a person reads it in: (from this size on, divide by, name, decimals)
_READABLE: Mapping[str, tuple[tuple[float, float, str, int], ...]] = {
    "ns": ((6e10, 1e9, "s", 1), (1e9, 1e9, "s", 2), (1e6, 1e6, "ms", 1), (1e3, 1e3, "us", 1), (0, 1, "ns", 0)),
    "bytes": ((2**30, 2**30, "GiB", 2), (2**20, 2**20, "MiB", 1), (2**10, 2**10, "KiB", 1), (0, 1, "B", 0)),
}  # fmt: skip


def readable(value: float, unit: str) -> str:
    """A quantity as a person reads it.

    >>> readable(61_300_000, "ns"), readable(3 * 2**20, "bytes"), readable(12_345, "cells")
    ('61.3 ms', '3.0 MiB', '12,345 cells')
    """
    for threshold, divisor, name, decimals in _READABLE.get(unit, ()):
        if abs(value) >= threshold:
            return f"{value / divisor:,.{decimals}f} {name}"
    return f"{value:,.0f} {unit}"


@dataclass(frozen=True, eq=False)
class Account:
    """Rows that explain one total.

    Parameters
    ----------
    title
        What the total is, in words: ``"Time of one epoch"``.
    unit
        ``"ns"``, ``"bytes"``, ``"cells"``, ``"tokens"``, ``"steps"``, ``"FLOPs"``. Values are integers in it.
    frame
        Indexed by ``item``; integer column ``value`` [unit]; column ``basis`` in {measured, derived, assumed}.
    total
        The amount to explain [unit], from a counter *independent* of the rows.
    source
        Which counter that was.
    low, high
        A predicted Account's band on the total [unit]; ``None`` for a measured one.
    in_range
        ``False`` when a prediction goes beyond what its calibration has seen.
    setting
        The setting that was measured or predicted.
    companions
        Other totals at the same setting (memory beside time, say), each an Account.
    calibration
        What ``predict`` needs to move away from here; absent from reprs.

    Raises
    ------
    ValueError
        When the frame is not of that form, or a band does not enclose its total.

    Examples
    --------
    >>> cells = Account.of("Cells of one epoch", "cells", {"real": 60, "padding": 40}, total=100,
    ...                    source="batch shapes")
    >>> cells.residual, float(cells.share["padding"])
    (0, 0.4)
    """

    title: str
    unit: str
    frame: pd.DataFrame
    total: int
    source: str
    low: int | None = None
    high: int | None = None
    in_range: bool = True
    setting: Mapping[str, Any] = field(default_factory=dict)
    companions: tuple[Account, ...] = ()
    calibration: Any = None

    def __post_init__(self) -> None:
        missing = {"value", "basis"} - set(self.frame.columns)
        if missing:
            raise ValueError(f"an Account's frame needs the columns value and basis; missing: {sorted(missing)}")
        if not pd.api.types.is_integer_dtype(self.frame["value"]):
            raise ValueError(f"an Account's values are integers; given: {self.frame['value'].dtype}. Round them")
        unknown = set(self.frame["basis"]) - set(BASES)
        if unknown:
            raise ValueError(f"basis is one of {', '.join(BASES)}; given: {', '.join(sorted(map(str, unknown)))}")
        if self.frame.index.has_duplicates:
            raise ValueError(
                f"an item may stand in one row only: {list(self.frame.index[self.frame.index.duplicated()])}"
            )
        if (self.low is None) != (self.high is None):
            raise ValueError("a band has both a low and a high end; give both or neither")
        if self.low is not None and self.high is not None and not self.low <= self.total <= self.high:
            raise ValueError(f"a band encloses its total; given: {self.low} .. {self.high} around {self.total}")

    @classmethod
    def of(
        cls,
        title: str,
        unit: str,
        rows: Mapping[str, int],
        *,
        total: int,
        source: str,
        basis: str | Mapping[str, str] = "measured",
        **more: Any,
    ) -> Account:
        """An Account from a mapping ``item -> value [unit]``; ``basis`` is one word for all rows or one per item."""
        bases = [basis if isinstance(basis, str) else basis[item] for item in rows]
        frame = pd.DataFrame(
            {"value": pd.array([int(v) for v in rows.values()], dtype="int64"), "basis": bases},
            index=pd.Index(list(rows), name="item"),
        )
        return cls(title=title, unit=unit, frame=frame, total=int(total), source=source, **more)

    @property
    def residual(self) -> int:
        """What the rows leave unexplained: ``total - sum(rows)`` [unit]."""
        return self.total - int(self.frame["value"].sum())

    @property
    def share(self) -> pd.Series[float]:
        """Each row as a fraction of the total, in [0, 1]; empty totals give 0."""
        return (self.frame["value"] / self.total if self.total else self.frame["value"] * 0.0).rename("share_frac")

    @property
    def predicted(self) -> bool:
        """True when this is a prediction, that is, when it carries a band."""
        return self.low is not None

    def closed(self, tolerance_frac: float = 0.0) -> Account:
        """This Account, if its rows explain the total to within ``tolerance_frac`` of it.

        Raises
        ------
        ValueError
            When they do not: the ledger says by how much.
        """
        if abs(self.residual) > tolerance_frac * abs(self.total):
            raise ValueError(
                f"the account “{self.title}” does not close: its rows sum to {self.total - self.residual:,} "
                f"{self.unit} and {self.source} says {self.total:,} (residual {self.residual:+,})"
            )
        return self

    def compare(self, other: Account) -> pd.DataFrame:
        """Row by row: ``value``, ``other``, ``difference`` (other - value) [unit] and ``ratio`` (other / value).

        The last two rows are ``residual`` and ``total``. An item that one side lacks is ``<NA>`` there, not zero.
        """
        if other.unit != self.unit:
            raise ValueError(f"cannot compare {self.unit} with {other.unit}: the two accounts count different things")
        order = list(dict.fromkeys([*self.frame.index, *other.frame.index]))
        table = pd.DataFrame(index=pd.Index([*order, "residual", "total"], name="item"))
        for name, account in (("value", self), ("other", other)):
            column = account.frame["value"].astype("Int64").reindex(order)
            table[name] = pd.array([*column, account.residual, account.total], dtype="Int64")
        table["difference"] = table["other"] - table["value"]
        table["ratio"] = table["other"].astype("Float64") / table["value"].replace(0, pd.NA).astype("Float64")
        return table

    def with_companions(self, *companions: Account) -> Account:
        """The same Account with these beside it."""
        return replace(self, companions=companions)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the rows, the residual and the band as one horizontal bar; returns the axes."""
        from effkit import view

        return view.account(self, ax)

    def _lines(self) -> list[tuple[str, str, str, str]]:
        share = [*self.share, self.residual / self.total if self.total else 0.0]
        items = [*self.frame.index, "residual"]
        values = [*self.frame["value"], self.residual]
        bases = [*self.frame["basis"], ""]
        return [
            (str(item), readable(value, self.unit), f"{fraction:.1%}", basis)
            for item, value, fraction, basis in zip(items, values, share, bases, strict=True)
        ]

    def headline(self) -> str:
        """The total with its band, in words, on one line."""
        line = f"{self.title}: {readable(self.total, self.unit)}"
        if self.low is not None and self.high is not None:
            line += f" (predicted; band {readable(self.low, self.unit)} to {readable(self.high, self.unit)})"
        return line if self.in_range else line + " — outside the calibrated range"

    def __repr__(self) -> str:
        lines = self._lines()
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        body = "\n".join(
            f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines
        )
        return f"{self.headline()}\n{body}\n  total from {self.source}"

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>" for line in self._lines()
        )
        return (
            f"<table><caption>{html.escape(self.headline())}<br>total from {html.escape(self.source)}</caption>"
            "<thead><tr><th>item</th><th>amount</th><th>share</th><th>basis</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )


@dataclass(frozen=True, eq=False)
class Receipt:
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
        if self.predicted.unit != self.measured.unit:
            raise ValueError(
                f"a receipt compares like with like; given: {self.predicted.unit} and {self.measured.unit}"
            )

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
            {
                "quantity": guess.title,
                "unit": guess.unit,
                "predicted": guess.total,
                "low": guess.low,
                "high": guess.high,
                "measured": truth.total,
                "error": _error(guess.total, truth.total),
                "within_band": _within(guess, truth),
                "in_range": guess.in_range,
            }
            for guess, truth in self._pairs()
        ]
        return pd.DataFrame(rows).set_index("quantity").astype({"low": "Int64", "high": "Int64"})

    def _pairs(self) -> Iterable[tuple[Account, Account]]:
        yield self.predicted, self.measured
        truths = {account.title: account for account in self.measured.companions}
        for guess in self.predicted.companions:
            if guess.title in truths:
                yield guess, truths[guess.title]

    def append_to(self, path: str | Path, *, lab: str, model: str, knob: str) -> None:
        """Append one line per quantity to an error ledger (CSV), which is created with a header if absent.

        Raises
        ------
        ValueError
            When the file exists and its header is not a ledger's: nothing is written.
        """
        path = Path(path)
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        if not path.exists():
            writer.writerow(LEDGER_COLUMNS)
        else:
            with path.open(encoding="utf-8") as lines:
                header = lines.readline().strip()
            if header != ",".join(LEDGER_COLUMNS):
                raise ValueError(
                    f"{path} is not an error ledger: its first line is {header[:80]!r}. Choose another file"
                )
        for quantity, row in self.frame.iterrows():
            cells = [row["unit"], row["predicted"], row["low"], row["high"], row["measured"]]
            blank = ["" if pd.isna(cell) else cell for cell in cells]
            writer.writerow(
                [lab, model, knob, json.dumps(dict(self.setting), sort_keys=True, default=str), quantity, *blank,
                 f"{row['error']:.6f}", row["in_range"], json.dumps(dict(self.provenance), sort_keys=True, default=str)]
            )  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as ledger:
            ledger.write(text.getvalue())

    def sentence(self) -> str:
        """The receipt of the main quantity in one sentence."""
        guess, truth = self.predicted, self.measured
        verdict = "inside the band" if self.within_band else "outside the band"
        tail = "" if guess.in_range else "; the prediction had gone beyond its calibrated range"
        return (
            f"Receipt: predicted {readable(guess.total, guess.unit)}, measured "
            f"{readable(truth.total, truth.unit)}, error {self.error:+.1%}, {verdict}{tail}."
        )

    def __repr__(self) -> str:
        lines = [self.sentence()]
        for guess, truth in list(self._pairs())[1:]:
            error = _error(guess.total, truth.total)
            lines.append(
                f"  {guess.title}: predicted {readable(guess.total, guess.unit)}, "
                f"measured {readable(truth.total, truth.unit)}, error {error:+.1%}"
            )
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "".join(
            "<tr>"
            + "".join(
                f"<td>{html.escape(cell)}</td>"
                for cell in (
                    guess.title,
                    readable(guess.total, guess.unit),
                    f"{readable(guess.low, guess.unit)} … {readable(guess.high, guess.unit)}"
                    if guess.low is not None and guess.high is not None
                    else "exact",
                    readable(truth.total, truth.unit),
                    f"{_error(guess.total, truth.total):+.1%}",
                    "yes" if _within(guess, truth) else "no",
                )
            )
            + "</tr>"
            for guess, truth in self._pairs()
        )
        heads = "".join(f"<th>{head}</th>" for head in ("", "predicted", "band", "measured", "error", "within band"))
        return f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _error(predicted: float, measured: float) -> float:
    if measured == 0:
        return 0.0 if predicted == 0 else math.copysign(math.inf, predicted)
    return predicted / measured - 1


def _within(predicted: Account, measured: Account) -> bool:
    """A prediction without a band claims to be exact."""
    low = predicted.total if predicted.low is None else predicted.low
    high = predicted.total if predicted.high is None else predicted.high
    return low <= measured.total <= high
