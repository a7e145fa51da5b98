"""The ledger's rows of advice: training loops and generations with one thing wrong, and what is said of each."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from ledger_rows import begun, failed, going_on, replace_rows

import effkit as ek
from effkit.device import Device

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import planted

FIRST_FRAC, WITHIN_FRAC = 11 / 12, 0.9
ROWS_FRAC, PAGE_SECONDS = 0.05, 30.0
_FASTER = 1.5  # bfloat16 products than float32 ones: where they are not, nothing is wrong with float32


def record() -> str:
    """Study each, and measure every candidate, helpful or not; returns what misses its bar."""
    torch.set_num_threads(1)
    part, rates = begun("advice"), Device.here(refresh=True).rate_flops_per_s
    kinds = [make for make in (*planted.TRAINING, *planted.GENERATING, planted.hot_expert) if make is not planted.clean]
    if rates["bfloat16"] < _FASTER * rates["float32"]:
        faster = rates["bfloat16"] / rates["float32"]
        print(f"left out: single_precision; this device multiplies {faster:.1f} times as fast in bfloat16")
        kinds.remove(planted.single_precision)
    broken: list[str] = []
    receipts: list[ek.Receipt] = []
    first = 0
    for make in kinds:
        with going_on(f"advice, {make.__name__}"):
            torch.manual_seed(0)
            problem = make()
            begin = time.perf_counter()
            study = ek.study(**problem.study)
            overview = study.overview()
            seconds = time.perf_counter() - begin
            advice = study.advise(**problem.advise)
            found = advice[0].kind if advice else "nothing"
            first += found == problem.kind
            print(f"{make.__name__}: {found} first, {seconds:.0f} s to the first page", advice, sep="\n", flush=True)
            if seconds > PAGE_SECONDS:
                broken.append(f"{make.__name__}: {seconds:.0f} s to the first page")
            if "step" in problem.study:
                broken += _closes(make.__name__, overview)
            for lever in (*advice.levers, *advice.rejected):
                receipt = lever.measure()
                receipts.append(receipt)
                print(receipt.sentence(), flush=True)
                knob = f"{make.__name__}: {lever.kind}"
                receipt.append_to(part, lab="advice", model=type(problem.study["model"]).__name__, knob=knob)
                if lever.helps and receipt.measured.total >= lever.base.total:
                    broken.append(f"{knob} was promised to help, and does not")
    with going_on("advice, clean"):
        said = ek.study(**planted.clean().study).advise()
        print("clean:", said, flush=True)
        if said:
            broken.append(f"a clean model: {said[0].name} is advised")
    within, measured = sum(receipt.within_band for receipt in receipts), len(receipts)
    print(f"first in {first} of {len(kinds)}; measured within the band in {within} of {measured} candidates")
    if first < FIRST_FRAC * len(kinds):
        broken.append(f"found and ranked first in {first} of {len(kinds)}")
    if within < WITHIN_FRAC * measured:
        broken.append(f"within the band in {within} of {measured}")
    replace_rows("advice", part)
    return "; ".join([*broken, *failed()])


def _closes(name: str, overview: ek.advice.Overview) -> list[str]:
    rows, memory = overview.time.residual / overview.time.total, overview.memory.residual
    return [] if abs(rows) <= ROWS_FRAC and not memory else [f"{name}: rows {rows:+.1%}, memory {memory:+,} bytes"]
