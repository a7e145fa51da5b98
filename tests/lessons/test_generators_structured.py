"""Matching, the toy detector, GFlowNets summed exactly, and supernets."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from lessons.generators import detecting, supernets
from lessons.generators.flow_networks import FlowNetworkTraining, hypergrid, sets
from lessons.generators.matching import one_to_many, one_to_one

pytestmark = pytest.mark.usefixtures("one_thread")


def test_matching_is_the_cheapest_of_all_ways():
    cost = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0))
    for image, found in zip(cost, one_to_one(cost).tolist(), strict=True):
        totals = {
            way: sum(float(image[q, o]) for o, q in enumerate(way)) for way in itertools.permutations(range(5), 3)
        }
        assert tuple(found) == min(totals, key=totals.get)
    with pytest.raises(ValueError, match="at least as many"):
        one_to_one(torch.zeros(1, 2, 3))
    with pytest.raises(ValueError, match="ways"):
        one_to_one(torch.zeros(1, 100, 4))


def test_a_place_in_two_boxes_answers_for_the_smaller():
    centres = torch.tensor([[0.5, 0.5], [0.1, 0.1], [0.95, 0.95]])
    boxes = torch.tensor([[[0.4, 0.4, 0.8, 0.8], [0.5, 0.5, 0.2, 0.2]]])
    assert one_to_many(centres, boxes).tolist() == [[1, 0, -1]]


def test_scenes_have_their_boxes_inside_and_pixels_where_they_are():
    images, boxes, kinds = detecting.scenes(50, torch.Generator().manual_seed(0))
    low, high = boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2
    assert low.min() >= -1e-6
    assert high.max() <= 1 + 1e-6
    assert set(kinds.unique().tolist()) == {0, 1}
    corner = (low[0, 0] * detecting.SIDE).round().long()
    assert images[0, corner[1], corner[0]] > 0.5  # the corner of a box is drawn in either kind


def test_the_set_loss_does_not_depend_on_the_order_of_queries_and_is_small_for_the_truth():
    _, true, kinds = detecting.scenes(4, torch.Generator().manual_seed(1))
    wanted = torch.full((4, detecting.NUM_QUERIES), detecting.NUM_KINDS)
    wanted[:, : detecting.NUM_OBJECTS] = kinds
    boxes = torch.rand(4, detecting.NUM_QUERIES, 4)
    boxes[:, : detecting.NUM_OBJECTS] = true
    logits = 20 * F.one_hot(wanted, 3).float()
    assert float(detecting.set_loss((logits, boxes), true, kinds)) < 1e-6
    logits, boxes = torch.randn(4, 8, 3), torch.rand(4, 8, 4)
    order = torch.randperm(8)
    one = detecting.set_loss((logits, boxes), true, kinds)
    other = detecting.set_loss((logits[:, order], boxes[:, order]), true, kinds)
    torch.testing.assert_close(one, other)


def test_the_head_trains_the_encoder_and_changes_no_prediction():
    plain, helped = (detecting.DetectorTraining(0, with_heads=heads) for heads in (False, True))
    assert plain.loss() == helped.loss()  # the same weights to begin with
    images, true, kinds = helped.held_out
    helped.head_loss(helped.model.encode(images), true, kinds).backward()
    assert all(one.grad is not None for one in helped.model.encoder.parameters())
    assert all(one.grad is None for one in helped.model.decoder.parameters())


def test_worlds_are_what_they_say():
    grid = hypergrid(4)
    assert grid.num_parents.tolist() == [0, 1, 1, 1] + [1, 2, 2, 2] * 3
    assert float(grid.target.sum()) == pytest.approx(1, abs=1e-5)
    world = sets(4, 2)
    assert len(world.inputs) == 1 + 4 + 6
    assert int(world.may_stop.sum()) == 6
    assert world.log_reward[0] == 0  # nothing taken, no energy
    assert all(int(one) > state for state, row in enumerate(world.after) for one in row if one >= 0)
    with pytest.raises(ValueError, match="5 of 4 items"):
        sets(4, 5)
    with pytest.raises(ValueError, match="at least 2"):
        hypergrid(1)


def test_the_exact_distribution_is_that_of_the_sampled_trajectories():
    training = FlowNetworkTraining(0, sets(5, 3), forward_looking=False, batch_size=4000, explore_frac=0.0)
    log_policy, _ = training.look()
    states, actions = training.trajectories(log_policy)
    stopped = states[actions == training.world.after.shape[1]]
    assert len(stopped) == 4000
    sampled = torch.bincount(stopped, minlength=len(training.world.inputs)) / 4000
    exact = training.world.stopping(log_policy.detach())
    assert float(exact.sum()) == pytest.approx(1, abs=1e-6)
    assert float((sampled - exact).abs().max()) < 0.03


@pytest.mark.parametrize("world", [hypergrid(4), sets(4, 2)], ids=["grid", "sets"])
def test_the_true_flow_is_balanced_and_samples_the_target(world):
    """Backwards from the rewards: F(s) = R(s) where one may stop, plus each child's flow over its parents."""
    training = FlowNetworkTraining(0, world, forward_looking=True)
    num_moves = world.after.shape[1]
    flow = torch.zeros(len(world.inputs), dtype=torch.float64)
    policy = torch.zeros(len(world.inputs), num_moves + 1, dtype=torch.float64)
    for state in reversed(range(len(flow))):
        parts = [
            flow[after] / training.num_parents[after] if after >= 0 else torch.tensor(0.0)
            for after in world.after[state]
        ]
        parts.append(world.log_reward[state].exp() if world.may_stop[state] else torch.tensor(0.0))
        shares = torch.stack([part.double() for part in parts])
        flow[state], policy[state] = shares.sum(), shares / shares.sum()
    torch.testing.assert_close(world.stopping(policy.log()), world.target.double(), atol=1e-6, rtol=1e-5)
    states, actions = (~training.blocked).nonzero(as_tuple=True)
    assert training.imbalance(policy.log(), flow.log(), states, actions).abs().max() < 1e-5


def test_forward_looking_is_detailed_balance_with_the_rewards_added_to_the_flows():
    world = hypergrid(5)
    plain, ahead = (FlowNetworkTraining(3, world, forward_looking=one) for one in (False, True))
    (policy, flow), (same_policy, looking) = plain.look(), ahead.look()
    assert torch.equal(policy, same_policy)
    inner = ~plain.must_stop
    torch.testing.assert_close((looking - flow)[inner], world.log_reward[inner])
    assert torch.equal(looking[~inner], world.log_reward[~inner])


def test_one_expert_is_plain_sharing_and_a_subnetwork_is_a_corner():
    torch.manual_seed(0)
    net = supernets.Supernet(1)
    x = torch.randn(3, supernets.NUM_INPUTS)
    first, second, third = net.layers
    hidden = F.relu(F.linear(x, first.weight[0, :8], first.bias[0, :8]))
    hidden = F.relu(F.linear(hidden, second.weight[0, :8, :8], second.bias[0, :8]))
    torch.testing.assert_close(net(x, 8), F.linear(hidden, third.weight[0, :, :8], third.bias[0]))
    with pytest.raises(ValueError, match="width is 5"):
        net(x, 5)
    with pytest.raises(ValueError, match="at least 1"):
        supernets.Supernet(0)


def test_the_architecture_mixes_the_experts():
    torch.manual_seed(0)
    layer = supernets.MixedLinear(6, 4, 2)
    narrow, wide = torch.eye(len(supernets.WIDTHS))[[0, -1]]
    weight, bias = layer.corner(narrow, 6, 4)
    mixture = layer.router(narrow).view(2, 4).softmax(0)  # of each expert in each output neuron
    by_hand = mixture[0][:, None] * layer.weight[0] + mixture[1][:, None] * layer.weight[1]
    torch.testing.assert_close(weight, by_hand)
    torch.testing.assert_close(bias, (mixture * layer.bias).sum(0))
    assert not torch.equal(weight, layer.corner(wide, 6, 4)[0])


def test_training_alone_is_the_supernet_with_one_width():
    losses = supernets.trained(0, (8,), steps=30)
    assert list(losses.index) == [8]
    assert losses[8] < math.log(supernets.NUM_CLASSES)
    assert supernets.trained(0, (8,), steps=30)[8] == losses[8]
