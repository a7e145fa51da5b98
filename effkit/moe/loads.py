"""How unevenly tokens fall on experts and ranks, and a placement that evens it out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from effkit.account import Account

Array = np.ndarray[Any, np.dtype[Any]]
_FORM = "[num_steps, num_experts] or [num_steps, num_ranks, num_experts]"


def imbalance(loads: Any, owner: Sequence[int] | None = None, *, num_ranks: int | None = None) -> pd.DataFrame:
    """How unevenly tokens fall on experts, and on the ranks that hold them.

    Every figure is taken **per step, then averaged** over the steps that have tokens: all wait for the most loaded of
    *their* step. Averaging the loads first lets one step's peak fill another's gap, and understates. ValueError when
    the loads are not of that form, or the ranks cannot hold equal numbers of experts.

    Parameters
    ----------
    loads
        Tokens: an array [num_steps, num_experts], or [num_steps, num_ranks, num_experts] by the rank that sends them;
        or an Account of ``moe.measure``, which knows its experts' ranks.
    owner
        The rank that holds each expert, shape [num_experts]; -1 for one that every rank holds for its own tokens. By
        default equal blocks of neighbours.
    num_ranks
        How many ranks there are; by default as many as send, or as ``owner`` names.

    Returns
    -------
    DataFrame
        Rows ``expert``, and ``rank`` where the ranks are known. ``max_over_mean``; ``coefficient_of_variation``
        (standard deviation over mean); ``busiest``, the most loaded over all steps; ``share_of_busiest_frac``, its
        share of all tokens; ``idle_frac`` = 1 - mean / max, what the others lose by waiting if time is proportional to
        load.

    Examples
    --------
    >>> table = imbalance([[30, 10], [10, 30]], num_ranks=2)
    >>> float(table.loc["rank", "max_over_mean"])  # 1.0 if steps were averaged first
    1.5
    """
    if isinstance(loads, Account):
        calibration = _calibration(loads)
        loads, owner = calibration.loads, getattr(calibration, "owner", None) if owner is None else owner
    tokens, by_source = _checked(loads), np.ndim(loads) == 3
    if by_source and num_ranks not in (None, tokens.shape[1]):
        raise ValueError(f"the loads are of {tokens.shape[1]} ranks, so num_ranks is that; given: {num_ranks}")
    num_ranks = tokens.shape[1] if by_source else num_ranks
    table = {"expert": _figures(tokens.sum(axis=1))}
    if owner is not None:
        table["rank"] = _figures(_per_rank(tokens, *_placed(owner, tokens.shape[2], num_ranks, by_source)))
    elif num_ranks is not None:
        table["rank"] = _figures(_per_rank(tokens, _blocks(tokens.shape[2], num_ranks), num_ranks))
    frame = pd.DataFrame.from_dict(table, orient="index").rename_axis("of")
    return frame.astype({"busiest": "int64"})


def balanced_placement(loads: Any, num_ranks: int) -> tuple[int, ...]:
    """A rank for each of num_experts, so that the most loaded rank has little: a framework's expert map.

    The heaviest expert first, each goes to the least loaded rank that has room (longest processing time first, Graham
    1969, with equal numbers of experts per rank); equal blocks of neighbours where these happen to be better. It goes
    by mean loads over the steps, so it evens out lasting popularity and not what changes from step to step.

    Parameters
    ----------
    loads
        As in :func:`imbalance`.
    num_ranks
        How many ranks there are; a divisor of the number of experts.

    Examples
    --------
    >>> balanced_placement([[40, 30, 20, 10]], num_ranks=2)
    (0, 1, 1, 0)
    """
    if isinstance(loads, Account):
        loads = _calibration(loads).loads
    tokens = _checked(loads)
    mean = tokens.sum(axis=1).mean(axis=0)
    blocks = _blocks(len(mean), num_ranks)
    room = np.full(num_ranks, len(mean) // num_ranks)
    held = np.zeros(num_ranks)
    placed = np.zeros(len(mean), dtype=np.int64)
    for expert in np.argsort(-mean, kind="stable"):
        rank = int(np.argmin(np.where(room > 0, held, np.inf)))
        placed[expert] = rank
        held[rank] += mean[expert]
        room[rank] -= 1
    if held.max() > np.bincount(blocks, mean, num_ranks).max():
        placed = blocks
    return tuple(placed.tolist())


def _calibration(account: Account) -> Any:
    if not hasattr(account.calibration, "loads"):
        raise ValueError(f"the account “{account.title}” holds no loads: give one of moe.measure(), or an array "
                         f"{_FORM} of tokens")  # fmt: skip
    return account.calibration


def _checked(loads: Any) -> Array:
    """The loads as [num_steps, num_sources, num_experts] of float64."""
    try:
        tokens = np.asarray(loads, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"loads are numbers of tokens in an array {_FORM}; given: {type(loads).__name__}") from error
    if tokens.ndim not in (2, 3) or not tokens.size:
        raise ValueError(f"loads are an array {_FORM} with at least one of each; given: shape {list(tokens.shape)}")
    if not (np.isfinite(tokens).all() and (tokens >= 0).all()):
        raise ValueError("loads are numbers of tokens, none negative and none missing; leave out steps without them")
    if not tokens.any():
        raise ValueError("no step has a token, so there is nothing to balance: give the loads of steps that ran")
    return tokens[:, None] if tokens.ndim == 2 else tokens


def _placed(owner: Sequence[int], num_experts: int, num_ranks: int | None, by_source: bool) -> tuple[Array, int]:
    """The rank of each expert [num_experts], as given, and how many ranks there are."""
    placed = np.asarray(owner)
    if placed.shape != (num_experts,) or not np.issubdtype(placed.dtype, np.integer):
        raise ValueError(f"owner is a rank for each of {num_experts} experts; given: shape {list(placed.shape)} of "
                         f"{placed.dtype}")  # fmt: skip
    num_ranks = num_ranks or int(placed.max()) + 1
    if placed.min() < -1 or placed.max() >= num_ranks or num_ranks < 1:
        raise ValueError(f"owner names ranks 0 to {num_ranks - 1}, or -1 for an expert that every rank holds; given: "
                         f"{sorted(set(placed.tolist()))}")  # fmt: skip
    if (placed < 0).any() and not by_source:
        raise ValueError("experts that every rank holds take each rank's own tokens: give the loads as [num_steps, "
                         "num_ranks, num_experts]")  # fmt: skip
    return placed, num_ranks


def _blocks(num_experts: int, num_ranks: int) -> Array:
    if num_ranks < 1 or num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts cannot be shared equally by {num_ranks} ranks: give a num_ranks that "
                         f"divides {num_experts}, or the owner of each expert")  # fmt: skip
    return np.repeat(np.arange(num_ranks), num_experts // num_ranks)


def _per_rank(tokens: Array, owner: Array, num_ranks: int) -> Array:
    """Tokens on each rank, shape [num_steps, num_ranks]."""
    held = np.stack([tokens[:, :, owner == rank].sum(axis=(1, 2)) for rank in range(num_ranks)], axis=1)
    return held + tokens[:, :, owner < 0].sum(axis=2) if (owner < 0).any() else held


def _figures(tokens: Array) -> dict[str, float]:
    """Of tokens [num_steps, num_members]: each step's figure, then their mean."""
    tokens = tokens[tokens.sum(axis=1) > 0]
    most, mean, overall = tokens.max(axis=1), tokens.mean(axis=1), tokens.sum(axis=0)
    return {
        "max_over_mean": float((most / mean).mean()),
        "coefficient_of_variation": float((tokens.std(axis=1) / mean).mean()),
        "busiest": int(overall.argmax()), "share_of_busiest_frac": float(overall.max() / overall.sum()),
        "idle_frac": float((1 - mean / most).mean()),
    }  # fmt: skip
