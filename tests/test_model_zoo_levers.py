"""A dozen unlike models at sizes that nobody ran, under pairs of levers, and under levers that are called lossless;
``make bench`` does all of the zoo."""

from __future__ import annotations

import statistics

import pytest
from zoo_receipts import NOT_LOSSLESS_FRAC, ROUNDING_FRAC, gradient_errors, receipts

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
SPREAD = (
    "WaveNet", "residual net with batch norm", "points", "sparse embeddings", "memory bank", "checkpoints itself",
    "graph network", "contrastive", "U-Net", "GPT-2", "vector quantised", "hypernetwork",
)  # fmt: skip
# in statistics of the batch, in a loss over pairs, in a memory that fills up, in a weight that is made of the batch
SEE_EACH_OTHER = {"residual net with batch norm", "contrastive", "memory bank", "hypernetwork"}
MEDIAN_FRAC, WORST_FRAC = 0.001, 0.03


@pytest.fixture(scope="module")
def errors():
    return []


@pytest.mark.parametrize("name", SPREAD)
def test_it_is_predicted_where_it_was_not_run(name, errors):
    found = dict(receipts(name))
    assert len(found) >= 3
    for setting, receipt in found.items():
        if isinstance(receipt, str):
            assert name == "sparse embeddings", receipt
            assert "measured, not forecast: at" in receipt
        elif receipt.predicted.in_range:
            assert abs(receipt.error) <= WORST_FRAC, setting
            errors.append(abs(receipt.error))


def test_most_are_predicted_to_the_byte(errors):
    """Of those that this process has measured."""
    if len(errors) < 10:
        pytest.skip("too few models were measured in this process")
    assert statistics.median(errors) <= MEDIAN_FRAC


@pytest.mark.parametrize("name", SPREAD)
def test_levers_that_are_called_lossless_leave_the_gradient_as_it_is(name):
    found = dict(gradient_errors(name))
    parts = found.pop("micro_batches=2")
    assert found
    assert set(found.values()) == {0.0}, "bit for bit"
    assert parts > NOT_LOSSLESS_FRAC if name in SEE_EACH_OTHER else parts <= ROUNDING_FRAC
