"""How far an update of Adam's moves when its moments are kept in eight bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pandas as pd
import torch

from effkit.quantisation import SIGNED, UNSIGNED, Format, dequantise_state, quantise_state


def update_error(
    states: torch.optim.Optimizer | Iterable[tuple[torch.Tensor, torch.Tensor]], *, group: int = 128, eps: float = 1e-8
) -> pd.DataFrame:
    """How far Adam's update u = m / (sqrt(v) + eps) moves when m and v are kept in each format.

    Parameters
    ----------
    states
        An optimizer that keeps ``exp_avg`` and ``exp_avg_sq`` in full (torch.optim.AdamW, after some steps), or pairs
        of the two.
    group
        Neighbouring values that share a scale.
    eps
        Of the update.

    Returns
    -------
    DataFrame
        A row per format and ``expand``: ``error_frac``, the norm of the change over the norm of the update (all
        parameters together); ``median_error_frac``, the middle change of a value over its size; ``mean_squared_error``
        (what COAT reports), whose ratios are the squares of those of ``error_frac``; ``lost_frac``, the part
        of second moments above 0 that became 0.
    """
    if isinstance(states, torch.optim.Optimizer):
        states = [(state["exp_avg"], state["exp_avg_sq"]) for state in states.state.values()]
    pairs = [(first.detach().float(), second.detach().float()) for first, second in states]
    if not pairs:
        raise ValueError("update_error is of states after at least one step; given: none; train a little first")
    return pd.DataFrame([_error(pairs, name, group, eps, expand) for name in SIGNED for expand in (False, True)])


def _error(
    pairs: list[tuple[torch.Tensor, torch.Tensor]], name: str, group: int, eps: float, expand: bool
) -> dict[str, Any]:
    def restored(moment: torch.Tensor, form: Format) -> torch.Tensor:
        return dequantise_state(quantise_state(moment, form, group, expand=expand), form, moment.shape)

    exact, changes, lost = [], [], []
    for first, second in pairs:
        m, v = restored(first, SIGNED[name]), restored(second, UNSIGNED[name])
        exact.append((first / (second.sqrt() + eps)).flatten())
        changes.append((m / (v.sqrt() + eps)).flatten() - exact[-1])
        lost.append((v == 0)[second > 0])
    update, change = torch.cat(exact), torch.cat(changes)
    some = update != 0
    return {
        "states": name, "expand": expand, "error_frac": float(change.norm() / update.norm()),
        "median_error_frac": float((change[some] / update[some]).abs().median()),
        "mean_squared_error": float(change.square().mean()),
        "lost_frac": float(torch.cat(lost).float().mean()),
    }  # fmt: skip
