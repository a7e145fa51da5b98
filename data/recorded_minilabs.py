"""Eight seeds of each mini-lab: ``data/minilabs.csv``, and the figures of ``data/claims.csv`` that are made from them.

Figures depend on the seed alone, on one machine with one Python. Those that are times depend on the machine as well:
their seeds are spread over the ledger's conditions.
"""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from ledger_rows import CONDITIONS, DATA, USUAL, condition, everything

from effkit.claims.table import rows
from effkit.device import provenance
from effkit.whole_files import replacing
from lessons import page_labs
from lessons.cluster.labs import LABS as CLUSTER
from lessons.generators.labs import LABS as GENERATORS
from lessons.minilabs import COLUMNS, SEEDS, MiniLab, stored_on, stored_rows
from lessons.precision.labs import LABS as PRECISION
from lessons.steps.labs import LABS as STEPS
from lessons.tokens.labs import LABS as TOKENS

STORED, CLAIMS = DATA / "minilabs.csv", DATA / "claims.csv"
LABS = {lab.name: lab for lab in (*STEPS, *GENERATORS, *TOKENS, *PRECISION, *CLUSTER, *page_labs.LABS)}
RATIOS = "times"  # the unit of rows whose mean is geometric


def to_run(name: str, under: str, *, again: bool) -> list[int]:
    """The seeds that a lab is to run under a condition: of times those whose turn it is, of all else every one under
    the usual condition; not ``again`` those that are stored."""
    turns = list(CONDITIONS) if LABS[name].clocked else [USUAL]
    stored = set() if again else {int(row[2]) for row in _stored() if row[0] == name}
    return [seed for seed in SEEDS if turns[seed % len(turns)] == under and seed not in stored]


def record(name: str) -> None:
    """Run a lab over its seeds under the condition of this process: those that are missing or, where all is run anew,
    all. Other rows stay as they are."""
    lab, order, seeds = LABS[name], list(LABS), to_run(name, condition(), again=everything())
    torch.set_num_threads(CONDITIONS[condition()].num_threads)
    old = [row for row in _stored() if row[0] != name or int(row[2]) not in seeds]
    date, machine = datetime.now(UTC).date().isoformat(), f"{provenance()['device']}, {condition()}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=DATA, capture_output=True, text=True, check=True
    ).stdout.strip()
    start = time.process_time()
    new = [
        [name, arm, str(seed), f"{one.figure:.6g}", lab.unit, one.steps, date, machine, commit]
        for seed in seeds
        for arm, one in lab.arms(lab.run(seed)).items()
    ]
    every = sorted([*old, *new], key=lambda row: (order.index(row[0]), int(row[2])))
    _write(STORED, [list(COLUMNS), *every])
    print(f"{name}: {len(new)} figures, {time.process_time() - start:.1f} CPU s", flush=True)
    stored_rows.cache_clear()
    write_claims()


def figures_of(lab: MiniLab[object], paper: str) -> dict[str, str]:
    """What the row of a paper says of the stored seeds: columns of ``data/claims.csv``."""
    found = lab.interval(paper, ratios=rows()[paper].unit == RATIOS)
    date, machine = stored_on(lab.name)
    numbers = dict(zip(("stored", "stored_low", "stored_high", "run_low", "run_high"), found, strict=True))
    return {
        **{name: f"{value:.3g}" for name, value in numbers.items()},
        "stored_seeds": str(len(lab.stored())), "stored_on": date, "stored_machine": machine,
    }  # fmt: skip


def write_claims() -> None:
    """Put the stored seeds' figures into the rows that rest on a mini-lab, once it has all seeds."""
    head, *table = _read(CLAIMS)
    num_stored = stored_rows().groupby("lab")["seed"].nunique()
    whole = [lab for lab in LABS.values() if num_stored.get(lab.name) == len(SEEDS)]
    by_paper = {paper: lab for lab in whole for paper in lab.claims}
    made = []
    for cells in table:
        row = dict(zip(head, cells, strict=True))
        if row["paper"] in by_paper:
            row |= figures_of(by_paper[row["paper"]], row["paper"])
        made.append(list(row.values()))
    _write(CLAIMS, [head, *made])
    rows.cache_clear()


def _stored() -> list[list[str]]:
    return _read(STORED)[1:] if STORED.exists() else []


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _write(path: Path, table: Sequence[Sequence[object]]) -> None:
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
