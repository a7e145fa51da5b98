"""The padding lab's rows of the error ledger: how long an epoch takes with other batches."""

from __future__ import annotations

import statistics

import pandas as pd
import torch
from ledger_rows import DATA, begun, failed, going_on, replace_rows, unheld

import effkit as ek
from effkit import padding
from effkit.device import provenance
from effkit.padding.prediction import complete, plan_at

# Settings that no calibration sees. Do not tune to them.
BASE = {"strategy": "random", "batch_size": 16}
HELD_OUT = (
    {"strategy": "sorted"},
    {"strategy": "bucket", "num_buckets": 8},
    {"strategy": "bucket", "num_buckets": 4, "batch_size": 24},
    {"strategy": "bucket2d", "num_buckets": 6},
    {"strategy": "optimal", "num_buckets": 6},
    {"strategy": "token_budget"},
    {"batch_size": 8},
    {"max_length": 800},
)
BARS = (0.03, 0.08)  # median and worst error of an epoch's time
MISSED_FRAC = 0.1  # of the times, outside their band


def spoken(num_examples: int) -> pd.DataFrame:
    """A fixed sample of the list, at most 16 s long."""
    lengths = padding.lengths(DATA / "spoken_docs.csv")
    return lengths[lengths["input_length"] <= 1600].sample(num_examples, random_state=0).reset_index(drop=True)


def record() -> str:
    """Predict and measure every held-out setting, each in turn with the base; returns what is outside the bar."""
    gpu = torch.cuda.is_available()
    part = begun("padding")
    lengths = spoken(2048 if gpu else 256)
    model = ek.models.speech(**({"hidden": 512, "encoder_layers": 12, "decoder_layers": 6, "heads": 8} if gpu else {}))
    scale = 4 if gpu else 1
    base_plan = padding.plan(lengths, BASE["strategy"], batch_size=BASE["batch_size"] * scale)
    base = padding.measure(base_plan, model, num_batches=8)
    receipts, miscounted = [], []
    for setting in unheld(HELD_OUT):
        with going_on(f"padding, {setting}"):
            wanted = {k: v * scale if k == "batch_size" else v for k, v in setting.items()}
            predicted = padding.predict(base, **wanted)
            full = complete(base, wanted)
            measured = padding.measure(plan_at(base, full), model, num_batches=8, base=base)
            receipt = ek.Receipt(predicted, measured, setting=full, provenance=provenance())
            receipt.append_to(part, lab="padding", model="speech", knob=next(iter(setting)))
            receipts.append(receipt)
            counted = receipt.frame[receipt.frame["unit"].isin(["cells", "steps"])]
            if (counted["error"] != 0).any():
                miscounted.append(setting)
            print(setting, receipt, sep="\n", flush=True)
    replace_rows("padding", part)
    if not receipts:
        return "; ".join(failed())
    errors = [abs(receipt.error) for receipt in receipts]
    missed = sum(not receipt.within_band for receipt in receipts)
    median, worst = statistics.median(errors), max(errors)
    said = f"median error {median:.1%}, worst {worst:.1%}, {missed} of {len(errors)} outside the band"
    print(said)
    if median > BARS[0] or worst > BARS[1] or missed > MISSED_FRAC * len(errors) or miscounted:
        return "; ".join([f"padding: {said}, counts wrong: {miscounted}", *failed()])
    return "; ".join(failed())
