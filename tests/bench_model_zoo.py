"""All of the zoo at other sizes, under pairs of levers and under lossless levers: ``make bench``; wants minutes."""

from __future__ import annotations

import statistics

import pytest
from zoo import ZOO
from zoo_receipts import NOT_LOSSLESS_FRAC, ROUNDING_FRAC, gradient_errors, receipts

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]


def test_predictions_over_the_zoo():
    print(f"\n\n{'model':<36}{'setting':<52}{'error':>9}  in range")
    errors, said = [], {}
    for name in ZOO:
        for setting, receipt in receipts(name):
            if isinstance(receipt, str):
                said[name] = receipt
                continue
            chance = "dropped by chance" in receipt.predicted.source  # how many layers a step has is not foretold
            assert receipt.within_band or not chance
            errors += [abs(receipt.error)] * (receipt.predicted.in_range and not chance)
            print(f"{name:<36}{setting:<52}{receipt.error:>+9.3%}  {receipt.predicted.in_range}")
    print(f"{len(errors)} in range: median {statistics.median(errors):.3%}, worst {max(errors):.3%}")
    print(*(f"{name}: {why}" for name, why in said.items()), sep="\n")
    assert len(said) <= 2
    assert statistics.median(errors) <= 0.001
    assert max(errors) <= 0.03


def test_lossless_levers_over_the_zoo():
    found = [(name, *one) for name in ZOO for one in gradient_errors(name)]
    print("\n", *(f"{name:<36}{lever:<40}{error:.2g}" for name, lever, error in found if error), sep="\n")
    assert not [one for one in found if one[1] != "micro_batches=2" and one[2] > ROUNDING_FRAC]
    assert not [one for one in found if ROUNDING_FRAC < one[2] <= NOT_LOSSLESS_FRAC], "neither rounding nor said"
