"""The error ledger as a file, ``data/ledger/<device>.csv``: a lab's rows under one condition replaced; and the table in
README.md.

A *condition* makes another machine of this one: threads, instruction sets, cores. It is in force in a process that was
started under it (:func:`run_under`), for libraries look at the environment when they are imported.

A row is in the lab's ``.part`` as soon as it was measured. Nothing is lost when a setting fails (:func:`going_on`), or
when the process ends before its time: :func:`keep_rows` takes over what is there.
"""

from __future__ import annotations

import csv
import json
import os
import re
import statistics
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd
import torch

from effkit.device import provenance
from effkit.receipt import LEDGER_COLUMNS, Receipt
from effkit.whole_files import replacing

DATA = Path(__file__).resolve().parent
RECORDED = DATA / "ledger" / "recorded_gpus.csv"  # of other people's GPUs; whoever has one adds a file of its own
README, ACCURACY = DATA.parent / "README.md", DATA.parent / "docs" / "accuracy.md"
sys.path.append(str(DATA.parent / "notebooks"))  # where a ledger imports `lessons` from, as a notebook does
LABS = ("padding", "activations", "moe", "decoder", "advice")  # in this order in the file


@dataclass(frozen=True)
class Condition:
    """Threads of a process, what its environment says, and whether it keeps to one core."""

    num_threads: int = 1  # on a shared machine, two threads that wait for each other are timed at their worst
    environment: Mapping[str, str] = field(default_factory=dict)
    one_core: bool = False


USUAL = "one thread"  # rows without a condition are of this one
CONDITIONS: Mapping[str, Condition] = {
    USUAL: Condition(),
    "two threads": Condition(num_threads=2),
    "AVX2": Condition(environment={"ONEDNN_MAX_CPU_ISA": "AVX2"}),
    # its kernels take turns by size as another processor's would
    "SSE4.1": Condition(
        environment={"ONEDNN_MAX_CPU_ISA": "SSE41", "ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE"}
    ),
    "one core": Condition(one_core=True),
}
# What is kept from whoever designs a model: this condition, and every third setting of a grid. --all runs them too.
HELD_BACK = ("SSE4.1",)
_THIRD = 3
_NAME, _ALL = "EFFKIT_LEDGER_CONDITION", "EFFKIT_LEDGER_ALL"
CUT_OFF = 124  # the exit status of what ran past its limit, as of coreutils' timeout
_failed: list[str] = []  # settings of this process

Setting = TypeVar("Setting")


def run_under(name: str, command: Sequence[str], *, everything: bool, limit_s: float | None = None) -> int:
    """Run a command under a condition, to its end or its limit; returns its exit status."""
    condition = CONDITIONS[name]
    environment = {**os.environ, **condition.environment, "OMP_NUM_THREADS": str(condition.num_threads), _NAME: name}
    environment.pop(_ALL, None)
    cores = os.sched_getaffinity(0) if condition.one_core else set()
    if cores:
        os.sched_setaffinity(0, {min(cores)})  # the child inherits it
    try:
        environment |= {_ALL: "1"} if everything else {}
        return subprocess.run(command, env=environment, timeout=limit_s).returncode
    except subprocess.TimeoutExpired:
        return CUT_OFF
    finally:
        if cores:
            os.sched_setaffinity(0, cores)


def condition() -> str:
    """The condition that this process was started under."""
    return os.environ.get(_NAME, USUAL)


def everything() -> bool:
    """Whether what is held back is run as well."""
    return bool(os.environ.get(_ALL))


def unheld(grid: Sequence[Setting]) -> list[Setting]:
    """The settings to run: all, or those that are not held back."""
    return [one for i, one in enumerate(grid) if everything() or i % _THIRD != _THIRD - 1]


def device_name() -> str:
    """This device, as files are named after it."""
    return re.sub(r"[^a-z0-9]+", "-", provenance()["device"].lower()).strip("-")


def part_of(lab: str) -> Path:
    """Where a lab's new rows are collected."""
    return DATA / "ledger" / f"{device_name()}.{lab}.part"


def begun(lab: str) -> Path:
    """The same, with nothing there yet. From here on the condition's threads compute."""
    torch.set_num_threads(CONDITIONS[condition()].num_threads)
    _failed.clear()
    part = part_of(lab)
    part.unlink(missing_ok=True)
    return part


@contextmanager
def going_on(what: object) -> Iterator[None]:
    """What fails inside is said, and what comes after it is run; :func:`failed` names it."""
    try:
        yield
    except Exception as error:
        traceback.print_exc()
        _failed.append(f"{what} failed: {type(error).__name__}: {error}")


def failed() -> list[str]:
    """A sentence for each setting of this lab that failed."""
    return list(_failed)


def keep_rows(lab: str) -> None:
    """Put the rows that a lab's process left behind, if any, in their place."""
    part = part_of(lab)
    if part.exists():
        print(f"{lab}: {len(_rows(part))} rows were measured before it ended", flush=True)
        replace_rows(lab, part, whole=False)


def replace_rows(lab: str, part: Path, *, whole: bool = True) -> None:
    """Put the new rows in the place of the lab's old ones under this condition; all others stay as they are, and where
    the new ones are not the ``whole`` grid, so do those of other settings. Then the README. Without what is held back
    rows replace nothing: the table would show the settings that a model was designed on."""
    whole = whole and not _failed
    if not part.exists():
        return
    if not everything():
        print(f"the ledger stays as it is without --all; the rows are in {part}", flush=True)
        return
    path = DATA / "ledger" / f"{device_name()}.csv"
    old = _rows(path) if path.exists() else []
    new = [[*row[:-1], json.dumps(_facts(row) | {"condition": condition()}, sort_keys=True)] for row in _rows(part)]
    again = {tuple(row[:5]) for row in new}  # lab, model, knob, setting, quantity
    kept = [row for row in old if (row[0], _facts(row)["condition"]) != (lab, condition())
            or not (whole or tuple(row[:5]) in again)]  # fmt: skip
    names = list(CONDITIONS)
    rows = sorted([*kept, *new], key=lambda row: (LABS.index(row[0]), names.index(_facts(row)["condition"])))
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([LEDGER_COLUMNS, *rows])
    part.unlink()
    refresh_readme()


def outside_bars(
    lab: str, knob: str, receipts: Sequence[Receipt], bars: tuple[float, float], missed_frac: float = 1.0
) -> str:
    """Print how good the predictions were; a sentence where they miss their bars, else nothing.

    ``bars``: the median and the worst error of the total. ``missed_frac``: the share of totals that may lie outside
    their band. What is counted, bytes and tokens, has to be exact.
    """
    errors = [abs(receipt.error) for receipt in receipts]
    missed = sum(not receipt.within_band for receipt in receipts)
    if not receipts:
        return f"{lab}, {knob}: no setting could be measured"
    counted = [receipt.frame[receipt.frame["unit"].isin(["bytes", "tokens"])]["error"] for receipt in receipts]
    wrong = [receipt.setting for receipt, found in zip(receipts, counted, strict=True) if (found != 0).any()]
    median, worst = statistics.median(errors), max(errors)
    said = f"{knob}: median error {median:.1%}, worst {worst:.1%}, {missed} of {len(errors)} outside the band"
    print(said, flush=True)
    if median > bars[0] or worst > bars[1] or missed > missed_frac * len(errors) or wrong:
        return f"{lab}, {said}, counts wrong: {wrong}"
    return ""


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))[1:]


def _facts(row: list[str]) -> dict[str, str]:
    """The provenance of a row; one from before there were conditions is of the usual one."""
    return {"condition": USUAL, **json.loads(row[-1])}


def refresh_readme() -> None:
    """Rewrite the accuracy table in docs/accuracy.md, and in README.md its rows over all devices, each between its two
    markers."""
    rows = [
        "| device | condition | lab | quantity | settings | median error | worst error | inside band | band / error |",
        "|---|---|---|---|---:|---:|---:|---:|---:|",
        *accuracy([pd.read_csv(path) for path in ledgers()]),
    ]
    if RECORDED.exists():
        rows += ["", *published(pd.read_csv(RECORDED))]
    # heads, rules, sentences, and the rows that begin with all
    over_all = [
        row for row in rows if not row.startswith("| ") or row.startswith(("| **all** |", "| device |", "| GPU |"))
    ]
    for path, shown in ((ACCURACY, rows), (README, over_all)):
        show(path, "<!-- accuracy: written by make ledger -->\n", "<!-- /accuracy -->", shown)


def show(path: Path, begin: str, end: str, lines: Sequence[str]) -> None:
    """Put lines between these markers of a page."""
    before, rest = path.read_text(encoding="utf-8").split(begin)
    path.write_text(before + begin + "\n".join(lines) + "\n" + end + rest.split(end)[1], encoding="utf-8")


def ledgers() -> list[Path]:
    """Files of predictions beside measurements on some device."""
    own = (DATA / "ledger").glob("*.csv")
    return sorted(path for path in own if path.name != RECORDED.name and not path.name.startswith("bench-"))


def accuracy(ledgers: Sequence[pd.DataFrame]) -> Iterator[str]:
    """The table's rows: of each device and condition what has a band; of each device what is counted exactly, together;
    last, of each lab its time within the calibrated range on all of them."""
    table = pd.concat(ledgers, ignore_index=True)
    facts = [{"condition": USUAL, **json.loads(text)} for text in table["provenance"]]
    table = table.assign(
        device=[fact["device"] for fact in facts], condition=[fact["condition"] for fact in facts],
        absolute=table["error"].abs(), half=(table["high"] - table["low"]) / 2 / table["measured"],
        inside=(table["low"] <= table["measured"]) & (table["measured"] <= table["high"]),
        exact=(table["high"] == table["low"]).groupby([table["lab"], table["quantity"]]).transform("all"),
    )  # fmt: skip
    keys = ["device", "condition", "lab", "quantity", "in_range"]
    for _, of_device in table.groupby("device", sort=False):
        for (device, name, lab, quantity, in_range), group in of_device[~of_device["exact"]].groupby(keys, sort=False):
            beyond = "" if in_range else ", beyond the calibrated range"
            yield _told(device, name, lab, f"{quantity}{beyond}", group)
        for (device, lab), group in of_device[of_device["exact"]].groupby(["device", "lab"], sort=False):
            yield _told(device, "all", lab, ", ".join(group["quantity"].unique()), group)
    for lab, group in table[(table["unit"] == "ns") & table["in_range"]].groupby("lab", sort=False):
        times = group[group["quantity"] == group["quantity"].iloc[0]]
        yield _told("**all**", "all", str(lab), times["quantity"].iloc[0], times)


def published(table: pd.DataFrame) -> Iterator[str]:
    """A table of GPU runs that others published, by GPU, counter and source."""
    facts = pd.DataFrame([json.loads(text) for text in table["provenance"]])[["device", "counter", "source"]]
    inside = (table["low"] <= table["measured"]) & (table["measured"] <= table["high"])
    told = facts.assign(error=table["error"], inside=inside)
    yield "GPU runs that others published, forecast on a CPU with `forecast(device=...)`:"
    yield ""
    yield "| GPU | counter | source | runs | median error | lowest | highest | inside band |"
    yield "|---|---|---|---:|---:|---:|---:|---:|"
    groups = [*told.groupby(list(facts), sort=False), (("**all**", "all", "all"), told)]
    for names, group in groups:
        errors, num = group["error"], len(group)
        yield (f"| {' | '.join(names)} | {num} | {errors.abs().median():.2%} | {errors.min():+.2%} "
               f"| {errors.max():+.2%} | {group['inside'].sum()} of {num} |")  # fmt: skip


def _told(device: str, name: str, lab: str, quantity: str, group: pd.DataFrame) -> str:
    median, half = group["absolute"].median(), group["half"].median()
    wide = f"{half / median:.1f}" if median and half else "-"
    return (
        f"| {device} | {name} | {lab} | {quantity} | {len(group)} | {median:.1%} | {group['absolute'].max():.1%} "
        f"| {group['inside'].sum()} of {len(group)} | {wide} |"
    )
