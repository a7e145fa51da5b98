"""Loops with one thing wrong: it is found, ranked first, and the receipt shows the gain. Large gains only: the others,
and how near predictions come, are in the ledger (`make ledger LAB=advice`)."""

import planted
import pytest
import torch

import effkit as ek

pytestmark = pytest.mark.usefixtures("one_thread")
LARGE = (planted.no_op_grouping, planted.tiny_batches, planted.starved, planted.cache_off, planted.deep_decoder)
EXACT = (planted.zeroed_gradients, planted.leaking)  # bytes, which are the same on every run
# What is wrong is so in each batch and in each call. Tiny batches are put together from all that a study draws.
ENOUGH = {planted.no_op_grouping: {"num_batches": 6}, planted.starved: {"num_batches": 6},
          planted.deep_decoder: {"repeats": 2}, planted.cache_off: {"repeats": 2},
          **{make: {"num_batches": 3} for make in EXACT}}  # fmt: skip


def first_of(make):
    torch.manual_seed(0)
    problem = make()
    study = ek.study(**problem.study, **ENOUGH.get(make, {}))
    return problem, study, study.advise(**problem.advise)


@pytest.mark.parametrize("make", LARGE, ids=lambda make: make.__name__)
def test_a_large_waste_of_time_comes_first_and_its_receipt_shows_a_gain(make):
    problem, study, advice = first_of(make)
    # a machine that is busy with something else widens bands until nothing is advised; the order stays
    first = max(every(advice), key=lambda lever: lever.gain_frac)
    assert first.kind == problem.kind, every(advice)
    receipt = first.measure()
    assert receipt.measured.total < first.base.total
    assert study.receipts == [receipt]


@pytest.mark.parametrize("make", EXACT, ids=lambda make: make.__name__)
def test_a_waste_of_memory_comes_first_and_is_predicted_within_its_band(make):
    problem, _, advice = first_of(make)
    assert advice[0].kind == problem.kind
    receipt = advice[0].measure()
    assert receipt.within_band
    assert abs(receipt.error) < 0.02


def test_recomputation_is_found_with_the_memory_that_it_saves():
    problem = planted.checkpoint_everywhere()
    study = ek.study(**problem.study, num_batches=3)
    (lever,) = [one for one in every(study.advise()) if one.kind == "recomputation"]
    assert lever.gain_frac > 0
    assert "the peak rises to" in lever.side_effects[0]
    too_little = study.advise(budget_bytes=study.memory.total)
    assert "recomputation" not in [one.kind for one in every(too_little)], "what does not fit is not suggested"


def test_float32_products_are_found_where_the_device_is_faster_in_bfloat16(monkeypatch):
    here = ek.Device.here()
    rates = {"float32": here.rate_flops_per_s["float32"]}
    for factor, expected in ((4.0, 1), (1.0, 0)):
        device = ek.Device(**{**vars(here), "rate_flops_per_s": rates | {"bfloat16": factor * rates["float32"]}})
        monkeypatch.setattr(ek.Device, "here", lambda device=device, **_: device)
        study = ek.study(**planted.training(ek.models.gpt(layers=1), planted.loader([32] * 16)), num_batches=2)
        assert [one.kind for one in every(study.advise())].count("precision") == expected


def test_nothing_is_found_in_a_loop_that_asks_for_one_number_and_pads_nothing():
    given = planted.training(
        ek.models.gpt(layers=1), planted.loader([32] * 16), cast=True, after=lambda out: out.loss.item()
    )
    study = ek.study(**given, num_batches=2)
    advice = study.advise()
    looked_at = {one.kind for one in every(advice)}
    assert not looked_at & {"padding", "synchronisation", "gradients", "precision", "recomputation"}
    # batches are put together in a few hundred microseconds: at a busy moment worth a look, never a suggestion
    assert "data loading" not in {one.kind for one in advice}
    memory = study.advise("memory")
    assert not memory
    assert "nothing that costs time or accuracy is suggested" in memory.notes[0]


def test_experts_on_one_rank_are_no_problem_and_on_two_they_are_looked_at():
    given = planted.hot_expert().study
    alone = ek.study(**{**given, "num_ranks": 1}, num_batches=2)
    assert any("num_ranks=" in sentence for sentence in alone.unseen)
    assert not {one.kind for one in every(alone.advise())} & {"hot expert", "overlap"}
    share = alone.experts.popularity
    assert share.argmax() == 0
    assert share[0] > 2 / len(share)


def every(advice):
    return [*advice, *advice.rejected]
