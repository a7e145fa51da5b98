"""The reader's sheet: what was guessed in the lessons, the receipts made there, and how both came out.

A lesson is a process of its own, so the sheet is one file, beside what :meth:`effkit.Device.here` keeps.
"""

from __future__ import annotations

import html
import json
import math
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from effkit import Receipt, device, markup
from effkit.units import readable
from effkit.whole_files import write_text

GUESSES = ["lesson", "question", "yours", "it was", "how far off", "within 20%"]
RECEIPTS = ["lesson", "setting", "predicted", "measured", "error", "in the band"]
_NEAR_FRAC = 0.2
_DAMAGED = "The sheet that was kept cannot be read: a new one begins."
_EMPTY = "The sheet is empty: no guess was filled in and no receipt kept yet, or its folder cannot be written to."


@dataclass(frozen=True)
class Sheet:
    """Two tables of text, ``guesses`` and ``receipts``, and one sentence about them."""

    guesses: pd.DataFrame
    receipts: pd.DataFrame
    sentence: str

    def _tables(self) -> list[pd.DataFrame]:
        return [table for table in (self.guesses, self.receipts) if len(table)]

    def __repr__(self) -> str:
        return "\n\n".join([self.sentence, *(table.to_string(index=False) for table in self._tables())])

    def _repr_html_(self) -> str:
        tables = [markup.table(list(table), table.to_numpy()) for table in self._tables()]
        return f"<p>{html.escape(self.sentence)}</p>" + "".join(tables)


def guess(lesson: str, question: str, mine: float | str | None, truth: float | str, form: str = "{:.0%}") -> str:
    """Keep a guess, unless there is none yet, and say it beside the truth: a line to be printed.

    A later guess at the same question takes the place of the earlier one. Truth and guess are numbers, or names, shown
    by ``form``; a sign ≈ in it is the truth's alone. ValueError for a guess of the other kind.

    >>> print(guess("01", "share of padding", None, 0.6))    # doctest: +SKIP
    no guess yet; it is 60%
    >>> print(guess("01", "share of padding", 0.25, 0.6))    # doctest: +SKIP
    you guessed 25%; it is 60%
    """
    guesses, receipts, told = _read()
    mine, was = mine.strip() if isinstance(mine, str) else mine, form.format(truth)
    line = f"no guess yet; it is {was}"
    if mine is not None and mine != "":
        if isinstance(mine, str) != isinstance(truth, str):
            kind = "a name in quotes" if isinstance(truth, str) else "a number such as 0.25"
            raise ValueError(f"my_guess is {mine!r}: expected {kind}")
        yours, far = form.replace("≈", "").format(mine), _off(mine, truth)
        shown_far = f"{far:+.0%}" if not isinstance(truth, str) else "another" if far else "right"
        row = [lesson, question, yours, was, shown_far, "yes" if abs(far) <= _NEAR_FRAC else "no"]
        _write(_with(guesses, row), receipts)
        line = f"you guessed {yours}; it is {was}"
    return "\n".join([line, told]) if told else line


def keep(lesson: str, *receipts: Receipt) -> None:
    """Keep receipts; one of the same lesson, quantity and setting takes the place of the earlier one."""
    guesses, kept, _ = _read()
    for receipt in receipts:
        predicted, amounts = receipt.predicted, (receipt.predicted.total, receipt.measured.total)
        # a knob that is off need not be read
        knobs = [f"{name}={value}" for name, value in (receipt.setting or predicted.setting).items() if value]
        inside = "yes" if receipt.within_band else "no"
        row = [
            lesson, f"{predicted.title}: {', '.join(knobs)}" if knobs else predicted.title,
            *(readable(amount, predicted.unit) for amount in amounts), f"{receipt.error:+.1%}",
            inside if predicted.predicted else "no band",
        ]  # fmt: skip
        kept = _with(kept, row)
    _write(guesses, kept)


def shown() -> Sheet:
    """All that was kept, by lesson, and one sentence: how many guesses were within 20%, or the right name."""
    guesses, receipts, told = _read()
    (near, _), (inside, bandless) = ([[row[-1] for row in rows].count(word) for word in ("yes", "no band")]
                                     for rows in (guesses, receipts))  # fmt: skip
    of_guesses = "guess" if len(guesses) == 1 else "guesses"
    of_receipts = f"receipt, {inside} in its band" if len(receipts) == 1 else f"receipts, {inside} in their band"
    sentence = f"{len(guesses)} {of_guesses}, {near} within 20%; {len(receipts)} {of_receipts}"
    sentence += f", {bandless} without a band" if bandless else ""
    return Sheet(
        _table(guesses, GUESSES), _table(receipts, RECEIPTS), told or (sentence if guesses or receipts else _EMPTY)
    )


def _table(rows: list[list[str]], columns: list[str]) -> pd.DataFrame:
    return pd.DataFrame(sorted(rows, key=lambda row: row[0]), columns=columns, dtype=str)


def _off(mine: float | str, truth: float | str) -> float:
    """Signed, as a fraction of the truth; of names 0, or infinite."""
    if isinstance(mine, str) or isinstance(truth, str):
        return 0.0 if str(mine).casefold() == str(truth).casefold() else math.inf
    return 0.0 if mine == truth else float(mine / truth) - 1 if truth else math.copysign(math.inf, mine)


def _with(rows: list[list[str]], row: list[str]) -> list[list[str]]:
    return [*(one for one in rows if one[:2] != row[:2]), row]


def _path() -> Path:
    return device._cache_path().with_name("sheet.json")


def _read() -> tuple[list[list[str]], list[list[str]], str]:
    """What was kept; nothing where there is no file, and a sentence where it is none of ours."""
    try:
        data = json.loads(_path().read_text(encoding="utf-8"))
        guesses, receipts = data["guesses"], data["receipts"]
        if all(isinstance(row, list) and list(map(type, row)) == [str] * 6 for row in [*guesses, *receipts]):
            return list(guesses), list(receipts), ""
    except OSError:
        return [], [], ""
    except (ValueError, TypeError, LookupError, RecursionError):
        pass
    return [], [], _DAMAGED


def _write(guesses: list[list[str]], receipts: list[list[str]]) -> None:
    with suppress(OSError):  # a sheet that cannot be written is no reason to stop a lesson
        _path().parent.mkdir(parents=True, exist_ok=True)
        write_text(_path(), json.dumps({"guesses": guesses, "receipts": receipts}, indent=1), "sheet.json")
