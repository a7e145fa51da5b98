"""Stages of a pipeline: the formula beside a stage that is run alone, with as many micro-batches in flight."""

import pytest
import torch
from torch import nn

import effkit as ek
from effkit.activations import observe
from effkit.training import residents, still

HIDDEN, ROWS, LAYERS = 96, 64, 8


def layer():
    return nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN))


def run_alone(layers, in_flight):
    """The peak of a stage that has run forward so often when backward begins, with gradients of an earlier backward."""
    stage = nn.Sequential(*layers)
    update = still(stage.parameters())
    given = [torch.randn(ROWS, HIDDEN, requires_grad=True) for _ in range(in_flight + 1)]

    def step(enter=lambda phase: None):
        enter("forward")
        flying = [stage(one).sum() for one in given[:in_flight]]  # what it sends to the next stage is not kept
        enter("backward")
        flying.pop(0).backward()
        flying.append(stage(given[-1]).sum())
        while flying:
            flying.pop(0).backward()
        enter("optimizer")
        update.step()
        update.zero_grad()
        for one in given:
            one.grad = None

    step()
    return observe(step, stage, lambda: residents(stage, update, given))


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 4), (4, 8), (4, 5)])
def test_a_stage_needs_what_it_needs_when_it_is_run_alone(num_stages, num_micro_batches):
    model = nn.Sequential(*(layer() for _ in range(LAYERS)))
    batch = torch.randn(ROWS, HIDDEN)
    frame = ek.activations.pipeline(model, batch, num_stages=num_stages, num_micro_batches=num_micro_batches,
                                    loss=torch.sum)  # fmt: skip
    assert list(frame["in_flight"]) == [min(num_micro_batches, num_stages - rank) for rank in range(num_stages)]
    each = LAYERS // num_stages
    for rank, row in frame.iterrows():
        alone = run_alone(model[rank * each : (rank + 1) * each], row["in_flight"])
        assert row["peak_bytes"] == pytest.approx(alone.peak_bytes, rel=0.03)
    assert frame.attrs["idle_frac"] == (num_stages - 1) / (num_micro_batches + num_stages - 1)


def test_parameters_of_all_stages_are_the_model_s_and_a_tied_one_is_on_both_ends():
    model = ek.models.gpt(layers=4, hidden=64, heads=4, device="cpu")
    frame = ek.activations.pipeline(model, model.random_batch(2, 16), num_stages=2, num_micro_batches=4)
    tied = model.lm_head.weight.nbytes
    assert frame["parameter_bytes"].sum() == sum(one.nbytes for one in model.parameters()) + tied
    assert list(frame["blocks"]) == ["0 to 1", "2 to 3"]


def test_chunks_keep_more_micro_batches_and_wait_less():
    model = ek.models.gpt(layers=8, hidden=64, heads=4, device="cpu")
    plain, interleaved = (
        ek.activations.pipeline(model, model.random_batch(2, 16), num_stages=4, num_micro_batches=8, num_chunks=chunks)
        for chunks in (1, 2)
    )
    assert list(interleaved["in_flight"]) == [11, 9, 7, 5]
    assert interleaved["blocks"][0] == "0 to 0, 4 to 4"
    assert interleaved["peak_bytes"][1] > plain["peak_bytes"][1]
    assert interleaved.attrs["idle_frac"] == 3 / 19 < plain.attrs["idle_frac"] == 3 / 11


def test_a_frozen_stage_holds_no_gradients_and_no_states():
    model = ek.models.gpt(layers=4, hidden=64, heads=4, device="cpu")
    batch, how = model.random_batch(2, 16), {"num_stages": 4, "num_micro_batches": 8}
    learning = ek.activations.pipeline(model, batch, **how)
    model.transformer.h[1].requires_grad_(False)
    frozen = ek.activations.pipeline(model, batch, **how)
    weights = frozen["parameter_bytes"][1]
    assert learning["held_bytes"][1] - frozen["held_bytes"][1] == pytest.approx(3 * weights, rel=0.01)
    assert frozen["held_bytes"].drop(1).tolist() == pytest.approx(learning["held_bytes"].drop(1).tolist(), rel=0.01)
    model.transformer.requires_grad_(False)
    model.transformer.ln_f.requires_grad_(True)
    with pytest.raises(ValueError, match="a frozen one, cannot begin a stage"):
        ek.activations.pipeline(model, batch, **how)


@pytest.mark.parametrize(("how", "said"), [
    ({"num_stages": 8, "num_micro_batches": 8}, "8 stages of 1 chunks take 8 blocks or more; this model has 4"),
    ({"num_stages": 2, "num_micro_batches": 3, "num_chunks": 2}, "the stages divide the micro-batches; given: 2 and 3"),
    ({"num_stages": 0, "num_micro_batches": 3}, "num_stages is a whole number from 1 on"),
])  # fmt: skip
def test_pipelines_that_cannot_be_are_refused(how, said):
    model = ek.models.gpt(layers=4, hidden=64, heads=4, device="cpu")
    with pytest.raises(ValueError, match=said):
        ek.activations.pipeline(model, model.random_batch(2, 16), **how)
