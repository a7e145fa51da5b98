"""The lessons' own models train, repeat by their seed, and run on fake tensors, as those of effkit.models do."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from lessons import hybrid_heads, spiking

HYBRID = {"layers": 2, "hidden": 16, "heads": 2, "vocabulary": 50, "state_heads": 1, "device": "cpu"}
MODELS = {
    "hybrid": (lambda **more: hybrid_heads.build(**HYBRID, **more), (3, 40)),
    "spiking": (lambda **more: spiking.build(hidden=16, features=20, steps=3, device="cpu", **more), (3,)),
}


@pytest.fixture(params=MODELS)
def built(request):
    """How to build a model, and the size of its batch."""
    return MODELS[request.param]


def test_a_loss_falls_when_trained_and_every_parameter_is(built):
    build, size = built
    model = build()
    batch = model.random_batch(*size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        assert not [n for n, p in model.named_parameters() if not (n.endswith("bias") or p.grad.any())]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_equal_seeds_are_equal_weights_and_batches(built):
    build, size = built
    first, again, other = (build(seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    one, two, three = (first.random_batch(*size, seed=seed) for seed in (0, 0, 1))
    assert all(torch.equal(tensor, two[key]) for key, tensor in one.items())
    assert any(not torch.equal(tensor, three[key]) for key, tensor in one.items())


def test_a_step_runs_on_fake_tensors(built):
    build, size = built
    model, mode = build(), FakeTensorMode()
    batch = model.random_batch(*size)
    for module in model.modules():
        own = module._parameters
        own.update({key: mode.from_tensor(tensor) for key, tensor in own.items() if tensor is not None})
    with mode:
        model(**{key: mode.from_tensor(tensor) for key, tensor in batch.items()}).loss.backward()
    assert all(p.grad.shape == p.shape for p in model.parameters())
