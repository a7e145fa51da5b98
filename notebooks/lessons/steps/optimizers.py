"""LAMB (arXiv 1904.00962) and Conda (arXiv 2509.24218): Adam with one thing changed each."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from effkit.training import PerParameter


def _direction(first: torch.Tensor, second: torch.Tensor, betas: tuple[float, float], step: int) -> torch.Tensor:
    """Adam's ``m̂ / (√v̂ + 1e-8)``, bias corrected (Kingma and Ba, arXiv 1412.6980, algorithm 1)."""
    return (first / (1 - betas[0] ** step)) / ((second / (1 - betas[1] ** step)).sqrt() + 1e-8)


class _Adaptive(PerParameter):
    """What both share: checks and state."""

    def __init__(self, parameters: Iterable[nn.Parameter], **defaults: Any) -> None:
        if not defaults["lr"] > 0 or not all(0 <= beta < 1 for beta in defaults["betas"]):
            raise ValueError(
                f"the learning rate is {defaults['lr']} and the betas {defaults['betas']}; expected a positive rate "
                "and betas in [0, 1)"
            )
        super().__init__(parameters, defaults)

    def _update(self, parameter: torch.Tensor, settings: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state.update(step=0, first=torch.zeros_like(parameter), second=torch.zeros_like(parameter))
        state["step"] += 1
        assert parameter.grad is not None  # or step() would have passed it by
        self._move(parameter, parameter.grad, state, settings)

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: Any) -> None:
        raise NotImplementedError


class Lamb(_Adaptive):
    """Adam whose step is, in every layer, a fixed fraction of the length of that layer's weights.

    ``w -= lr (|w| / |u|) u`` with ``u = m̂ / (√v̂ + ε) + weight_decay w`` (arXiv 1904.00962, algorithm 2, with φ the
    identity). The trust ratio ``|w| / |u|`` is 1 where a norm is 0.

    Parameters
    ----------
    parameters
        To be moved.
    lr
        Length of a step as a fraction of the length of the weights.
    betas, weight_decay
        As in AdamW.

    Raises
    ------
    ValueError
        When the rate is not positive or a beta not in [0, 1).
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-2,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        super().__init__(parameters, lr=lr, betas=betas, weight_decay=weight_decay)

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: Any) -> None:
        betas = group["betas"]
        state["first"].lerp_(gradient, 1 - betas[0])
        state["second"].mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
        update = _direction(state["first"], state["second"], betas, state["step"])
        update.add_(parameter, alpha=group["weight_decay"])
        weights, length = parameter.norm(), update.norm()
        trust = torch.where((weights > 0) & (length > 0), weights / length, torch.ones_like(length))
        parameter.sub_(group["lr"] * trust * update)


class Conda(_Adaptive):
    """Adam in the basis of its momentum's singular vectors (column-normalised Adam), for matrices.

    With ``U`` the singular vectors on the shorter side of the momentum ``m``, found anew every ``num_steps_kept``
    steps, ``v = b2 v + (1 - b2) (Uᵀ g)²`` and ``w -= lr U ((Uᵀ m̂) / (√v̂ + ε))`` (arXiv 2509.24218; a constant factor
    on the step, as public implementations have it, is part of the rate here). Weight decay is decoupled, as in AdamW.

    Parameters
    ----------
    parameters
        Matrices: parameters of two dimensions.
    lr
        Learning rate.
    num_steps_kept
        Steps that one basis serves.
    betas, weight_decay
        As in AdamW.

    Raises
    ------
    ValueError
        When the rate is not positive, a beta not in [0, 1), or a parameter is no matrix.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float = 1e-2,
        *,
        num_steps_kept: int = 2000,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.01,
    ) -> None:
        matrices = list(parameters)
        wrong = [tuple(one.shape) for one in matrices if one.dim() != 2]
        if wrong or num_steps_kept < 1:
            raise ValueError(
                f"shapes {wrong} and {num_steps_kept} steps per basis; expected matrices only and at least 1 step: "
                "give vectors to AdamW"
            )
        self.num_steps_kept = num_steps_kept
        super().__init__(matrices, lr=lr, betas=betas, weight_decay=weight_decay)

    @property
    def finds_basis_next(self) -> bool:
        """Whether the next step begins with a singular value decomposition."""
        done = max((state["step"] for state in self.state.values()), default=0)
        return bool(done % self.num_steps_kept == 0)

    def _move(self, parameter: torch.Tensor, gradient: torch.Tensor, state: dict[str, Any], group: Any) -> None:
        betas, wide = group["betas"], parameter.shape[0] <= parameter.shape[1]
        state["first"].lerp_(gradient, 1 - betas[0])
        first = state["first"] if wide else state["first"].T
        if (state["step"] - 1) % self.num_steps_kept == 0:
            state["basis"] = torch.linalg.svd(first, full_matrices=False).U
            if state["step"] == 1:
                state["second"] = torch.zeros_like(first)
        basis = state["basis"]
        seen = basis.T @ (gradient if wide else gradient.T)
        state["second"].mul_(betas[1]).addcmul_(seen, seen, value=1 - betas[1])
        update = basis @ _direction(basis.T @ first, state["second"], betas, state["step"])
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * (update if wide else update.T))


def matrices_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Matrices between embedding and output layer, which Muon and Conda are for, and everything else, for AdamW."""
    ends = {
        id(one)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        or (isinstance(module, nn.Linear) and module is getattr(model, "lm_head", None))
        for one in module.parameters()
    }
    inner = [one for one in model.parameters() if one.dim() == 2 and id(one) not in ends]
    chosen = {id(one) for one in inner}
    return inner, [one for one in model.parameters() if id(one) not in chosen]
