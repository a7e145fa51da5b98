"""GFlowNets on worlds small enough to sum exactly: detailed balance, and its forward-looking form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from lessons.meter import reproducible


@dataclass(frozen=True, eq=False)
class World:
    """States to walk through from the first to wherever one stops. The last action is to stop.

    Attributes
    ----------
    inputs
        What the network sees, shape (states, features).
    after
        Where an action leads, shape (states, actions - 1); -1 where it is not allowed. Always to a later state.
    may_stop, may_go_on
        Whether one may (shape (states,)).
    log_reward
        Of every state, also of those where one may not stop.
    """

    inputs: torch.Tensor
    after: torch.Tensor
    may_stop: torch.Tensor
    log_reward: torch.Tensor

    @property
    def blocked(self) -> torch.Tensor:
        """Actions that are not allowed, shape (states, actions)."""
        return torch.cat([self.after < 0, ~self.may_stop[:, None]], 1)

    @property
    def num_parents(self) -> torch.Tensor:
        """From how many states one comes to each."""
        return torch.bincount(self.after[self.after >= 0], minlength=len(self.inputs))

    @property
    def target(self) -> torch.Tensor:
        """What is to be sampled, shape (states,): where one may stop, in proportion to the reward."""
        return self.log_reward.masked_fill(~self.may_stop, -torch.inf).softmax(0)

    def stopping(self, log_policy: torch.Tensor) -> torch.Tensor:
        """Where a policy stops, shape (states,): exact, over all ways, from a log policy of shape (states, actions)."""
        probability, after = log_policy.double().exp().numpy(), self.after.numpy()
        arriving = np.zeros(len(after))
        arriving[0] = 1.0
        for state, (leads_to, how_likely) in enumerate(zip(after, probability, strict=True)):
            allowed = leads_to >= 0
            arriving[leads_to[allowed]] += arriving[state] * how_likely[:-1][allowed]
        return torch.from_numpy(arriving * probability[:, -1])


def hypergrid(height: int = 12) -> World:
    """A square of states: go down or right from the corner, stop anywhere.

    Rewards as in Bengio et al. (arXiv 2106.04399): little (0.01) everywhere, 0.5 more in the four corners, 2 more in a
    band within each. A way into a corner leads through states that say nothing of it.

    Raises
    ------
    ValueError
        Below 2 states along an edge.
    """
    if height < 2:
        raise ValueError(f"height is {height}, expected at least 2 states along an edge")
    coordinate = (torch.arange(height) / (height - 1) * 2 - 1).abs()
    corner, band = coordinate > 0.5, (coordinate > 0.6) & (coordinate < 0.8)
    reward = 0.01 + 0.5 * (corner[:, None] & corner[None]) + 2.0 * (band[:, None] & band[None])
    row, column = (one.flatten() for one in torch.meshgrid(torch.arange(height), torch.arange(height), indexing="ij"))
    state = torch.arange(height * height)
    after = torch.stack(
        [
            torch.where(row < height - 1, state + height, -1),
            torch.where(column < height - 1, state + 1, -1),
        ],
        1,
    )
    inputs = torch.cat([F.one_hot(row, height), F.one_hot(column, height)], 1).float()
    return World(inputs, after, torch.ones_like(row, dtype=torch.bool), reward.log().flatten())


def sets(num_items: int = 10, size: int = 7) -> World:
    """Sets of ``size`` of ``num_items`` items, taken one by one; an item has an energy, and energies add up.

    After the forward-looking paper's own first task (arXiv 2302.01687), made small enough to sum: half a set already
    says half of the energy.

    Raises
    ------
    ValueError
        When the set is empty or larger than its items.
    """
    if not 1 <= size <= num_items:
        raise ValueError(f"a set has {size} of {num_items} items, expected 1 to {num_items}")
    energy = torch.randn(num_items, generator=torch.Generator().manual_seed(0)) * 1.5
    members = (torch.arange(2**num_items)[:, None] >> torch.arange(num_items)) & 1
    kept = members[members.sum(1) <= size]
    number = {tuple(row): position for position, row in enumerate(kept.tolist())}
    after = torch.full((len(kept), num_items), -1)
    for state, row in enumerate(kept.tolist()):
        for item in range(num_items):
            if not row[item] and sum(row) < size:
                after[state, item] = number[(*row[:item], 1, *row[item + 1 :])]
    return World(kept.float(), after, kept.sum(1) == size, -(kept.float() @ energy))


class FlowNetworkTraining:
    """A GFlowNet that the meter drives: the loss it sees is the L1 distance of what is sampled to the target.

    Parameters
    ----------
    seed
        Of the weights and the trajectories.
    world
        Where to walk.
    forward_looking
        Detailed balance is ``log F(s) + log P(s'|s) = log F(s') + log P_back(s|s')``, and ``F = R`` where one stops:
        only there does a reward come in. Forward-looking (Pan et al., arXiv 2302.01687), the network gives
        what is still to come, and ``F(s) = R(s) * network(s)``: every transition knows the reward of both its ends.
    rate
        Learning rate of Adam.
    batch_size
        Trajectories a step.
    explore_frac
        Share of actions taken at random.
    """

    phase = "training"

    def __init__(
        self,
        seed: int,
        world: World,
        *,
        forward_looking: bool,
        rate: float = 1e-2,
        batch_size: int = 16,
        explore_frac: float = 0.1,
    ) -> None:
        reproducible(seed)
        self.random = np.random.default_rng(seed)
        self.world, self.forward_looking = world, forward_looking
        self.num_tokens, self.explore_frac = batch_size, explore_frac  # a trajectory counts as a token
        self.blocked, self.num_parents = world.blocked, world.num_parents.clamp(min=1)
        self.must_stop = (world.after < 0).all(1)
        num_actions = self.blocked.shape[1]
        self.model = nn.Sequential(
            nn.Linear(world.inputs.shape[1], 64), nn.LeakyReLU(), nn.Linear(64, 64), nn.LeakyReLU(),
            nn.Linear(64, num_actions + 1),
        )  # fmt: skip
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=rate, fused=True)

    def look(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Log policy, shape (states, actions), and log flow, shape (states,), of all states at once."""
        out = self.model(self.world.inputs)
        log_policy = out[:, :-1].masked_fill(self.blocked, -torch.inf).log_softmax(1)
        log_flow = out[:, -1] + self.world.log_reward if self.forward_looking else out[:, -1]
        return log_policy, torch.where(self.must_stop, self.world.log_reward, log_flow)

    def trajectories(self, log_policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """States that were left, and by which action: two flat tensors, all trajectories together."""
        policy, allowed = log_policy.detach().exp().numpy(), ~self.blocked.numpy()
        mixed = (1 - self.explore_frac) * policy + self.explore_frac * allowed / allowed.sum(1, keepdims=True)
        thresholds, after = mixed.cumsum(1), self.world.after.numpy()
        state = np.zeros(self.num_tokens, dtype=np.int64)
        states, actions = [], []
        while len(state):
            drawn = self.random.random(len(state))[:, None] * thresholds[state, -1:]
            action = (drawn >= thresholds[state]).sum(1)
            states.append(state)
            actions.append(action)
            going = action < after.shape[1]
            state = after[state[going], action[going]]
        return torch.from_numpy(np.concatenate(states)), torch.from_numpy(np.concatenate(actions))

    def imbalance(
        self, log_policy: torch.Tensor, log_flow: torch.Tensor, states: torch.Tensor, actions: torch.Tensor
    ) -> torch.Tensor:
        """Left side less right side of detailed balance, per transition; the way back is uniform over the parents."""
        num_moves = self.world.after.shape[1]
        stops = actions == num_moves
        after = self.world.after[states, actions.clamp(max=num_moves - 1)]
        onwards = log_flow[after] - self.num_parents[after].log()
        right = torch.where(stops, self.world.log_reward[states], onwards)
        return log_flow[states] + log_policy[states, actions] - right

    def step(self) -> None:
        """Sample trajectories, then one step on the squared imbalance of their transitions."""
        log_policy, log_flow = self.look()
        states, actions = self.trajectories(log_policy)
        self.optimizer.zero_grad()
        loss = (self.imbalance(log_policy, log_flow, states, actions) ** 2).mean()
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def loss(self) -> float:
        """L1 distance between what the policy samples and the target, exact: 0 is perfect, 2 is disjoint."""
        return float((self.world.stopping(self.look()[0]) - self.world.target).abs().sum())
