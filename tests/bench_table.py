"""The table of benches: each row is printed beside its bar, and kept in ``data/ledger/bench-<device>.csv``.

README.md shows five of them.
"""

from __future__ import annotations

import csv
import datetime
import sys
from pathlib import Path

from effkit.whole_files import replacing

DATA = Path(__file__).resolve().parents[1] / "data"
sys.path.append(str(DATA))

from ledger_rows import README, device_name, show  # noqa: E402

COLUMNS = ("work", "measured", "unit", "bar", "held", "date")
SHOWN = ("effkit report of 10 MB, CPU", "forecast of 7 B, {}", "first move of a slider",
         "Measure it, notebook 03, later presses", "study() to its page, planted loops, median")  # fmt: skip


def row(work: str, measured: float, bar: float, unit: str = "s", *, at_least: bool = False) -> bool:
    """Print it, put it into the place of the row of the same work, and say whether the bar is held.

    The bar is the most that may be measured, or ``at_least`` so much.
    """
    held = measured >= bar if at_least else measured <= bar
    sign = ">=" if at_least else "<="
    print(f"\n  {work}: {measured:.3g} {unit}, bar {sign} {bar:g}: {'held' if held else 'MISSED'}")
    path = DATA / "ledger" / f"bench-{device_name()}.csv"
    rows = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = {one["work"]: one for one in csv.DictReader(file)}
    rows[work] = dict(zip(COLUMNS, (work, f"{measured:.3g}", unit, f"{sign} {bar:g}", "yes" if held else "no",
                                    datetime.date.today().isoformat()), strict=True))  # fmt: skip
    with replacing(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in sorted(rows))
    _show(rows)
    return held


def _show(rows: dict[str, dict[str, str]]) -> None:
    """Five of them in README.md, between their markers."""
    lines = ["| work | measured | aimed at |", "|---|---:|---:|"]
    for one in (rows[work] for work in SHOWN if work in rows):
        name = one["work"].replace(", {}", "").replace("_", " ")
        lines.append(f"| {name} | {one['measured']} {one['unit']} | {one['bar']} {one['unit']} |")
    show(README, "<!-- bench: written by make bench -->\n", "<!-- /bench -->", lines)
