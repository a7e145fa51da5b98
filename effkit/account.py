"""Account: rows that explain one total. What measuring and predicting both end in."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import TYPE_CHECKING, Any

import pandas as pd

from effkit import markup
from effkit.records import Record, named
from effkit.units import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BASES = ("measured", "derived", "assumed")
_NAMED = ("title", "unit", "total", "source", "low", "high", "in_range", "setting")  # that plain data names alike


@dataclass(frozen=True, eq=False)
class Account(Record):
    """Rows that explain one total.

    ValueError when the frame is not of that form, or a band does not enclose its total.

    Parameters
    ----------
    title
        What the total is, in words: ``"Time of one epoch"``.
    unit
        ``"ns"``, ``"bytes"``, ``"cells"``, ``"tokens"``, ``"tokens/s"``, ``"steps"``, ``"FLOPs"``, ``"ppm"`` (of a
        share) or ``"thousandths"`` (of a ratio). Values are integers in it.
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
        if missing := {"value", "basis"} - set(self.frame.columns):
            raise ValueError(f"an Account's frame needs the columns value and basis; missing: {sorted(missing)}")
        if not pd.api.types.is_integer_dtype(self.frame["value"]):
            raise ValueError(f"an Account's values are integers; given: {self.frame['value'].dtype}. Round them")
        # a time may be a difference of two clocks, and a little below 0
        if self.unit != "ns" and len(negative := self.frame[self.frame["value"] < 0]):
            item, value = negative.index[0], negative["value"].iloc[0]
            raise ValueError(f"a part of a total is 0 or more; given: {item} {value:,} of {self.total:,} {self.unit}")
        if unknown := set(self.frame["basis"]) - set(BASES):
            raise ValueError(f"basis is one of {', '.join(BASES)}; given: {', '.join(sorted(map(str, unknown)))}")
        if self.frame.index.has_duplicates:
            twice = list(self.frame.index[self.frame.index.duplicated()])
            raise ValueError(f"an item may stand in one row only: {twice}")
        if (self.low is None) != (self.high is None):
            raise ValueError("a band has both a low and a high end; give both or neither")
        if self.low is not None and self.high is not None and not self.low <= self.total <= self.high:
            raise ValueError(f"a band encloses its total; given: {self.low} .. {self.high} around {self.total}")

    @classmethod
    def of(
        cls, title: str, unit: str, rows: Mapping[str, int], *, total: int, source: str,
        basis: str | Mapping[str, str] = "measured", **more: Any,
    ) -> Account:  # fmt: skip
        """An Account from a mapping ``item -> value [unit]``; ``basis`` is one word for all rows or one per item."""
        bases = [basis if isinstance(basis, str) else basis[item] for item in rows]
        if wrong := [value for value in rows.values() if not isinstance(value, Real) or value != value]:
            raise ValueError(f"an Account's values are integers; given: {wrong[0]!r}. Count or round them")
        values = pd.array([int(value) for value in rows.values()], dtype="int64")
        frame = pd.DataFrame({"value": values, "basis": bases}, index=pd.Index(list(rows), name="item"))
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

        ValueError when they do not: the ledger says by how much.
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

    def companion(self, title: str) -> Account:
        """The Account of this title among the companions. ValueError when there is none: the titles that there are."""
        for account in self.companions:
            if account.title == title:
                return account
        titles = ", ".join(f"“{account.title}”" for account in self.companions) or "none"
        raise ValueError(f"“{self.title}” has no companion “{title}”; there: {titles}")

    def with_companions(self, *companions: Account) -> Account:
        """The same Account with these beside it."""
        return replace(self, companions=companions)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the rows, the residual and the band as one horizontal bar; returns the axes."""
        from effkit import view

        return view.account(self, ax)

    def _lines(self) -> list[tuple[str, str, str, str]]:
        rows = [*zip(self.frame.index, self.frame["value"], self.frame["basis"], strict=True),
                ("residual", self.residual, "")]  # fmt: skip
        return [(str(item), readable(value, self.unit), f"{value / self.total if self.total else 0.0:.1%}", basis)
                for item, value, basis in rows]  # fmt: skip

    def to_markdown(self) -> str:
        """A table: item, amount, share, basis, under the total and its source."""
        table = markup.markdown(["item", "amount", "share", "basis"], self._lines())
        return f"**{markup.escaped(self.headline())}**\n\n{table}\ntotal from {markup.escaped(self.source)}\n"

    def _plain(self) -> dict[str, Any]:
        rows = self.frame.reset_index(names="item")[["item", "value", "basis"]].to_dict("records")
        figures = {name: getattr(self, name) for name in _NAMED}
        return figures | {"rows": rows, "residual": self.residual, "companions": self.companions}

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Account:
        rows, basis = ({row["item"]: row[name] for row in data["rows"]} for name in ("value", "basis"))
        figures = {name: data[name] for name in _NAMED} | {"setting": dict(data["setting"])}
        return cls.of(rows=rows, basis=basis, companions=tuple(map(cls.from_dict, data["companions"])), **figures)

    def _scalars(self) -> Iterator[tuple[str, float]]:
        ends = {} if self.low is None or self.high is None else {"low": self.low, "high": self.high}
        figures = {"total": self.total, **ends, "residual": self.residual, **self.frame["value"].to_dict()}
        for name, value in figures.items():
            yield f"{named(self.title)}/{named(name, self.unit)}", float(value)
        for account in self.companions:
            yield from account._scalars()

    def headline(self) -> str:
        """The total with its band, in words, on one line."""
        line = f"{self.title}: {readable(self.total, self.unit)}"
        if self.low is not None and self.high is not None:
            line += f" (predicted; band {readable(self.low, self.unit)} to {readable(self.high, self.unit)})"
        return line if self.in_range else line + " — outside the calibrated range"

    def __repr__(self) -> str:
        lines = self._lines()
        widths = [max(len(line[i]) for line in lines) for i in range(4)]
        rows = (f"  {a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in lines)
        return "\n".join([self.headline(), *rows, f"  total from {self.source}"])

    def _repr_html_(self) -> str:
        caption = f"{html.escape(self.headline())}<br>total from {html.escape(self.source)}"
        return markup.table(["item", "amount", "share", "basis"], self._lines(), caption=caption)
