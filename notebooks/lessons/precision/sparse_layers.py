"""Static unstructured sparsity: which weights are kept, what that saves on paper, and what a dense kernel does."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from effkit import Account
from lessons.precision.small_language import adamw, matrices, train, untrained

Masks = Mapping[str, Tensor]


def width_factor(sparsity_frac: float) -> float:
    """How many times wider a layer may be at equal FLOPs when this share of its weights is zero: sqrt(1 / (1 - s)).

    Both its inputs and outputs grow (Sparse Wide of Sparse-IFT, arXiv 2303.11525).

    >>> width_factor(0.75)
    2.0
    """
    _check(sparsity_frac)
    return math.sqrt(1 / (1 - sparsity_frac))


def random_mask(shape: Sequence[int], density_frac: float, generator: torch.Generator) -> Tensor:
    """A boolean mask with ``round(density_frac x elements)`` places set, each as likely as any other."""
    _check(1 - density_frac)
    num = math.prod(shape)
    mask = torch.zeros(num, dtype=torch.bool)
    mask[torch.randperm(num, generator=generator)[: round(density_frac * num)]] = True
    return mask.view(*shape)


def static_masks(model: nn.Module, sparsity_frac: float, seed: int = 0) -> dict[str, Tensor]:
    """A random mask for each linear layer of the blocks, by its name; embedding and output layer stay dense."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: random_mask(layer.weight.shape, 1 - sparsity_frac, generator) for name, layer in matrices(model).items()
    }


def apply_masks(model: nn.Module, masks: Masks) -> None:
    """Set the weights that are not kept to zero, and their gradients where there are any."""
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data.mul_(mask)
        if weight.grad is not None:
            weight.grad.mul_(mask)


def sparse_language(seed: int, sparsity_frac: float) -> tuple[nn.Module, dict[str, Tensor]]:
    """An untrained small language model with static masks, what is kept scaled up so that its outputs are as large."""
    model = untrained(seed)
    masks = static_masks(model, sparsity_frac, seed)
    apply_masks(model, masks)
    for name in masks:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.data.mul_(width_factor(sparsity_frac))
    return model, masks


def train_masked(model: nn.Module, masks: Masks, text: Tensor, num_steps: int, lr: float, seed: int = 0) -> int:
    """Train with AdamW, the masked weights held at zero; returns the median time of a step [ns]."""

    def hold(_: int) -> None:
        apply_masks(model, masks)

    return train(model, text, num_steps, adamw(model, lr), seed=seed, before_update=hold, after_update=hold)


def perceptron(sizes: Sequence[int], sparsity_frac: float = 0.0, seed: int = 0) -> tuple[nn.Sequential, Masks]:
    """A multilayer perceptron, sparse-wide: hidden sizes grow by the width factor, and each layer keeps its FLOPs.

    Parameters
    ----------
    sizes
        Of the dense one: inputs, hidden layers, outputs. Inputs and outputs are not widened, so that the first and the
        last layer keep the inverse of the width factor of their weights, and those between its inverse square.
    sparsity_frac
        Of the layers between; 0 makes the dense one.

    Returns
    -------
    tuple
        The network, with masked weights at the scale of what is kept, and its masks by name of layer.
    """
    factor = width_factor(sparsity_frac)
    wide = [sizes[0], *(round(size * factor) for size in sizes[1:-1]), sizes[-1]]
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = []
    masks: dict[str, Tensor] = {}
    for number, (inputs, outputs) in enumerate(itertools.pairwise(wide)):
        kept = sizes[number] * sizes[number + 1] / (inputs * outputs)
        layer = nn.utils.skip_init(nn.Linear, inputs, outputs)  # draws nothing from torch's own generator
        nn.init.normal_(layer.weight, std=math.sqrt(2 / (inputs * kept)), generator=generator)
        nn.init.zeros_(layer.bias)
        masks[str(len(layers))] = random_mask((outputs, inputs), kept, generator)
        layers += [layer, nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    apply_masks(network, masks)
    return network, masks


def fit(network: nn.Sequential, masks: Masks, x: Tensor, y: Tensor, *, num_epochs: int = 8, lr: float = 3e-3) -> None:
    """Teach a masked perceptron to classify: x of shape (examples, inputs), y (examples,); AdamW, batches of 64."""
    update = torch.optim.AdamW(network.parameters(), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_epochs):
        for part in torch.randperm(len(y), generator=generator).split(64):
            update.zero_grad()
            cross_entropy(network(x[part]), y[part]).backward()
            apply_masks(network, masks)
            update.step()
            apply_masks(network, masks)


def flops_per_example(masks: Masks, *, stored: bool = False) -> int:
    """FLOPs of the products of one forward pass: of the weights that are kept, or of all that a dense kernel reads."""
    return sum(2 * (mask.numel() if stored else int(mask.sum())) for mask in masks.values())


def compressed_rows(weight: Tensor) -> Tensor:
    """The matrix with only its weights that are not zero (CSR), which torch announces as beta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        return weight.detach().to_sparse_csr()


def break_even_frac(times: float, zeros_frac: float) -> float:
    """From which share of zeros a kernel that skips them is faster than a dense one.

    ``times`` is its time over the dense kernel's at ``zeros_frac`` zeros; each weight that is kept takes as long.

    >>> break_even_frac(2.0, 0.75)
    0.875
    """
    _check(zeros_frac)
    return 1 - (1 - zeros_frac) / times


def flops_per_token(*, layers: int, hidden: int, vocabulary: int, context: int, sparsity_frac: float = 0.0) -> Account:
    """FLOPs of a forward pass per token of a GPT, with sparse blocks and what stays dense (SPDF, arXiv 2303.10464).

    A block has 12 x hidden^2 weights. Scores of attention and what they are multiplied with have none, and embedding
    and output layer are not made sparse. Every query is counted against the whole context, as if attention were not
    causal: with half of the pairs the ratio at 75% would be 2.8, not 2.5. Backward takes twice as much of each row, so
    that ratios are those of training.
    """
    _check(sparsity_frac)
    rows = {
        "weights of the blocks": round(2 * layers * 12 * hidden**2 * (1 - sparsity_frac)),
        "attention scores (stay dense)": layers * 4 * context * hidden,
        "output layer (stays dense)": 2 * hidden * vocabulary,
    }
    return Account.of(
        f"Work per token at {sparsity_frac:.0%} sparsity", "FLOPs", rows, total=sum(rows.values()),
        source="these rows", basis="derived",
    )  # fmt: skip


def _check(sparsity_frac: float) -> None:
    if not 0 <= sparsity_frac < 1:
        raise ValueError(f"a share of {sparsity_frac} zeros is given, expected one from 0 to below 1")
