"""The exercises of 06c accept the right answer alone, and what it forecasts is made of what is stored."""

import pandas as pd
import pytest
from test_exercises import in_notebook, refused

from lessons.minilabs import Interval
from lessons.tokens import filtering, labs, mixtures

NAME = "06c_data_per_token"
PROXY_STEPS = 24 * 60


def test_the_cells_of_06c_accept_the_right_answer_alone():
    means = labs.META_RATER.stored().mean()
    check = in_notebook(NAME, "my_runs = 1\n", means=means, proxy_steps=PROXY_STEPS)
    check("my_runs = 8\n")  # 1440 / (642.5 - 442.5) = 7.2
    refused(check, *(f"my_runs = {n}\n" for n in (1, 7, 9, 24, 0, "'8'")))

    first = (
        "def my_share(law, num_steps, tolerance):\n    return tolerance  # two or three lines of yours\n"
        "\n\nmy_percent = 50\n"
    )
    check = in_notebook(NAME, first, mixtures=mixtures)
    room = "(tolerance - law.offset) / (law.scale * steps**law.t)"
    code = f"def my_share(law, steps, tolerance):\n    return ({room}) ** (1 / law.s)\n\n\nmy_percent = {{}}\n"
    check(code.format(56))  # 0.108 / (0.012 * 30) = 0.3, and 0.3 ** (1 / 2.1) = 0.5637
    refused(check, *(code.format(n) for n in (50, 55, 57, 100)), code.replace(" - law.offset", "").format(56))
    refused(
        check, *(code.replace(room, wrong).format(56) for wrong in ("tolerance", f"2 * {room}", f"({room}) / steps"))
    )


def test_the_forecast_carries_how_far_stored_seeds_lay_from_their_laws():
    law = mixtures.MixtureLaw(-0.01, 0.02, 2.0, 0.5, 0.0, (0.2, 0.8))
    index = pd.MultiIndex.from_product([(0.2, 0.4), (150, labs.NUM_STEPS)], names=["ratio_frac", "step"])
    runs = pd.DataFrame({"general": [0.0, 0.01, 0.02, 0.031]}, index=index)
    base = labs.fitted(labs.Continued(runs, law, 0.5, 0.06, 0.05), 0.4)
    assert (base.total, base.setting) == (31, {"domain_frac": 0.4})
    stored = labs.CMR.stored()
    miss = Interval.of(stored["run"] - stored["predicted"], ratios=False)
    assert base.calibration == (law, labs.NUM_STEPS, (miss.run_low, miss.run_high))
    found = mixtures.predict(base, domain_frac=0.6)
    change = -0.01 + 0.02 * 0.36 * labs.NUM_STEPS**0.5
    assert found.total == round(1000 * change)
    assert (found.low, found.high) == (round(1000 * (change + miss.run_low)), round(1000 * (change + miss.run_high)))


def test_the_density_correlation_is_the_mean_of_both_classifiers_and_tasks():
    rising = pd.DataFrame({"density": [0.1, 0.2, 0.3], "logistic": [1, 2, 3], "hinge": [1, 2, 3]})
    mixed = rising.assign(logistic=[3, 2, 1])
    tables = {"prose or comments": rising, "which module": mixed}
    assert labs.DENSITY.claim("Feature density", tables) == pytest.approx((1 + 1 - 1 + 1) / 4)
    assert [arm.figure for arm in labs.DENSITY.arms(tables).values()] == pytest.approx([1, 0])


def test_a_classifier_learns_what_the_model_likes(monkeypatch):
    documents = ["good words here", "bad marks there"] * 30
    scores = {document: float(document.startswith("good")) for document in documents}

    def perplexity(model, texts):
        return filtering.torch.tensor([scores[one] for one in texts])

    monkeypatch.setattr(filtering, "perplexity_scores", perplexity)
    alike, rates = filtering.replaced(None, documents, num_judged=40, num_repeats=1)
    assert alike == 1
    assert list(rates.index) == ["language model", "classifier"]
    assert (rates > 0).all()
