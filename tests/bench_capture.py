"""The bar on capturing: a light capture of a 50 ms step against the same step without it (`make bench`)."""

from __future__ import annotations

import statistics

import pandas as pd
import torch
from bench_table import row

import effkit as ek

BAR = 0.04
NUM_CAPTURES = 9


def test_a_light_capture_costs_little():
    """Each capture times plain steps on both sides of the recorded ones, so that drift cancels."""
    torch.set_num_threads(1)
    model = ek.models.text(hidden=128, layers=2)
    lengths = pd.DataFrame({"input_length": [192] * 4})
    batch = model.make_batch([[row] for row in lengths.index], lengths)
    update = torch.optim.AdamW(model.parameters())

    def step():
        model(**batch).loss.backward()
        update.step()
        update.zero_grad(set_to_none=True)

    seen = [ek.capture(step, steps=5).provenance for _ in range(NUM_CAPTURES)]
    overhead = statistics.median(p["overhead_frac"] for p in seen)
    plain_ms = statistics.median(p["step_ns"] for p in seen) / 1e6
    assert 30 < plain_ms < 90, f"the bar is for a step of about 50 ms; this one takes {plain_ms:.0f}: change the model"
    print(f"\n\na step of {plain_ms:.0f} ms")
    assert row("light capture of a step of about 50 ms", 100 * overhead, 100 * BAR, "%")
