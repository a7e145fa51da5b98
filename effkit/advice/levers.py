"""Lever: one thing that would help, by how much, what it costs; Advice: such levers, ranked."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import pandas as pd

from effkit import markup
from effkit.account import Account
from effkit.device import Device, provenance
from effkit.markup import Cell
from effkit.progress_bar import working
from effkit.receipt import Receipt
from effkit.records import Record, named
from effkit.units import readable

GOALS = ("time", "memory", "cost")
LEFT = "what is left"
_USABLE_FRAC = 0.9  # of a device's memory
_HOUR_NS = 3.6e12


@dataclass(frozen=True, eq=False)
class Lever(Record):
    """One thing that would help.

    Attributes
    ----------
    kind
        Which waste it addresses: ``"padding"``, ``"batch size"``, ``"data loading"``, ``"precision"``, …. Levers of one
        ``group`` address the same problem, and their gains are not added.
    name, found
        What to do, and what was seen that speaks for it.
    base, predicted
        The Account as it is, and as it would be; both of the same examples, tokens or steps.
    side_effects
        What else it changes.
    code
        Lines to paste where :meth:`apply` is not enough.
    at_most
        What it is predicted to save is the most that it could; it may save nothing.
    """

    kind: str
    name: str
    found: str
    base: Account
    predicted: Account
    code: str
    side_effects: tuple[str, ...] = ()
    group: str = ""
    run: Callable[[], Account] | None = field(default=None, repr=False)
    use: Callable[[], Any] | None = field(default=None, repr=False)
    keep: Callable[[Receipt], None] | None = field(default=None, repr=False)
    at_most: bool = False

    @property
    def gain_frac(self) -> float:
        """What it is predicted to save, as a share of the base; 0.25 is a quarter less."""
        return 1 - self.predicted.total / self.base.total

    @property
    def gain_band(self) -> tuple[float, float]:
        """The least and the most that it is predicted to save."""
        low, high = self.predicted.low, self.predicted.high
        assert low is not None, "a prediction has a band"
        assert high is not None
        return 1 - high / self.base.total, 1 - low / self.base.total

    @property
    def helps(self) -> bool:
        """True when its band leaves out "no gain", or all that is known is the most that it could save."""
        return self.at_most or self.gain_band[0] > 0

    def saves(self, word: str = "") -> str:
        """The gain and its band, in words."""
        least, most = self.gain_band
        return f"at most {most:.0%}" if self.at_most else f"{self.gain_frac:.0%} ({word}{least:.0%} to {most:.0%})"

    def apply(self) -> Any:
        """What to use in its place: a DataLoader, a context for the step, keyword arguments, a configuration.

        RuntimeError when it has to be written into code: ``code`` says what.
        """
        if self.use is None:
            raise RuntimeError(f"“{self.name}” is a change of your code, and cannot be handed over: {self.code}")
        return self.use()

    @working("Measuring beside the base")
    def measure(self) -> Receipt:
        """Run it beside the base, here and now, and return the Receipt; blocks until done.

        RuntimeError when there is nothing live to run it on.
        """
        if self.run is None:
            raise RuntimeError(f"nothing to measure “{self.name}” on: study a live model, not a recording")
        measured = self.run()
        receipt = Receipt(self.predicted, measured, setting={"lever": self.name}, provenance=provenance())
        if self.keep is not None:
            self.keep(receipt)
        return receipt

    def to_markdown(self) -> str:
        """One point of a list, with the lines to paste under it."""
        first, *others = map(markup.escaped, repr(self).splitlines())
        points = "".join(f"  - {line}\n" for line in others)
        code = "".join(f"    {line}\n" for line in self.code.splitlines())
        return f"- **{first}**\n{points}\n{code}" if code else f"- **{first}**\n{points}"

    def _plain(self) -> dict[str, Any]:
        least, most = self.gain_band
        return {"kind": self.kind, "name": self.name, "found": self.found, "base": self.base, "code": self.code,
                "predicted": self.predicted, "side_effects": self.side_effects, "group": self.group,
                "gain_frac": self.gain_frac, "gain_least_frac": least, "gain_most_frac": most,
                "at_most": self.at_most}  # fmt: skip

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Lever:
        """Of a run that is over: it can be neither measured nor applied."""
        base, predicted = (Account.from_dict(data[name]) for name in ("base", "predicted"))
        kind, name, found, code, group = (str(data[key]) for key in ("kind", "name", "found", "code", "group"))
        return cls(kind, name, found, base, predicted, code, tuple(map(str, data["side_effects"])), group,
                   at_most=bool(data["at_most"]))  # fmt: skip

    def _scalars(self) -> Iterator[tuple[str, float]]:
        yield f"advice/{named(self.name)}_gain_frac", self.gain_frac

    def __repr__(self) -> str:
        lines = [f"{self.name}: saves {self.saves('band ')}", self.found]
        lines += [f"but: {effect}" for effect in self.side_effects]
        return "\n  ".join(lines)


@dataclass(frozen=True, eq=False)
class Advice(Record, Sequence[Lever]):
    """Levers that help, the best first.

    Attributes
    ----------
    goal
        What they are ranked by.
    levers
        All whose band leaves out "no gain".
    rejected
        Those that were looked at and whose band does not, or that do not fit the budget.
    notes
        What has to be said of the whole.
    """

    goal: str
    levers: tuple[Lever, ...]
    rejected: tuple[Lever, ...] = ()
    notes: tuple[str, ...] = ()
    price_per_hour: float | None = None
    num_steps: int | None = None
    num_devices: int = 1

    @overload
    def __getitem__(self, index: int) -> Lever: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Lever]: ...
    def __getitem__(self, index: int | slice) -> Lever | Sequence[Lever]:
        return self.levers[index]

    def __len__(self) -> int:
        return len(self.levers)

    @property
    def frame(self) -> pd.DataFrame:
        """One row per lever.

        Columns ``kind``; ``gain_frac`` with its band ``least_frac``, ``most_frac``; ``after_those_above``, what it
        still saves [fraction of the base] when all above it are in force, so that these sum to the whole; ``but``, side
        effects. With a number of steps, and with a price, also ``gpu_hours`` and ``money`` saved over the run, alone.
        """
        cells = [(lever.name, lever.kind, lever.gain_frac, *lever.gain_band, more, "; ".join(lever.side_effects))
                 for lever, more in zip(self.levers, self._increments(), strict=True)]  # fmt: skip
        columns = ["lever", "kind", "gain_frac", "least_frac", "most_frac", "after_those_above", "but"]
        frame = pd.DataFrame(cells, columns=columns).set_index("lever")
        if self._timed:
            frame["gpu_hours"] = [lever.gain_frac * self._hours(lever.base) for lever in self.levers]
            if self.price_per_hour is not None:
                frame["money"] = frame["gpu_hours"] * self.price_per_hour
        return frame

    @property
    def together(self) -> float:
        """What all of them save together, as a share of the base: of each group the best one alone counts."""
        return sum(self._increments())

    @property
    def saves(self) -> str:
        """What all of them save together, in words."""
        return f"{'at most ' if any(lever.at_most for lever in self.levers) else ''}{self.together:.0%}"

    def to_markdown(self) -> str:
        """A list: lever, gain and band, what speaks for it and against it, what to paste."""
        if not self.levers:
            return f"{markup.escaped(repr(self))}\n"
        notes = "".join(f"\n{markup.escaped(note)}\n" for note in self.notes)
        head = f"**Advice for {self.goal}: together {self.saves} less**\n\n"
        return head + "\n".join(lever.to_markdown() for lever in self.levers) + notes

    def _plain(self) -> dict[str, Any]:
        return {"goal": self.goal, "levers": self.levers, "rejected": self.rejected, "notes": self.notes,
                "price_per_hour": self.price_per_hour, "num_steps": self.num_steps, "num_devices": self.num_devices,
                "together_frac": self.together}  # fmt: skip

    @classmethod
    def _of_plain(cls, data: Mapping[str, Any]) -> Advice:
        levers, rejected = (tuple(map(Lever.from_dict, data[name])) for name in ("levers", "rejected"))
        run = {name: data[name] for name in ("price_per_hour", "num_steps", "num_devices")}
        return cls(str(data["goal"]), levers, rejected, tuple(map(str, data["notes"])), **run)

    def _scalars(self) -> Iterator[tuple[str, float]]:
        yield "advice/together_frac", float(self.together)
        for lever in self.levers:
            yield from lever._scalars()

    @property
    def _timed(self) -> bool:
        """Whether hours of a whole run can be said: its steps are known, and levers save time."""
        return bool(self.num_steps and self.levers and self.levers[0].base.unit == "ns")

    def _hours(self, base: Account) -> float:
        return base.total * (self.num_steps or 0) / _HOUR_NS * self.num_devices

    def _increments(self) -> list[float]:
        """Levers of one group are one problem; those of two act on what the other leaves, or are known to be rows."""
        left, done, increments = 1.0, set[str](), []
        for lever in self.levers:
            group = lever.group or lever.kind
            alone = min(left, lever.gain_frac) if lever.at_most else left * lever.gain_frac
            more = 0.0 if group in done else alone
            done.add(group)
            left -= more
            increments.append(more)
        return increments

    def __repr__(self) -> str:
        if not self.levers:
            return "\n  ".join([f"Advice for {self.goal}: nothing here is predicted to help", *self.notes])
        lines = [f"Advice for {self.goal}: together {self.saves} less"]
        lines += [f"{number}. {text}" for number, text in enumerate(map(repr, self.levers), 1)]
        if self._timed:
            hours = self.together * self._hours(self.levers[0].base)
            spent = f"{hours:,.1f} GPU-hours over {self.num_steps:,} steps"
            if self.price_per_hour is not None:
                spent += f", {hours * self.price_per_hour:,.2f} at {self.price_per_hour:,.2f} an hour"
            lines.append(f"saved together: {spent}")
        return "\n  ".join([*lines, *self.notes])

    def _repr_html_(self) -> str:
        if not self.levers:
            return f"<p>{html.escape(repr(self))}</p>"
        rows = (
            [number, Cell(f"<b>{html.escape(lever.name)}</b><br>{html.escape(lever.found)}"),
             f"{readable(lever.base.total, lever.base.unit)} → {readable(lever.predicted.total, lever.base.unit)}",
             lever.saves(), f"{more:.0%}",
             "; ".join(lever.side_effects)]
            for number, (lever, more) in enumerate(zip(self.levers, self._increments(), strict=True), 1)
        )  # fmt: skip
        notes = "".join(f"<br>{html.escape(note)}" for note in self.notes)
        caption = f"Advice for {self.goal}: together {self.saves} less{notes}"
        heads = ["", "lever", "predicted", "saves (band)", "after those above", "but"]
        return markup.table(heads, rows, caption=caption)


def ranked(goal: str, candidates: Sequence[Lever], **more: Any) -> Advice:
    """Those that help, by predicted gain; the others are kept apart."""
    helping = sorted((lever for lever in candidates if lever.helps), key=lambda lever: -lever.gain_frac)
    others = tuple(lever for lever in candidates if not lever.helps)
    return Advice(goal, tuple(helping), others, **more)


def limit_bytes(budget_bytes: int | None) -> float:
    """What the peak may take."""
    return budget_bytes if budget_bytes is not None else _USABLE_FRAC * Device.here().memory_bytes


def banded(base: Account, rows: dict[str, int], total: float, half_width: float, source: str, **more: Any) -> Account:
    """A prediction in the form of its base."""
    total, margin = max(0, round(total)), max(0, round(half_width))
    rows = {item: max(0, value) for item, value in rows.items()}
    return Account.of(base.title, base.unit, rows, total=total, source=source, basis="derived",
                      low=max(0, total - margin), high=total + margin, setting=dict(base.setting), **more)  # fmt: skip
