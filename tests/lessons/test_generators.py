"""Flow matching, alignment, experts of intervals, windows of sampling steps: the pieces, not the lessons."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lessons.generators import expert_denoisers, sampling_windows
from lessons.generators.alignment import AlignedTraining
from lessons.generators.flows import FlowModel, FlowTraining, noised, pictures
from lessons.generators.sampling_windows import NOISE, WindowedTraining, iteration_flops, plane_model, windows
from lessons.generators.transformer_flops import added_token, epochs_saved, forward_flops

pytestmark = pytest.mark.usefixtures("one_thread")


def test_pictures_are_scaled_and_the_same_every_time():
    first = pictures()
    assert first.shape == (4096, 64)
    assert abs(float(first.mean())) < 1e-5
    assert abs(float(first.std()) - 1) < 1e-5
    pictures.cache_clear()
    assert torch.equal(first, pictures())


def test_the_path_leads_from_noise_to_data_at_its_own_velocity():
    clean, noise = torch.randn(5, 3), torch.randn(5, 3)
    start, velocity = noised(clean, noise, torch.zeros(5))
    end, _ = noised(clean, noise, torch.ones(5))
    assert torch.equal(start, noise)
    torch.testing.assert_close(end, clean)
    middle, _ = noised(clean, noise, torch.full((5,), 0.25))
    torch.testing.assert_close(middle + 0.75 * velocity, clean)


def test_early_and_late_layers_are_the_whole_model():
    model = FlowModel(7, 16, 3)
    x, time = torch.randn(4, 7), torch.rand(4)
    torch.testing.assert_close(model(x, time), model.late(model.early(x, time)))
    assert model.num_early == 1


def test_a_training_is_a_function_of_its_seed():
    losses = []
    for seed in (0, 0, 1):
        training = FlowTraining(seed)
        for _ in range(3):
            training.step()
        losses.append(training.loss())
    assert losses[0] == losses[1] != losses[2]


def test_phases_follow_each_other_and_each_trains_only_its_own():
    training = AlignedTraining(0, encoder_steps=2, warm_up_steps=2, decay_steps=4)
    seen = []
    for _ in range(6):
        before = {name: one.detach().clone() for name, one in training.model.named_parameters()}
        encoder = [one.detach().clone() for one in training.encoder.parameters()]
        seen.append(phase := training.phase)
        training.step()
        moved = {
            name.split(".")[0] for name, one in training.model.named_parameters() if not torch.equal(one, before[name])
        }
        encoder_moved = any(not torch.equal(a, b) for a, b in zip(encoder, training.encoder.parameters(), strict=True))
        assert encoder_moved == (phase == "encoder")
        assert moved == {"encoder": set(), "warm-up": {"reads", "blocks"}}.get(phase, {"reads", "blocks", "writes"})
    assert seen == ["encoder"] * 2 + ["warm-up"] * 2 + ["flow, aligned"] * 2


def test_the_warm_up_leaves_the_late_blocks_alone_and_the_alignment_fades():
    training = AlignedTraining(0, encoder_steps=0, warm_up_steps=1, decay_steps=4)
    late = [one.detach().clone() for one in training.model.blocks[training.model.num_early :].parameters()]
    training.step()
    after = training.model.blocks[training.model.num_early :].parameters()
    assert all(torch.equal(a, b) for a, b in zip(late, after, strict=True))
    weights = []
    for _ in range(6):
        weights.append(training.weight_now)
        training.step()
    assert weights == [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]
    assert AlignedTraining(0, encoder_steps=0).weight_now == 0.5


def test_alignment_is_one_less_the_cosine_and_gives_the_encoder_no_gradient():
    training = AlignedTraining(0)
    clean = pictures()[:4]
    early = training.model.early(clean, torch.ones(4))
    by_hand = [
        1 - float((a @ b / (a.norm() * b.norm())).detach())
        for a, b in zip(training.head(early), training.encoder.features(clean), strict=True)
    ]
    found = training.misalignment(early, clean)
    assert found.item() == pytest.approx(sum(by_hand) / 4, abs=1e-5)
    found.backward()
    assert all(one.grad is None for one in training.encoder.parameters())


def test_an_expert_begins_as_what_it_branched_from_and_sees_its_interval_only(monkeypatch):
    trained = FlowTraining(0)
    trained.step()
    expert = expert_denoisers.IntervalTraining(trained, 0.5, 1.0)
    assert expert.loss() == trained.loss()
    times = []
    monkeypatch.setattr(
        expert_denoisers, "noised", lambda clean, noise, time: (times.append(time), noised(clean, noise, time))[1]
    )
    before = trained.loss()
    expert.step()
    assert float(times[0].min()) >= 0.5
    assert float(times[0].max()) <= 1
    assert trained.loss() == before != expert.loss()
    with pytest.raises(ValueError, match=r"interval is 0\.7 to 0\.2"):
        expert_denoisers.IntervalTraining(trained, 0.7, 0.2)


def test_experts_cost_memory_and_no_flops():
    costs = expert_denoisers.costs(3)
    assert costs.loc["experts", "parameters_bytes"] == 3 * costs.loc["shared", "parameters_bytes"]
    assert costs.loc["experts", "flops"] == costs.loc["shared", "flops"] > 0


def test_a_step_of_the_window_keeps_the_marginal_of_a_gaussian():
    """Data N(0, 1) and noise N(0, 1): the exact velocity is known, and the variance at a time is t^2 + (1 - t)^2."""

    class Exact(torch.nn.Module):
        def forward(self, x, time):
            t = time[:, None]
            return x * (2 * t - 1) / (t**2 + (1 - t) ** 2)

    training = WindowedTraining(plane_model(), 200, num_steps=200)
    training.model = Exact()
    torch.manual_seed(0)
    x = torch.randn(20_000, 2)
    for step in range(200):
        mean, deviation = training.mean_and_deviation(x, step)
        x = mean + deviation * torch.randn_like(x)
        if step in (99, 149):
            t = (step + 1) / 200
            assert float(x.var()) == pytest.approx(t**2 + (1 - t) ** 2, rel=0.03)
    assert deviation == pytest.approx(NOISE * math.sqrt(0.005 * 0.005))


def test_the_window_slides_and_only_its_steps_are_kept():
    training = WindowedTraining(plane_model(), 4, num_steps=6)
    firsts = []
    for _ in range(4):
        firsts.append(training.first)
        assert [step for step, _, _ in training.rollout()[1]] == list(range(training.first, training.first + 4))
        training.step()
    assert firsts == [0, 1, 2, 0]
    with pytest.raises(ValueError, match="window is 7 of 6"):
        WindowedTraining(plane_model(), 7, num_steps=6)


def test_recomputing_changes_bytes_and_flops_and_not_the_gradient():
    training = WindowedTraining(plane_model(), 3, num_steps=5)
    rollout = training.rollout()
    gradients = []
    for recompute in (True, False):
        training.recompute = recompute
        training.optimizer.zero_grad()
        training.objective(*rollout).backward()
        gradients.append([one.grad.clone() for one in training.model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other)


def test_counted_flops_follow_the_formula_of_the_published_settings():
    table = windows((1, 2), num_steps=5)
    assert (table["flops"] / table["predicted"]).between(0.98, 1).all()
    assert table.loc[2, "saved_bytes"] > 1.9 * table.loc[1, "saved_bytes"]
    assert (table["saved_bytes_recomputed"] < 0.05 * table["saved_bytes"]).all()
    assert iteration_flops(25, 14) == 81


def test_the_reward_prefers_the_spot_at_the_right():
    points = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [3.0, 0.0]])
    assert sampling_windows.to_the_right(points).tolist() == [2, -2, 1]


def test_flops_of_blocks_are_those_that_torch_counts():
    hidden, tokens, layers = 32, 10, 2
    x = torch.zeros(tokens, hidden)
    with FlopCounterMode(display=False) as counter:
        for _ in range(layers):
            query, key, value = (x @ torch.zeros(hidden, 3 * hidden)).chunk(3, 1)
            out = (query @ key.T).softmax(1) @ value
            _ = out @ torch.zeros(hidden, hidden)
            _ = (x @ torch.zeros(hidden, 4 * hidden)) @ torch.zeros(4 * hidden, hidden)
            _ = torch.zeros(1, hidden) @ torch.zeros(hidden, 6 * hidden)
    assert forward_flops(tokens, hidden, layers, conditioned=True) == counter.get_total_flops()
    with pytest.raises(ValueError, match="at least 1 of each"):
        forward_flops(0, hidden, layers)


def test_a_token_more_and_epochs_less():
    added = added_token()
    assert added["tokens"] < added["all"] < added["attention"]
    assert added["all"] < 0.005
    assert added_token(64)["all"] > 0.015
    assert epochs_saved(0.5).tolist() == pytest.approx([0.5, 400 / 900])
    assert epochs_saved(0.5, added_frac=1.0).tolist() == pytest.approx([0, 0])
    with pytest.raises(ValueError, match="between 0 and 1"):
        epochs_saved(1.5)
