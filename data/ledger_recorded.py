"""Peaks that others recorded on GPUs and published, forecast anew: ``data/ledger/recorded_gpus.csv``.

What was measured stands in that file, with its source, and stays; what is predicted is written again. No GPU is needed.
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import recorded_llama
import torch
from ledger_rows import RECORDED, everything, refresh_readme, unheld
from recorded_decoder import OPTIMIZERS, Decoder

import effkit as ek
from effkit import activations
from effkit.receipt import LEDGER_COLUMNS
from effkit.whole_files import replacing

MEDIAN_FRAC, WORST_FRAC, LEAST_FRAC = 0.003, 0.03, -0.02  # of the errors; the last of forecasts that are too low
OWN_CODE = "code of its own"  # which nobody has read: such a decoder is forecast as the others, and holds no bar


def forecast(setting: Mapping[str, Any]) -> ek.Account:
    """The account of a recorded step: a training step, on ranks or not, or without an optimizer a forward pass."""
    if "ranks" in setting:
        return recorded_llama.forecast(setting)
    trains = not setting["optimizer"].startswith("none")
    with torch.device("meta"):
        model = Decoder(setting["size"], setting["length"], setting["loss"], setting["recompute"],
                        keeps_casts=setting["optimizer"] != "none, inference mode")  # fmt: skip
    tokens = torch.zeros(setting["batch_size"], setting["length"], dtype=torch.long)
    return activations.forecast(
        model, (tokens, tokens.clone()) if trains else tokens, loss=lambda loss: loss, trains=trains,
        optimizer=OPTIMIZERS.get(setting["optimizer"]), device=setting["chip"], autocast=setting["autocast"],
    )  # fmt: skip


def counted(account: ek.Account, quantity: str) -> ek.Account:
    """The account or its companion of this title."""
    return account if account.title == quantity else account.companion(quantity)


def record() -> str:
    """Forecast the rows, without the third that is held back unless it is asked for; a sentence if a bar is missed."""
    rows = pd.read_csv(RECORDED, dtype=str, keep_default_na=False).to_dict("records")
    told = list(_forecast_again(unheld(rows)))
    known = [row for row in told if OWN_CODE not in row["model"]]
    errors = [float(row["error"]) for row in known]
    median, worst = statistics.median(map(abs, errors)), max(map(abs, errors))
    missed = [row for row in told if not int(row["low"]) <= int(row["measured"]) <= int(row["high"])]
    said = (f"{len(known)} published GPU runs whose code is known: median error {median:.2%}, worst {worst:.2%}, "
            f"lowest {min(errors):.2%}; {len(missed)} of {len(told)} outside the band")  # fmt: skip
    print(said, flush=True)
    if everything():
        with replacing(RECORDED) as whole, whole.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, LEDGER_COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(told)
        refresh_readme()
    beyond = median > MEDIAN_FRAC or worst > WORST_FRAC or min(errors) < LEAST_FRAC
    return said if beyond or missed else ""


def _forecast_again(rows: list[dict[str, str]]) -> Iterator[dict[str, str]]:
    accounts: dict[str, ek.Account] = {}  # some runs were counted in two ways
    for row in rows:
        if row["setting"] not in accounts:
            accounts[row["setting"]] = forecast(json.loads(row["setting"]))
        guess, measured = counted(accounts[row["setting"]], row["quantity"]), int(row["measured"])
        found = {"predicted": str(guess.total), "low": str(guess.low), "high": str(guess.high),
                 "error": f"{guess.total / measured - 1:.6f}", "in_range": str(guess.in_range)}  # fmt: skip
        print(f"{found['error']} {row['quantity']} {row['setting']}", flush=True)
        yield row | found
