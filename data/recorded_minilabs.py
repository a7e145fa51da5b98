"""Eight seeds of each mini-lab: ``data/minilabs.csv``, and the figures of ``data/claims.csv`` that are made from them.

Figures depend on the seed alone, on one machine with one Python. Those that are times depend on the machine as well:
their seeds are spread over its conditions, as the ledger has them (``--condition``).
"""

from __future__ import annotations

import csv
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch
from ledger_rows import CONDITIONS, DATA, condition, everything

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


def record(name: str) -> None:
    """Run a lab over the seeds that are missing or, where all is run anew, over all; other rows stay as they are.

    Of times only the seeds whose turn it is under the condition of this process.
    """
    lab, order, conditions = LABS[name], list(LABS), list(CONDITIONS)
    here = [str(seed) for seed in SEEDS if not lab.clocked or conditions[seed % len(conditions)] == condition()]
    torch.set_num_threads(CONDITIONS[condition()].num_threads)
    old = _read(STORED)[1:] if STORED.exists() else []
    old = [row for row in old if row[0] != name or row[2] not in here or not everything()]
    stored = {row[2] for row in old if row[0] == name}
    date, machine = datetime.now(UTC).date().isoformat(), f"{provenance()['device']}, {condition()}"
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=DATA, capture_output=True, text=True, check=True
    ).stdout.strip()
    start = time.process_time()
    new = [
        [name, arm, seed, f"{one.figure:.6g}", lab.unit, one.steps, date, machine, commit]
        for seed in here
        if seed not in stored
        for arm, one in lab.arms(lab.run(int(seed))).items()
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


def _read(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def _write(path: Path, table: Sequence[Sequence[object]]) -> None:
    with replacing(path) as whole, whole.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
