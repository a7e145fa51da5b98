"""Sparse gradients and inputs: their indices and values are counted; forecast, or said why not."""

from __future__ import annotations

import pytest
import torch
from activation_models import recorded_peak
from torch import nn
from zoo import dlrm, made, square

from effkit import activations
from effkit.activations.levers import Levers
from effkit.training import residents, size_bytes, still, storages

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore")]
ROWS, CELLS, WORDS, WIDTH = 16, 26, 500, 16
IDS = torch.randint(0, WORDS, (ROWS, CELLS), generator=torch.Generator().manual_seed(0))
# of a gradient with a row per id: the ids are the batch's own
VALUES_BYTES = 4 * ROWS * CELLS * WIDTH


def embedding(**options):
    return made(lambda m, x: m.out(m.table(x)).mean(1), table=nn.Embedding(WORDS, WIDTH, sparse=True, **options),
                out=nn.Linear(WIDTH, 1))  # fmt: skip


def bag(mode):
    return made(dlrm, bottom=nn.Linear(13, WIDTH), bag=nn.EmbeddingBag(WORDS, WIDTH, sparse=True, mode=mode),
                top=nn.Linear(2 * WIDTH, 1))  # fmt: skip


def graph():
    return made(lambda m, edges, x: torch.sparse.mm(edges, m.layer(x)), layer=nn.Linear(8, 8))


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1)


def adam_of_the_table(parameters):
    return torch.optim.SparseAdam([one for one in parameters if one.shape == (WORDS, WIDTH)])


def ring():
    return torch.eye(12)[torch.arange(12) - 1]


def by_rows():
    return torch.sparse_csr_tensor(torch.arange(13), (torch.arange(12) - 1) % 12, torch.ones(12))


def by_columns():
    return torch.sparse_csc_tensor(torch.arange(13), (torch.arange(12) + 1) % 12, torch.ones(12))


@pytest.mark.parametrize(
    ("tensor", "num_bytes"),
    [(ring().to_sparse(), 12 * (2 * 8 + 4)), (by_rows(), 13 * 8 + 12 * (8 + 4)), (by_columns(), 13 * 8 + 12 * (8 + 4)),
     (ring(), 144 * 4), (ring()[:3], 144 * 4)],
    ids=["coo", "csr", "csc", "dense", "part of a dense one"],
)  # fmt: skip
def test_all_that_a_tensor_is_made_of_is_counted(tensor, num_bytes):
    assert sum(storage.nbytes() for storage in storages(tensor)) == num_bytes
    batch = {"edges": tensor, "again": tensor}
    assert size_bytes(residents(graph(), None, batch)["input"]) == num_bytes


BATCHES = {"embedding": IDS, "padded embedding": IDS, "summed bag": (torch.randn(ROWS, 13), IDS),
           "mean of a bag": (torch.randn(ROWS, 13), IDS)}  # fmt: skip
MODELS = {"embedding": embedding, "padded embedding": lambda: embedding(padding_idx=3),
          "summed bag": lambda: bag("sum"), "mean of a bag": lambda: bag("mean")}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_sgd_is_measured_as_it_is_unwatched_and_forecast(name):
    model, batch = MODELS[name](), BATCHES[name]
    account = activations.measure(model, batch, loss=square, optimizer=sgd, repeats=1)
    assert account.residual == 0
    # whoever looks at a sparse gradient makes autograd copy it: a recording does not look
    assert account.total == recorded_peak(model, batch, loss=square, optimizer=sgd)
    forecast = activations.forecast(model, batch, loss=square, optimizer=sgd)
    assert forecast.total == pytest.approx(account.total, rel=1e-3)
    more = activations.predict(account, batch_size=9)
    truth = activations.measure(model, batch, base=account, loss=square, optimizer=sgd, repeats=1, batch_size=9)
    assert more.total == pytest.approx(truth.total, rel=1e-3)


def test_the_gradient_has_its_own_row():
    model = bag("sum")
    gradient = activations.measure(model, BATCHES["summed bag"], loss=square, optimizer=sgd, repeats=1).frame["value"]
    others = sum(parameter.nbytes for name, parameter in model.named_parameters() if name != "bag.weight")
    first_layer = model.bottom.weight.nbytes + model.bottom.bias.nbytes  # which has none yet at the peak
    assert gradient["gradient"] == VALUES_BYTES + others - first_layer


@pytest.mark.parametrize(
    ("optimizer", "levers", "why"),
    [(adam_of_the_table, {}, "_coalesce"), (torch.optim.Adagrad, {}, "_coalesce"), (sgd, {"micro_batches": 2}, "add_")],
    ids=["SparseAdam", "Adagrad", "micro-batches"],
)
def test_what_depends_on_which_ids_are_equal_is_measured_and_not_forecast(optimizer, levers, why):
    model, given = embedding(), {"loss": square, "optimizer": optimizer}
    account = activations.measure(model, IDS, repeats=1, **given, **levers)
    assert account.residual == 0
    assert account.total == pytest.approx(recorded_peak(model, IDS, Levers(**levers), **given), rel=1e-3)
    with pytest.raises(ValueError, match=rf"measured, not forecast: at .*aten\.{why}.*because") as told:
        activations.forecast(model, IDS, **given, **levers)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("edges", [ring().to_sparse(), by_rows()], ids=["coo", "csr"])
def test_a_graph_in_a_sparse_tensor_is_measured(edges):
    model, batch = graph(), (edges, torch.randn(12, 8))
    account = activations.measure(model, batch, loss=square, repeats=1)
    assert account.residual == 0
    assert account.total == recorded_peak(model, batch, loss=square)
    assert account.frame["value"]["input"] == size_bytes(batch)
    with pytest.raises(ValueError, match="a sparse tensor cannot be repeated or cut: give make_batch="):
        activations.predict(account, batch_size=9)


def test_gradients_that_are_watched_are_those_of_an_unwatched_step():
    model, seen = embedding(), []
    update = still(model.parameters(), sgd)
    update.register_step_pre_hook(lambda *_: seen.append(model.table.weight.grad.to_dense()))
    activations.measure(model, IDS, loss=square, optimizer=lambda _: update, repeats=1)
    model.zero_grad(set_to_none=True)
    square(model(IDS)).backward()
    assert seen
    assert all(torch.equal(one, model.table.weight.grad.to_dense()) for one in seen)
