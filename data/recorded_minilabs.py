"""Eight seeds of each mini-lab: ``data/minilabs.csv``, and the figures of ``data/claims.csv`` that are made from them.

Figures depend on the seed alone, on one machine with one Python; nothing here is a time.
"""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import ledger_rows
import torch

from effkit.claims.table import rows
from effkit.device import provenance
from effkit.whole_files import replacing
from lessons.generators.labs import LABS as GENERATORS
from lessons.minilabs import COLUMNS, SEEDS, MiniLab, stored_rows
from lessons.precision.labs import LABS as PRECISION
from lessons.steps.labs import LABS as STEPS
from lessons.tokens.labs import LABS as TOKENS

DATA = ledger_rows.DATA
STORED, CLAIMS = DATA / "minilabs.csv", DATA / "claims.csv"
LABS = {lab.name: lab for lab in (*STEPS, *GENERATORS, *TOKENS, *PRECISION)}
RATIOS = "times"  # the unit of rows whose mean is geometric


def record(names: Sequence[str], *, again: bool = True) -> None:
    """Run the labs, each over all seeds or, not again, over those that are missing; other rows stay as they are."""
    torch.set_num_threads(1)
    date, machine = datetime.now(UTC).date().isoformat(), f"{provenance()['device']}, one thread"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=DATA, capture_output=True, text=True, check=True
    ).stdout.strip()
    for name in names:
        lab, start, order = LABS[name], time.process_time(), list(LABS)
        old = _read(STORED)[1:] if STORED.exists() else []
        old = [row for row in old if row[0] != name or not again]
        seeds = [seed for seed in SEEDS if [name, str(seed)] not in [[row[0], row[2]] for row in old]]
        new = [
            [name, arm, str(seed), f"{one.figure:.6g}", lab.unit, one.steps, date, machine, commit]
            for seed in seeds
            for arm, one in lab.arms(lab.run(seed)).items()
        ]
        every = sorted([*old, *new], key=lambda row: (order.index(row[0]), int(row[2])))
        _write(STORED, [list(COLUMNS), *every])
        print(f"{name}: {len(seeds)} seeds, {time.process_time() - start:.1f} CPU s", flush=True)
    stored_rows.cache_clear()
    write_claims()


def figures_of(lab: MiniLab[object], paper: str) -> dict[str, str]:
    """What the row of a paper says of the stored seeds: columns of ``data/claims.csv``."""
    found = lab.interval(paper, ratios=rows()[paper].unit == RATIOS)
    first = stored_rows().query("lab == @lab.name").iloc[0]
    numbers = dict(zip(("stored", "stored_low", "stored_high", "run_low", "run_high"), found, strict=True))
    return {
        **{name: f"{value:.3g}" for name, value in numbers.items()},
        "stored_seeds": str(len(lab.stored())), "stored_on": first["date"], "stored_machine": first["machine"],
    }  # fmt: skip


def write_claims() -> None:
    """Put the stored seeds' figures into the rows that rest on a mini-lab."""
    head, *table = _read(CLAIMS)
    by_paper = {paper: lab for lab in LABS.values() for paper in lab.claims}
    made = []
    for cells in table:
        row = dict(zip(head, cells, strict=True))
        if row["paper"] in by_paper:
            row |= figures_of(by_paper[row["paper"]], row["paper"])
        made.append(list(row.values()))
    _write(CLAIMS, [head, *made])
    rows.cache_clear()


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _write(path: Path, table: Sequence[Sequence[object]]) -> None:
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
