"""Stages of a pipeline: the formula beside a stage that is run alone, with as many micro-batches in flight."""

from collections import UserDict

import pytest
import torch
from torch import nn

import effkit as ek
from effkit.activations import observe
from effkit.training import residents, still

HIDDEN, ROWS, LAYERS = 96, 64, 8


def layer():
    return nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN), nn.LayerNorm(HIDDEN))


def run_alone(layers, in_flight, num_micro_batches):
    """The peak of a stage that has run forward ``in_flight`` times when its first backward begins, 1F1B from there."""
    stage = nn.Sequential(*layers)
    update = still(stage.parameters())

    def forward():
        return stage(torch.ones(ROWS, HIDDEN, requires_grad=True)).sum()  # what it sends on is not kept

    def step(enter=lambda phase: None):
        enter("forward")
        flying = [forward() for _ in range(in_flight)]
        enter("backward")
        for _ in range(num_micro_batches - in_flight):
            flying.pop(0).backward()
            flying.append(forward())
        while flying:
            flying.pop(0).backward()
        enter("optimizer")
        update.step()
        update.zero_grad()

    step()
    return observe(step, stage, lambda: residents(stage, update, torch.empty(0)))


@pytest.mark.parametrize(("num_stages", "num_micro_batches"), [(2, 4), (4, 8), (4, 5), (4, 2), (2, 1), (1, 1)])
def test_a_stage_needs_what_it_needs_when_it_is_run_alone(num_stages, num_micro_batches):
    model = nn.Sequential(*(layer() for _ in range(LAYERS)))
    batch = torch.randn(ROWS, HIDDEN)
    frame = ek.activations.pipeline(model, batch, num_stages=num_stages, num_micro_batches=num_micro_batches,
                                    loss=torch.sum)  # fmt: skip
    assert list(frame["in_flight"]) == [min(num_micro_batches, num_stages - rank) for rank in range(num_stages)]
    each = LAYERS // num_stages
    for rank, row in frame.iterrows():
        alone = run_alone(model[rank * each : (rank + 1) * each], row["in_flight"], num_micro_batches)
        assert row["peak_bytes"] == pytest.approx(alone.peak_bytes, rel=0.03)
    assert frame.attrs["idle_frac"] == (num_stages - 1) / (num_micro_batches + num_stages - 1)


def test_parameters_of_all_stages_are_the_model_s_and_a_tied_one_is_on_both_ends():
    model = ek.models.gpt(layers=4, hidden=64, heads=4, device="cpu")
    batch = UserDict(model.random_batch(2, 16))  # as a tokenizer's: a mapping that is no dict
    frame = ek.activations.pipeline(model, batch, num_stages=2, num_micro_batches=4)
    tied = model.lm_head.weight.nbytes
    assert frame["parameter_bytes"].sum() == sum(one.nbytes for one in model.parameters()) + tied
    assert list(frame["blocks"]) == ["0 to 1", "2 to 3"]


class Encoded(nn.Module):
    """Two lists of layers, run one after the other, and a layer between; ``order`` is that of the first."""

    def __init__(self, order):
        super().__init__()
        self.order = order
        self.encoder = nn.ModuleList(layer() for _ in range(4))
        self.between = nn.Linear(HIDDEN, HIDDEN)
        self.decoder = nn.ModuleList(layer() for _ in range(4))

    def forward(self, hidden):
        for number in self.order:
            hidden = self.encoder[number](hidden)
        hidden = self.between(hidden)
        for block in self.decoder:
            hidden = block(hidden)
        return hidden


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 0, 1, 2, 3), (3, 2, 1, 0), (0, 2, 1, 3)])
def test_blocks_that_run_in_another_order_or_again_are_refused(order):
    with pytest.raises(ValueError, match="blocks that run once, in the order in which the model holds them"):
        ek.activations.pipeline(Encoded(order), torch.randn(ROWS, HIDDEN), num_stages=2, num_micro_batches=4,
                                loss=torch.sum)  # fmt: skip


def test_what_stands_between_blocks_is_where_they_are_and_a_shared_parameter_on_each_rank_that_uses_it():
    model = Encoded(range(4))
    batch, how = torch.randn(ROWS, HIDDEN), {"num_stages": 4, "num_micro_batches": 4, "loss": torch.sum}
    weights = [sum(one.nbytes for one in model.encoder[0].parameters()) * 2] * 4
    weights[1] += sum(one.nbytes for one in model.between.parameters())
    assert ek.activations.pipeline(model, batch, **how)["parameter_bytes"].tolist() == weights
    model.decoder[3][0].weight = model.encoder[0][0].weight
    assert ek.activations.pipeline(model, batch, **how)["parameter_bytes"].tolist() == weights


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
