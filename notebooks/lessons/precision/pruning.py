"""Two of four: the pattern of zeros that GPUs have kernels for, reached at once or by a decay of what will go."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from lessons.precision.small_language import adamw, matrices, train
from lessons.precision.sparse_layers import apply_masks, train_masked

_REFRESH_STEPS = 5


def two_of_four(weight: Tensor) -> Tensor:
    """Which weights are kept: the two of largest magnitude in each four neighbours of a row.

    Raises
    ------
    ValueError
        When rows do not divide into fours.
    """
    if weight.shape[-1] % 4:
        raise ValueError(f"rows have {weight.shape[-1]} weights, expected a multiple of 4")
    fours = weight.detach().abs().reshape(-1, 4)
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(1, fours.topk(2, dim=1).indices, True)
    return kept.view(weight.shape)


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The two-of-four mask of each linear layer of the blocks, by name."""
    return {name: two_of_four(layer.weight) for name, layer in matrices(model).items()}


def tail_share(model: nn.Module) -> float:
    """What pruning to two of four would take away now: the share of the squared weights that is not kept, of 1."""
    gone, total = 0.0, 0.0
    for layer in matrices(model).values():
        squares = layer.weight.detach().square()
        gone += float(squares[~two_of_four(layer.weight)].sum())
        total += float(squares.sum())
    return gone / total


class Decay:
    """Shrinks the two smallest of each four a little every step, more as training goes on, and scales the rows up.

    The idea of CAST (arXiv 2509.25996), not its optimizer. Here, after each step of AdamW, the two smallest lose a
    number: w - less sign(w), a decoupled L1 decay that Adam's moments do not see. Their AdamS, as others have written
    it down again (the paper itself was not checked), mixes sign(w) into Adam's first moment with a weight that grows
    from 0 to 1, so that the decay is divided by the root of the second moment like any gradient, and the loss's own
    pull on those weights fades out; here it does not. Which two are smallest is looked up every few steps, so that a
    weight may come back. A row that has become shorter than it was at first is then scaled up, by 2 / ``num_steps`` a
    step at most: a stand-in for their weight scaling, of which no more than the purpose was looked up. Their
    distillation from the dense model is not here.

    Parameters
    ----------
    model
        Its linear layers of the blocks are driven.
    num_steps
        After which the pattern is exact: the last step sets what is left to zero.
    strength
        What decays in all by the end, in mean magnitudes of the layer at first, if nothing pushed back.

    Raises
    ------
    ValueError
        When a number is not positive.
    """

    def __init__(self, model: nn.Module, num_steps: int, strength: float) -> None:
        if num_steps < 1 or strength <= 0:
            raise ValueError(f"num_steps {num_steps}, strength {strength}: expected both above 0")
        self.model, self.num_steps, self.strength = model, num_steps, strength
        self.kept = masks(model)
        self.norms = {name: _row_norms(layer.weight) for name, layer in matrices(model).items()}
        self.magnitudes = {name: float(layer.weight.detach().abs().mean()) for name, layer in matrices(model).items()}

    @torch.no_grad()
    def __call__(self, step: int) -> None:
        """After the optimizer's step of this number, from 0."""
        if step % _REFRESH_STEPS == 0:
            self.kept = masks(self.model)
        last = step == self.num_steps - 1
        share = 2 * (step + 1) / (self.num_steps * (self.num_steps + 1))  # grows linearly, 1 in all
        for name, layer in matrices(self.model).items():
            weight, going = layer.weight, ~self.kept[name]
            less = weight.abs() if last else weight.abs().clamp(max=self.strength * share * self.magnitudes[name])
            weight.sub_(weight.sign() * less * going)
            scale = (self.norms[name] / _row_norms(weight).clamp(min=1e-12)).clamp(max=1.0 + 2.0 / self.num_steps)
            weight.mul_(scale.clamp(min=1.0))


def _row_norms(weight: Tensor) -> Tensor:
    return weight.detach().norm(dim=1, keepdim=True)


def ways_to_two_of_four(
    model: nn.Module, text: Tensor, num_steps: int, *, lr: float, strength: float, seed: int = 0
) -> dict[str, nn.Module]:
    """Copies of a trained model, all but the second trained for as many more steps on the same pieces.

    Returns
    -------
    dict
        ``"dense, trained on"``, ``"one shot"`` (pruned by magnitude and nothing else), ``"one shot, trained on"`` (that
        pattern held), ``"decayed"`` (:class:`Decay`).
    """
    dense, one_shot, decayed = (copy.deepcopy(model) for _ in range(3))
    kept = masks(one_shot)
    apply_masks(one_shot, kept)
    held = copy.deepcopy(one_shot)
    train(dense, text, num_steps, adamw(dense, lr), seed=seed)
    train_masked(held, kept, text, num_steps, lr, seed)
    train(decayed, text, num_steps, adamw(decayed, lr), seed=seed, after_update=Decay(decayed, num_steps, strength))
    return {"dense, trained on": dense, "one shot": one_shot, "one shot, trained on": held, "decayed": decayed}
