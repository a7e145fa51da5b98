"""SLTT: its gradient is that of the network without its path through time, and its memory does not grow with time."""

import pytest
import torch
from torch.nn import functional

from effkit import activations
from lessons import spiking

SIZE = {"features": 24, "hidden": 48, "device": "cpu"}


def gradient(model, batch) -> torch.Tensor:
    model.zero_grad()
    model(**batch).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def spike(potential):
    """Heaviside, with the derivative of a triangle of height 1 around the threshold, written without autograd."""
    near = (1 - (potential.detach() - 1).abs()).clamp_min(0)
    hard = (potential.detach() >= 1).to(potential.dtype)
    return hard + near * (potential - potential.detach())


def by_hand(model, batch, *, cut: bool, counted=None) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and its gradient from the paper's equations; ``cut`` detaches what comes from the step before."""
    parameters = list(model.parameters())
    *layers, head = [(parameters[i], parameters[i + 1]) for i in range(0, len(parameters), 2)]
    potentials = spikes = [torch.zeros(())] * len(layers)
    losses = []
    for _ in range(model.steps):
        signal, now, fired = batch["inputs"], [], []
        for (weight, bias), u, s in zip(layers, potentials, spikes, strict=True):
            kept = model.leak * (u - 1.0 * s)
            now.append((kept.detach() if cut else kept) + signal @ weight.T + bias)
            fired.append(signal := spike(now[-1]))
        potentials, spikes = now, fired
        losses.append(functional.cross_entropy(signal @ head[0].T + head[1], batch["labels"]))
    counted = range(model.steps) if counted is None else counted
    found = torch.autograd.grad(sum(losses[t] for t in counted) / model.steps, parameters)
    return torch.stack(losses).mean().detach(), torch.cat([g.flatten() for g in found])


def allocated_peak_bytes(learning: str, steps: int, backward_steps: int | None = None) -> int:
    """Highest sum of the profiler's allocation events over a forward and backward."""
    model = spiking.build(**SIZE, steps=steps, learning=learning, backward_steps=backward_steps)
    batch = model.random_batch(64)
    with torch.profiler.profile(profile_memory=True) as profile:
        model(**batch).loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def saved_bytes(learning: str, steps: int) -> int:
    """Most bytes that autograd holds at once for backward, each storage once, without parameters and inputs."""
    model = spiking.build(**SIZE, steps=steps, learning=learning)
    batch = model.random_batch(64)
    ours = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *batch.values()]}
    held: dict[int, list[int]] = {}
    peak = 0

    class Held:
        def __init__(self, tensor):
            nonlocal peak
            self.tensor, storage = tensor, tensor.untyped_storage()
            self.key = storage.data_ptr()
            if self.key not in ours:
                held.setdefault(self.key, [0, storage.nbytes()])[0] += 1
            peak = max(peak, sum(size for _, size in held.values()))

        def __del__(self):
            if self.key in held:
                held[self.key][0] -= 1
                if not held[self.key][0]:
                    del held[self.key]

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda kept: kept.tensor):
        model(**batch).loss.backward()
    return peak


@pytest.fixture(scope="module")
def trained():
    """A net that has learnt a little from random but learnable classes, and a batch that it has not seen."""
    generator = torch.Generator().manual_seed(1)
    plane = torch.randn(24, 10, generator=generator)

    def batch():
        inputs = torch.randn(64, 24, generator=generator)
        return {"inputs": inputs, "labels": (inputs @ plane).argmax(dim=1)}

    model = spiking.build(**SIZE, steps=6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(60):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    return model, batch()


@pytest.mark.parametrize("learning", ["bptt", "sltt"])
def test_gradients_are_those_of_the_equations(trained, learning):
    model, batch = trained
    model.learning = learning
    loss, expected = by_hand(model, batch, cut=learning == "sltt")
    torch.testing.assert_close(gradient(model, batch), expected, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(model(**batch).loss.detach(), loss)
    other = by_hand(model, batch, cut=learning != "sltt")[1]
    assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-5), "the two ways of learning differ"
    assert all(fraction > 0.02 for fraction in firing(model, batch)), "no layer is silent"


def firing(model, batch) -> list[float]:
    """Fraction of neurons of each layer that fire at the first time step."""
    signal, fractions = batch["inputs"], []
    for layer in model.layers:
        signal = (layer(signal) >= 1).float()
        fractions.append(float(signal.mean()))
    return fractions


def test_the_gradient_points_where_that_of_bptt_points(trained):
    model, batch = trained
    found = []
    for model.learning in ("sltt", "bptt"):
        found.append(gradient(model, batch))
    assert functional.cosine_similarity(*found, dim=0) > 0.9


# which moment holds most shifts a little with the number of steps, so allocations are linear only to a few percent
@pytest.mark.parametrize(("measure", "slack"), [(saved_bytes, 0.001), (allocated_peak_bytes, 0.1)])
def test_memory_does_not_grow_with_time_steps_and_grows_under_bptt(measure, slack):
    over_space = [measure("sltt", steps) for steps in (2, 4, 8, 16, 32)]
    assert max(over_space) <= 1.01 * min(over_space)
    through_time = [measure("bptt", steps) for steps in (8, 16, 32)]
    growth = (through_time[2] - through_time[1]) / (through_time[1] - through_time[0])
    assert growth == pytest.approx(2, rel=slack)
    assert through_time[2] > 5 * over_space[-1]


def test_fewer_backward_steps_are_a_part_of_the_sum_not_scaled(trained):
    whole, batch = trained
    model = spiking.build(**SIZE, steps=6, backward_steps=2, seed=3)
    model.load_state_dict(whole.state_dict())
    pairs = [[a, b] for a in range(6) for b in range(a)]
    drawn = []
    for _ in range(4):
        found = gradient(model, batch)
        fits = [p for p in pairs if torch.allclose(found, by_hand(model, batch, cut=True, counted=p)[1], atol=1e-7)]
        assert len(fits) == 1
        drawn += fits
    assert len({tuple(pair) for pair in drawn}) > 1, "each forward draws anew"
    assert model(**batch).loss.item() == pytest.approx(by_hand(model, batch, cut=True)[0].item()), "all steps are in it"
    again = spiking.build(**SIZE, steps=6, backward_steps=2, seed=3)
    again.load_state_dict(whole.state_dict())
    first = by_hand(model, batch, cut=True, counted=drawn[0])[1]
    assert torch.allclose(gradient(again, batch), first, atol=1e-7), "the draw follows the seed"


def test_upstream_factors_and_frozen_parameters_are_respected(trained):
    model, batch = trained
    model.learning = "sltt"
    once = gradient(model, batch)
    model.zero_grad()
    (model(**batch).loss * 3).backward()
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), 3 * once)
    model.zero_grad()
    model.layers[0].weight.requires_grad_(False)
    try:
        model(**batch).loss.backward()
        assert model.layers[0].weight.grad is None
        assert model.head.weight.grad is not None
        with torch.no_grad():
            assert not model(**batch).loss.requires_grad
    finally:
        model.layers[0].weight.requires_grad_(True)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"learning": "rtrl"}, 'learning is "bptt" or "sltt"; given: \'rtrl\''),
        ({"leak": 1.5}, "leak is from 0 to 1; given: 1.5"),
        ({"backward_steps": 7}, r"backward_steps is from 1 to steps \(6\); given: 7"),
        ({"backward_steps": 2, "learning": "bptt"}, 'backward_steps belongs to learning="sltt"'),
        ({"steps": 0}, "steps is at least 1; given: 0"),
    ],
)
def test_what_it_cannot_do_is_refused_in_a_sentence(wrong, sentence):
    with pytest.raises(ValueError, match=sentence):
        spiking.build(**{**SIZE, "steps": 6, **wrong})


# As the activation lab measures it


@pytest.fixture(scope="module")
def over_time():
    """Way of learning -> time steps -> peak and saved bytes."""
    found = {}
    for learning in ("bptt", "sltt"):
        for steps in (2, 8, 32):
            model = spiking.build(steps=steps, learning=learning, hidden=32, features=40, device="cpu")
            account = activations.measure(model, model.random_batch(64), repeats=1)
            found.setdefault(learning, {})[steps] = account.total, account.companions[1].total
    return found


def test_learning_through_space_takes_the_same_memory_for_any_time(over_time):
    for which in (0, 1):
        flat = [figures[which] for figures in over_time["sltt"].values()]
        assert max(flat) <= 1.01 * min(flat), over_time


def test_learning_through_time_takes_memory_in_proportion(over_time):
    peak, saved = ({steps: figures[i] for steps, figures in over_time["bptt"].items()} for i in (0, 1))
    for amounts, tolerance in ((peak, 0.05), (saved, 0.01)):  # the peak moves to another operator
        slope = (amounts[8] - amounts[2]) / 6
        assert amounts[32] == pytest.approx(amounts[8] + 24 * slope, rel=tolerance)
    assert saved[32] > 10 * saved[2]
    assert peak[32] > 3 * over_time["sltt"][32][0]
