"""FLOPs of a plan's epoch against those that a hand counts, and never fewer than those of its real cells."""

import pandas as pd
import pytest

from effkit.padding import plan
from lessons.bucket_profiles import forward_flops

LENGTHS = pd.DataFrame({"input_length": [800, 400], "output_length": [10, 5]})


def test_flops_by_hand():
    h, rows, t, u = 2, 2, 100, 10  # T after 8x subsampling
    encoder = 24 * h * h * t + 4 * h * t * t
    decoder = 24 * h * h * u + 4 * h * u * u + 4 * h * h * (u + t) + 4 * h * u * t
    account = forward_flops(
        plan(LENGTHS, "sorted", batch_size=2), hidden=h, encoder_layers=3, decoder_layers=5, subsampling=8
    )
    assert account.unit == "FLOPs"
    assert account.total == rows * (3 * encoder + 5 * decoder)
    short = 3 * (24 * 4 * 50 + 8 * 50**2) + 5 * (24 * 4 * 5 + 8 * 25 + 16 * 55 + 8 * 5 * 50)
    assert account.frame.loc["real", "value"] == 3 * encoder + 5 * decoder + short


@pytest.mark.parametrize(("strategy", "limits"), [("random", {"batch_size": 2}), ("pack", {"max_input_cells": 1200})])
def test_the_account_closes_on_the_shapes(strategy, limits):
    account = forward_flops(plan(LENGTHS, strategy, **limits)).closed()
    assert (account.frame["value"] >= 0).all()
