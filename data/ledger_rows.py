"""The error ledger as a file, ``data/ledger/<device>.csv``: one lab's rows replaced; and the table in README.md."""

from __future__ import annotations

import csv
import json
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from effkit.device import provenance
from effkit.receipt import LEDGER_COLUMNS, Receipt
from effkit.whole_files import replacing

DATA = Path(__file__).resolve().parent
README = DATA.parent / "README.md"
sys.path.append(str(DATA.parent / "notebooks"))  # where a ledger imports `lessons` from, as a notebook does
LABS = ("padding", "activations", "moe", "decoder", "advice")  # in this order in the file


def device_name() -> str:
    """This device, as files are named after it."""
    return re.sub(r"[^a-z0-9]+", "-", provenance()["device"].lower()).strip("-")


def begun(lab: str) -> Path:
    """Where a lab's new rows are collected; nothing is there yet."""
    part = DATA / "ledger" / f"{device_name()}.{lab}.part"
    part.unlink(missing_ok=True)
    return part


def replace_rows(lab: str, part: Path) -> None:
    """Put the new rows in the place of the lab's old ones; those of other labs stay as they are. Then the README."""
    path = DATA / "ledger" / f"{device_name()}.csv"
    kept = [row for row in _rows(path) if row[0] != lab] if path.exists() else []
    rows = sorted([*kept, *_rows(part)], key=lambda row: LABS.index(row[0]))
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


def refresh_readme() -> None:
    """Rewrite the accuracy table between its two markers."""
    rows = [
        "| device | lab | quantity | settings | median error | worst error | inside band |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for path in sorted((DATA / "ledger").glob("*.csv")):
        ledger = pd.read_csv(path)
        inside = (ledger["low"] <= ledger["measured"]) & (ledger["measured"] <= ledger["high"])
        ledger = ledger.assign(absolute=ledger["error"].abs(), inside=inside)
        device = json.loads(ledger["provenance"].iloc[0])["device"]
        for (lab, quantity, in_range), group in ledger.groupby(["lab", "quantity", "in_range"], sort=False):
            beyond = "" if in_range else ", beyond the calibrated range"
            rows.append(
                f"| {device} | {lab} | {quantity}{beyond} | {len(group)} | {group['absolute'].median():.1%} "
                f"| {group['absolute'].max():.1%} | {group['inside'].sum()} of {len(group)} |"
            )
    text = README.read_text(encoding="utf-8")
    begin, end = "<!-- accuracy: written by make ledger -->\n", "<!-- /accuracy -->"
    before, rest = text.split(begin)
    README.write_text(before + begin + "\n".join(rows) + "\n" + end + rest.split(end)[1], encoding="utf-8")
