"""Learning one task after another with fewer weights, fewer examples and fewer gradients, and what that is in FLOPs."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from effkit import Account
from lessons.meter import reproducible

CHANNELS, HIDDEN, NUM_TASKS, PER_TASK = 64, 128, 4, 640
_BATCH, _REPLAY, _BUFFER, _EPOCHS, _SWAP_FRAC = 32, 32, 200, 4, 0.2
_Weights = list[nn.Linear]


@dataclass(frozen=True)
class Saving:
    """What is left of weights, of gradients and of examples, each as a fraction of all, in (0, 1].

    Attributes
    ----------
    weights_frac
        Weights that are not zero: the same share in each layer.
    gradients_frac
        Weights whose gradient is computed; at most ``weights_frac``.
    examples_frac
        Examples of a task that are still read in its last epoch; it falls evenly from all in the first.
    """

    weights_frac: float = 1.0
    gradients_frac: float = 1.0
    examples_frac: float = 1.0

    def __post_init__(self) -> None:
        shares = (self.weights_frac, self.gradients_frac, self.examples_frac)
        if not all(0 < share <= 1 for share in shares) or self.gradients_frac > self.weights_frac:
            raise ValueError(f"shares are {shares}, expected all in (0, 1] and no more gradients than weights")

    @property
    def times_less(self) -> float:
        """FLOPs of dense training over these, were nothing else to be done: the factors multiply.

        Forward and backward to the activations go with the weights, the third product with the gradients.
        """
        read = (1 + self.examples_frac) / 2
        return 3 / (read * (2 * self.weights_frac + self.gradients_frac))


def zeros_for(times_less: float) -> float:
    """The least share of zeros, in thousandths, that saves as many times FLOPs.

    Four fifths of what is kept learns, and half of the examples are read in the end.
    """
    shares = (1 - zeros / 1000 for zeros in range(1000))
    return 1 - next(kept for kept in shares if Saving(kept, 0.8 * kept, 0.5).times_less >= times_less)


@dataclass(frozen=True, eq=False)
class Learnt:
    """What one run through all tasks came to.

    Attributes
    ----------
    accuracy_frac
        Of all tasks' test examples after the last task, without being told the task.
    work
        FLOPs of the products, by what they were for; weights that are zero are not counted.
    dur_ns
        Wall time of the steps: a dense kernel computes the zeros too.
    """

    accuracy_frac: float
    work: Account
    dur_ns: int


def tasks(seed: int = 0) -> list[tuple[Tensor, Tensor]]:
    """Synthetic tasks of two classes each: a class is two clouds, and no line parts them.

    Shapes (1280, 64) and (1280,): the first half of each is learnt from and the second is for testing.
    """
    num = 2 * PER_TASK
    generator = torch.Generator().manual_seed(seed)
    centres = 0.6 * torch.randn(NUM_TASKS, 2, 2, CHANNELS, generator=generator)
    made = []
    for task in range(NUM_TASKS):
        label = torch.randint(2, (num,), generator=generator)
        cloud = torch.randint(2, (num,), generator=generator)
        points = centres[task, label, cloud] + torch.randn(num, CHANNELS, generator=generator)
        made.append((points, label + 2 * task))
    return made


def at_once(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same eight classes as one task: points and classes to learn from, and others to be tested on."""
    made = tasks(seed)
    x, y = (torch.stack(parts) for parts in zip(*made, strict=True))
    return (
        x[:, :PER_TASK].flatten(0, 1), y[:, :PER_TASK].flatten(),
        x[:, PER_TASK:].flatten(0, 1), y[:, PER_TASK:].flatten(),
    )  # fmt: skip


def learn(saving: Saving, seed: int = 0, *, num_epochs: int = _EPOCHS, lr: float = 0.05) -> Learnt:
    """Learn the tasks in turn with a small memory of earlier ones (experience replay), under a saving.

    After SparCL (arXiv 2209.09476), with less machinery: at each epoch some of the kept weights with the least
    |weight| + |gradient|, each over its largest in the layer, make place for as many with the largest gradient; of the
    kept weights those with the largest gradient learn; and after each epoch the examples that were classified with the
    most confidence are left out. Choosing takes the gradient of one batch, which is counted as if its forward pass and
    all of its backward pass were dense: more than it has to be, for the weights are sparse already. A weight that no
    longer learns still moves by its momentum for a few steps; biases are dense, learn, and are not counted.
    """
    generator = reproducible(seed)
    made = tasks(seed)
    network = nn.Sequential(nn.Linear(CHANNELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(),
                            nn.Linear(HIDDEN, 2 * NUM_TASKS))  # fmt: skip
    layers = [layer for layer in network if isinstance(layer, nn.Linear)]
    kept = [_most(torch.rand(layer.weight.shape, generator=generator), saving.weights_frac) for layer in layers]
    _mask(layers, kept)
    update = torch.optim.SGD(network.parameters(), lr=lr, momentum=0.9)
    memory = torch.zeros(0, CHANNELS), torch.zeros(0, dtype=torch.long)
    work = {"forward": 0, "backward to activations": 0, "gradients of weights": 0, "choosing the masks": 0}
    dur_ns = 0
    sparse = saving.gradients_frac < 1  # never more than weights
    for x, y in ((x[:PER_TASK], y[:PER_TASK]) for x, y in made):
        left = torch.arange(PER_TASK)
        for epoch in range(num_epochs):
            begin = time.perf_counter_ns()
            learning = kept
            if sparse:
                probe = _mixed(x, y, memory, left[torch.randperm(len(left), generator=generator)[:_BATCH]], generator)
                kept, learning = _chosen(network, layers, kept, probe, saving)
                work["choosing the masks"] += 6 * len(probe[1]) * sum(layer.weight.numel() for layer in layers)
            confidence = torch.zeros(PER_TASK)
            for part in left[torch.randperm(len(left), generator=generator)].split(_BATCH):
                xs, ys = _mixed(x, y, memory, part, generator)
                output = network(xs)
                update.zero_grad()
                cross_entropy(output, ys).backward()
                for layer, mask in zip(layers, learning, strict=True):
                    if sparse and layer.weight.grad is not None:
                        layer.weight.grad.mul_(mask)
                update.step()
                if sparse:
                    _mask(layers, kept)
                own = output.detach()[: len(part)]
                confidence[part] = own.softmax(-1)[torch.arange(len(part)), y[part]]
                _count(work, len(ys), kept, learning)
            dur_ns += time.perf_counter_ns() - begin
            share = 1 - (1 - saving.examples_frac) * (epoch + 1) / max(1, num_epochs - 1)
            if epoch + 1 < num_epochs:
                left = left[confidence[left].argsort()[: max(_BATCH, round(share * PER_TASK))]]
        memory = _remembered(memory, x, y, generator)
    right, num = 0, 0
    with torch.no_grad():
        for x, y in made:
            right += int((network(x[PER_TASK:]).argmax(-1) == y[PER_TASK:]).sum())
            num += len(y) - PER_TASK
    title, total = "Work of learning all tasks", sum(work.values())
    return Learnt(
        right / num, Account.of(title, "FLOPs", work, total=total, source="the weights kept", basis="derived"), dur_ns
    )


def _most(score: Tensor, share: float) -> Tensor:
    """The places with the highest scores, as a mask."""
    mask = torch.zeros(score.numel(), dtype=torch.bool)
    mask[score.flatten().topk(max(1, round(share * score.numel()))).indices] = True
    return mask.view(score.shape)


def _mask(layers: _Weights, kept: list[Tensor]) -> None:
    for layer, mask in zip(layers, kept, strict=True):
        layer.weight.data.mul_(mask)


def _mixed(
    x: Tensor, y: Tensor, memory: tuple[Tensor, Tensor], part: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Examples of the task, and as many from memory as a step replays."""
    if not len(memory[1]):
        return x[part], y[part]
    replayed = torch.randint(len(memory[1]), (_REPLAY,), generator=generator)
    return torch.cat([x[part], memory[0][replayed]]), torch.cat([y[part], memory[1][replayed]])


def _remembered(
    memory: tuple[Tensor, Tensor], x: Tensor, y: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """A memory in which each task so far has the same share."""
    num_seen = len(memory[1].unique()) // 2 + 1
    old = torch.randperm(len(memory[1]), generator=generator)[: _BUFFER * (num_seen - 1) // num_seen]
    new = torch.randperm(len(y), generator=generator)[: _BUFFER // num_seen]
    return torch.cat([memory[0][old], x[new]]), torch.cat([memory[1][old], y[new]])


def _chosen(
    network: nn.Module, layers: _Weights, kept: list[Tensor], probe: tuple[Tensor, Tensor], saving: Saving
) -> tuple[list[Tensor], list[Tensor]]:
    """New masks of the weights, and of those that learn."""
    gradients = torch.autograd.grad(cross_entropy(network(probe[0]), probe[1]), [layer.weight for layer in layers])
    new_kept, learning = [], []
    for layer, mask, gradient in zip(layers, kept, gradients, strict=True):
        num = int(mask.sum())
        stay = num - round(_SWAP_FRAC * num)
        importance = layer.weight.detach().abs() / layer.weight.detach().abs().max() + (
            gradient.abs() / gradient.abs().max().clamp(min=1e-12)
        )
        importance[~mask] = -1
        staying = _most(importance, stay / mask.numel())
        grown = gradient.abs().masked_fill(staying, -1)
        new = staying | _most(grown, (num - stay) / mask.numel())
        new_kept.append(new)
        learning.append(_most(gradient.abs().masked_fill(~new, -1), saving.gradients_frac) & new)
    return new_kept, learning


def _count(work: dict[str, int], num: int, kept: list[Tensor], learning: list[Tensor]) -> None:
    sizes = [int(mask.sum()) for mask in kept]
    work["forward"] += 2 * num * sum(sizes)
    work["backward to activations"] += 2 * num * sum(sizes[1:])  # nothing is asked of the inputs
    work["gradients of weights"] += 2 * num * sum(int(mask.sum()) for mask in learning)
