"""Speculative decoding: its formulas against simulation, its loop against plain greedy decoding."""

import time

import numpy as np
import pytest
import torch

from effkit import models
from effkit.training import evaluating
from lessons import speculating
from lessons.speculating import best_num_draft, expected_tokens, speculate, speed_up

pytestmark = pytest.mark.usefixtures("one_thread")


def text(layers=2, seed=0, **sizes):
    given = {"hidden": 32, "heads": 2, "vocabulary": 50, "device": "cpu", **sizes}
    return models.text(layers=layers, seed=seed, **given)


def written(model, run):
    """What ``run()`` returns, and position -> token that the model read last there."""
    read = {}

    def note(_, args, kwargs):
        start = kwargs["past_key_values"].get_seq_length()
        read.update({start + i: int(token) for i, token in enumerate(kwargs["input_ids"][0])})

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        return run(), read
    finally:
        hook.remove()


def plain(target, num_steps, input_length=32) -> float:
    """Greedy decoding with no draft, from the prompt of speculate(): time per token [ns]."""
    with evaluating(target):
        cache = speculating._prefilled(target, input_length, 0)
        token = torch.zeros(1, 1, dtype=torch.long)
        start_ns = time.perf_counter_ns()
        for _ in range(num_steps):
            token = target(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        return (time.perf_counter_ns() - start_ns) / num_steps


@pytest.mark.parametrize("acceptance", [0.0, 0.3, 0.8, 1.0])
@pytest.mark.parametrize("num_draft", [0, 1, 5])
def test_expected_tokens_is_what_a_coin_gives(num_draft, acceptance):
    tossed = np.random.default_rng(0).random((100_000, num_draft)) < acceptance
    made = 1 + np.cumprod(tossed, axis=1).sum(axis=1)
    assert expected_tokens(num_draft, acceptance) == pytest.approx(made.mean(), rel=0.01)
    if acceptance < 1:
        closed = (1 - acceptance ** (num_draft + 1)) / (1 - acceptance)
        assert expected_tokens(num_draft, acceptance) == pytest.approx(closed)


def test_speed_up_of_the_paper():
    # arXiv 2211.17192, table 1: a draft model that takes no time
    published = {(2, 0.6): 1.96, (3, 0.7): 2.53, (2, 0.8): 2.44, (5, 0.8): 3.69, (2, 0.9): 2.71, (10, 0.9): 6.86}
    for (num_draft, acceptance), factor in published.items():
        assert speed_up(num_draft, acceptance, 0.0) == pytest.approx(factor, abs=0.006)
    assert speed_up(5, 0.8, 0.1) == pytest.approx(3.68928 / 1.5)
    assert speed_up(5, 0.8, 0.1, verify_frac=1.5) == pytest.approx(3.68928 / 2.0)
    assert speed_up(0, 0.8, 0.1) == 1


def test_best_number_of_drafts():
    for acceptance, draft_frac in ((0.6, 0.05), (0.8, 0.1), (0.9, 0.02)):
        best = best_num_draft(acceptance, draft_frac)
        assert 0 < best < 64
        gains = [speed_up(num, acceptance, draft_frac) for num in (best - 1, best, best + 1)]
        assert max(gains) == gains[1]
    assert best_num_draft(0.5, 0.6) == 0  # a draft that takes longer than it gains
    assert best_num_draft(1.0, 0.1) == 64
    assert best_num_draft(0.8, 0.05, extra_frac=0.2) < best_num_draft(0.8, 0.05)


@pytest.mark.parametrize("acceptance", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("num_draft", [1, 3])
def test_with_the_target_as_its_own_draft_the_text_is_that_of_plain_decoding(acceptance, num_draft):
    """Caches that were cropped wrongly would continue another text."""
    target, draft = text(), text()
    _, read = written(target, lambda: plain(target, 30, 7))
    given = {"num_steps": 24, "num_draft": num_draft, "acceptance": acceptance, "input_length": 7}
    account, speculated = written(target, lambda: speculate(target, draft, **given))
    _, drafted = written(draft, lambda: speculate(target, draft, **given))
    num_tokens = account.setting["num_tokens"]
    assert num_tokens >= 24
    assert [speculated[i] for i in range(7 + 24)] == [read[i] for i in range(7 + 24)]
    assert [drafted[i] for i in range(7 + 23)] == [read[i] for i in range(7 + 23)]  # its own last it need not read
    assert len(set(read.values())) > 5  # not one token for ever


def test_when_all_is_rejected_the_draft_has_no_say():
    target = text()
    _, read = written(target, lambda: plain(target, 12))
    other = text(1, seed=5)
    account, speculated = written(target, lambda: speculate(target, other, num_steps=12, num_draft=3, acceptance=0.0))
    assert [speculated[i] for i in range(32 + 12)] == [read[i] for i in range(32 + 12)]
    assert account.setting["num_cycles"] == 12
    assert account.setting["accepted_frac"] == 0


def test_the_account_closes_and_counts():
    target, draft = text(4), text(1)
    account = speculate(target, draft, num_steps=200, num_draft=4, acceptance=0.7)
    assert account.title == "Time of one generation"
    assert account.unit == "ns"
    assert list(account.frame.index) == ["draft", "verify", "cropping and sampling"]
    assert (account.frame["value"] > 0).all()
    assert (account.frame["basis"] == "measured").all()
    assert account.residual >= 0
    account.closed(0.2)
    setting = account.setting
    assert 200 <= setting["num_tokens"] <= 204
    assert setting["num_draft"] == 4
    assert setting["num_tokens"] / setting["num_cycles"] == pytest.approx(expected_tokens(4, 0.7), rel=0.25)
    assert setting["accepted_frac"] == pytest.approx(0.7, abs=0.1)
    again = speculate(target, draft, num_steps=200, num_draft=4, acceptance=0.7)
    assert again.setting == setting
    other = speculate(target, draft, num_steps=200, num_draft=4, acceptance=0.7, seed=1)
    assert other.setting["accepted_frac"] != setting["accepted_frac"]
    full = speculate(target, draft, num_steps=50, num_draft=4, acceptance=1.0)
    assert (full.setting["num_cycles"], full.setting["num_tokens"]) == (10, 50)
    assert target.training  # as it was
    assert draft.training


def test_the_formula_finds_the_measured_gain():
    target, draft = text(8, hidden=64), text(1, hidden=32)
    for run in range(2):  # the first warms up
        step_ns = plain(target, 40 if run else 2)
        speculated = speculate(target, draft, num_steps=100 if run else 2, num_draft=4, acceptance=0.9)
    made = speculated.setting["num_tokens"] / speculated.setting["num_cycles"]
    draft_ns, verify_ns, rest_ns = speculated.frame["value"] / speculated.setting["num_cycles"]
    draft_frac, verify_frac = draft_ns / 4 / step_ns, (verify_ns + rest_ns) / step_ns
    assert 0 < draft_frac < 0.8
    predicted = speed_up(4, 0.9, draft_frac, verify_frac) * made / expected_tokens(4, 0.9)  # the coin's luck taken out
    gain = step_ns * speculated.setting["num_tokens"] / speculated.total
    assert gain == pytest.approx(predicted, rel=0.1)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: expected_tokens(-1, 0.5), "num_draft is -1 and acceptance 0.5, expected at least 0 tokens"),
        (lambda: speed_up(3, 1.5, 0.1), "acceptance 1.5, expected"),
        (lambda: speed_up(3, 0.5, 0.1, verify_frac=0.0), "draft_frac is 0.1 and verify_frac 0.0, expected"),
        (lambda: speculate(text(), text(), num_draft=0), "num_draft is 0 and acceptance 0.8, expected at least 1"),
        (lambda: speculate(text(), text(), batch=2), "batch is 2, expected 1"),
        (lambda: speculate(text(), text(vocabulary=51)), "target and draft know 50 and 51 tokens"),
        (lambda: speculate(text(), text(), num_steps=0), "num_steps is 0 and input_length 32, expected at least 1"),
        (lambda: speculate(text(max_input_cells=40), text()), "takes 105 positions; Text has 40"),
        (
            lambda: speculate(models.speech(hidden=32, device="cpu"), text()),
            "Speech is not a decoder-only language model",
        ),
    ],
)
def test_wrong_questions_are_refused_in_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


def test_models_are_restored_after_an_error(monkeypatch):
    target, draft = text(), text(1)

    def broken(*_):
        raise RuntimeError("no prompt")

    monkeypatch.setattr(speculating, "_prefilled", broken)
    with pytest.raises(RuntimeError, match="no prompt"):
        speculate(target, draft)
    assert all(module.training for model in (target, draft) for module in model.modules())
