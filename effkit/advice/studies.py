"""Study: one model or one run, what it costs now, and what would help."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from effkit.advice.levers import GOALS, Advice
from effkit.advice.overviews import Overview, changes
from effkit.arguments import checked_amount, checked_whole
from effkit.claims import ceilings
from effkit.progress_bar import working
from effkit.receipt import Receipt
from effkit.records import Record
from effkit.whole_files import checked_place, write_text


class Study(Record):
    """One model, or one run, looked at as a whole; made by :func:`effkit.study`.

    Attributes
    ----------
    what
        What was studied, in words.
    receipts
        Of every lever that was measured, oldest first.
    """

    _spreads = False  # whether ranks can share what is studied

    def __init__(self, what: str) -> None:
        self.what = what
        self.receipts: list[Receipt] = []
        self._overview: Overview | None = None
        self._advised: dict[str, Advice] = {}

    @working("Studying")
    def overview(self) -> Overview:
        """Time and memory on one page, how near they are to this device's ceilings, and what could not be seen."""
        if self._overview is None:
            self._overview = self._look()
        return self._overview

    @working("Looking for what would help")
    def advise(
        self, goal: str = "time", *, budget_bytes: int | None = None, price_per_hour: float | None = None,
        num_steps: int | None = None, num_devices: int = 1, num_ranks: int = 1,
    ) -> Advice:  # fmt: skip
        """What would help, ranked by predicted gain; nothing whose band includes "no gain".

        ValueError for another goal, or a price or count that is not positive.

        Parameters
        ----------
        goal
            ``"time"`` of the same examples (of one generation: its latency), ``"memory"`` at the peak, or ``"cost"``:
            time as money, where throughput counts and latency does not.
        budget_bytes
            What the peak may take; the device's capacity unless given. With goal ``"memory"`` levers that cost time are
            suggested only where the peak exceeds it.
        price_per_hour, num_steps, num_devices
            Of one device, in your currency; steps of the whole run; devices that run it: for GPU-hours and money. What
            leaks is counted over ``num_steps``, 1,000 unless given.
        num_ranks
            With goal ``"memory"`` of a training step: ranks that may share it. Ways to do that are suggested, the one
            that sends least first.
        """
        if goal not in GOALS:
            raise ValueError(f"goal is one of {', '.join(GOALS)}; given: {goal!r}")
        run: dict[str, Any] = {"budget_bytes": budget_bytes, "price_per_hour": price_per_hour, "num_steps": num_steps,
                               "num_devices": num_devices}  # fmt: skip
        for name, value in run.items():
            if value is not None:
                run[name] = checked_whole(name, value, 1) if name.startswith("num") else checked_amount(name, value)
        if checked_whole("num_ranks", num_ranks, 1) > 1:
            if goal != "memory" or not self._spreads:
                raise ValueError("num_ranks= asks what ranks of a training step would hold: it goes with goal='memory'")
            run["num_ranks"] = num_ranks
        if goal == "cost" and (price_per_hour is None or num_steps is None):
            raise ValueError("goal='cost' takes price_per_hour= and num_steps=, to count hours and money with")
        self._advised[goal] = self._advise(goal, **run)
        return self._advised[goal]

    @working("Studying both")
    def compare(self, other: Study) -> pd.DataFrame:
        """This study before, the other after: the rows of their accounts, side by side.

        Columns ``before, after, difference`` and ``ratio`` (after / before); indexed by account and item. TypeError or
        ValueError when the other is no study, or one of another kind of run.
        """
        if not isinstance(other, Study):
            raise TypeError(f"compare() takes another study; given: {type(other).__name__}")
        return changes(self.overview().accounts, other.overview().accounts)

    @working("Studying")
    def claims(self) -> pd.DataFrame:
        """How much each published idea could give here at most: :func:`effkit.claims.ceilings` of the accounts."""
        return ceilings(self.overview().accounts)

    def report(self, path: str | Path, advice: Advice | None = None) -> Path:
        """Write one HTML page that needs nothing beside it: overview, advice, receipts of what was measured.

        Parameters
        ----------
        path
            Where to; it is written whole or not at all.
        advice
            To show; :meth:`advise` for time unless given.
        """
        from effkit.advice import reporting

        where = Path(path)
        checked_place(where, "report.html")  # before the page is made
        advice = self.advise() if advice is None else advice
        return write_text(where, reporting.page(self.what, self.overview(), self.receipts, advice), "report.html")

    def save(self, path: str | Path) -> Path:
        """Write what this study says into a JSON file, which :meth:`open` reads: overview, the advice that was asked
        for (for time, if none was), receipts. The model and the recording are not in it."""
        self.to_json(path)
        return Path(path)

    @staticmethod
    def open(path: str | Path) -> Study:
        """A study that :meth:`save` wrote. ValueError for another file."""
        return Study.from_json(Path(path))

    def to_markdown(self) -> str:
        """Overview and advice, as :meth:`report` has them."""
        told = "\n".join(advice.to_markdown() for advice in self._told())
        receipts = "\n".join(receipt.to_markdown() for receipt in self.receipts)
        return "\n".join(filter(None, [self.overview().to_markdown(), told, receipts]))

    def _plain(self) -> dict[str, Any]:
        return {"what": self.what, "overview": self.overview(), "advice": self._told(), "receipts": self.receipts}

    def _told(self) -> list[Advice]:
        """The advice that was asked for; for time, if none was."""
        return list(self._advised.values()) or [self.advise()]

    @classmethod
    def _kind(cls) -> str:
        return "study"  # of whatever class: what is read back is none of a live model

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Any:
        overview, advice = Overview.from_dict(data["overview"]), map(Advice.from_dict, data["advice"])
        return StudyOnFile(str(data["what"]), overview, list(advice), list(map(Receipt.from_dict, data["receipts"])))

    def _scalars(self) -> Iterator[tuple[str, float]]:
        for part in (self.overview(), *self._advised.values(), *self.receipts):
            yield from part._scalars()

    def _look(self) -> Overview:
        raise NotImplementedError

    def _advise(self, goal: str, budget_bytes: int | None, **more: Any) -> Advice:
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"Study of {self.what}: overview(), advise(), compare(other), report(path), save(path)"

    def _repr_html_(self) -> str:
        """What was asked for so far: to show it, nothing is run."""
        parts = [self._overview, *self._advised.values(), *self.receipts]
        return f"<p>{html.escape(repr(self))}</p>" + "".join(part._repr_html_() for part in parts if part is not None)


class StudyOnFile(Study):
    """What a study said when it was saved; nothing in it can be run."""

    def __init__(self, what: str, overview: Overview, advice: list[Advice], receipts: list[Receipt]) -> None:
        super().__init__(what)
        self._overview, self.receipts = overview, receipts
        self._advised = {each.goal: each for each in advice}

    def advise(self, goal: str = "time", **run: Any) -> Advice:
        """The advice that was saved. ValueError for another goal, and for another budget or price."""
        if run or goal not in self._advised:
            there = ", ".join(self._advised) or "none"
            raise ValueError(f"this study was read from a file, with advice for {there}: ask the live one for other")
        return self._advised[goal]
