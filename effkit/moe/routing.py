"""Which token goes to which expert: the same numbers for the ranks that run a step and for a prediction of it."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from effkit.moe.setting import Setting

Array = np.ndarray[Any, np.dtype[Any]]
_CLUSTER_SPREAD = 0.1  # of the tokens around their cluster's centre, which have unit variance


@dataclass(frozen=True, eq=False)
class Traffic:
    """What one step sends.

    ``routed`` are the token copies that each rank's tokens ask of each expert, shape [num_ranks, num_experts]; of the
    same shape, ``kept`` those within the capacity, and ``rows`` what travels: kept copies, or centroids, or full
    capacities. ``owner`` is the rank that holds each expert, shape [num_experts]; -1 where every rank does.
    """

    routed: Array
    kept: Array
    rows: Array
    owner: Array

    @property
    def dropped(self) -> Array:
        """Token copies that found their expert full, shape [num_ranks]."""
        return (self.routed - self.kept).sum(axis=1)

    @property
    def moved(self) -> Array:
        """Rows from each rank (axis 0) to each rank (axis 1) in a dispatch; the combine takes them back."""
        num_ranks = len(self.rows)
        moved = np.stack([self.rows[:, self.owner == rank].sum(axis=1) for rank in range(num_ranks)], axis=1)
        moved[np.diag_indices(num_ranks)] += self.rows[:, self.owner < 0].sum(axis=1)
        return moved

    def held(self, rank: int) -> Array:
        """Rows that each expert on ``rank`` works on, from each rank: shape [num_ranks, experts held]."""
        return self._held[rank]

    @functools.cached_property
    def _held(self) -> list[Array]:
        by_rank = []
        for rank in range(len(self.rows)):
            experts = np.flatnonzero((self.owner == rank) | (self.owner < 0))
            held = self.rows[:, experts].copy()
            held[np.ix_(np.arange(len(held)) != rank, self.owner[experts] < 0)] = 0
            by_rank.append(held)
        return by_rank

    def beside(self, rank: int) -> float:
        """Rows that other ranks work on while ``rank`` does: of each as many as both have."""
        rows = [float(held.sum()) for held in self._held]
        return sum(min(of_other, rows[rank]) for of_other in rows) - rows[rank]


def capacity(setting: Setting) -> int:
    """Token copies that an expert takes from one rank."""
    if not setting.capacity_factor:
        return setting.num_tokens
    return math.ceil(setting.capacity_factor * setting.top_k * setting.num_tokens / setting.num_experts)


def owners(setting: Setting, num_ranks: int) -> Array:
    """The rank that holds each expert, shape [num_experts]; -1 for those that every rank holds.

    ValueError when the ranks cannot hold equal numbers of experts, or a placement names a rank that there is not.

    >>> owners(Setting(num_experts=4), num_ranks=2).tolist()
    [0, 0, 1, 1]
    """
    single = setting.num_experts - setting.num_replicas
    owner = np.full(setting.num_experts, -1)
    if isinstance(setting.placement, tuple):
        if not all(0 <= rank < num_ranks for rank in setting.placement):
            raise ValueError(f"placement names ranks 0 to {num_ranks - 1}; given: {setting.placement}")
        owner[setting.num_replicas :] = setting.placement[setting.num_replicas :]
        if idle := sorted(set(range(num_ranks)) - set(owner.tolist())) if not setting.num_replicas else []:
            raise ValueError(f"placement gives no expert to rank {idle[0]}: every rank holds at least one")
        return owner
    if single % num_ranks:
        kept = f" after {setting.num_replicas} replicas" if setting.num_replicas else ""
        raise ValueError(f"{single} experts{kept} cannot be shared equally by {num_ranks} ranks: choose a multiple of "
                         f"{num_ranks}, or give the placement")  # fmt: skip
    if setting.placement == "block":
        owner[setting.num_replicas :] = np.repeat(np.arange(num_ranks), single // num_ranks)
    else:
        from effkit.moe.loads import balanced_placement

        popular = popularity(setting)[setting.num_replicas :]
        owner[setting.num_replicas :] = balanced_placement(popular[None], num_ranks)
    return owner


def popularity(setting: Setting) -> Array:
    """Probability that a first choice falls on each expert, shape [num_experts], with sum 1."""
    size = setting.num_experts // setting.num_modalities
    within = np.arange(1, size + 1) ** -float(setting.skew)
    # experts of all modalities take turns, so that the popular ones of each come first
    return np.repeat(within / within.sum(), setting.num_modalities) / setting.num_modalities


def scores(setting: Setting, rank: int, step: int) -> Array:
    """What stands for the router's logits: shape [num_tokens, num_experts], float32.

    A token's k highest are k draws without replacement from the experts' popularity (Gumbel top-k).
    """
    # clusters choose alike on all ranks
    draw = np.random.default_rng([setting.seed, 1, step] if setting.num_clusters else [setting.seed, 1, rank, step])
    noise = draw.gumbel(size=(setting.num_clusters or setting.num_tokens, setting.num_experts))
    logits = noise + np.log(popularity(setting))
    if setting.num_clusters:
        logits = logits[clusters(setting, rank, step)]
    if setting.num_modalities > 1:
        of_token = np.arange(setting.num_tokens)[:, None] % setting.num_modalities
        logits[of_token != np.arange(setting.num_experts)[None] % setting.num_modalities] = -np.inf
    return logits.astype(np.float32)


def clusters(setting: Setting, rank: int, step: int) -> Array:
    """The cluster of each token, shape [num_tokens]."""
    return np.random.default_rng([setting.seed, 2, rank, step]).integers(setting.num_clusters, size=setting.num_tokens)


def tokens(setting: Setting, rank: int, step: int) -> Array:
    """The layer's input: shape [num_tokens, hidden], unit variance, float32."""
    draw = np.random.default_rng([setting.seed, 3, rank, step])
    x = draw.standard_normal((setting.num_tokens, setting.hidden), dtype=np.float32)
    if setting.num_clusters:
        draw = np.random.default_rng([setting.seed, 4])
        centre = draw.standard_normal((setting.num_clusters, setting.hidden), dtype=np.float32)
        x = centre[clusters(setting, rank, step)] + np.float32(_CLUSTER_SPREAD) * x
    return x


@functools.lru_cache(maxsize=512)  # to make the key takes a hundred times as long as to find it
def traffic(setting: Setting, num_ranks: int, step: int) -> Traffic:
    """What one step sends, to the row; ValueError when the ranks cannot share the experts."""
    # what does not change the traffic is left out of the key
    key = setting.change(ffn=1, num_chunks=1, num_chunks_backward=0, compensate=False, backward=True,
                         message_dtype="same")  # fmt: skip
    return _traffic(key if key.compress != "none" else key.change(hidden=1, dtype="float32"), num_ranks, step)


@functools.lru_cache(maxsize=512)
def _traffic(setting: Setting, num_ranks: int, step: int) -> Traffic:
    most, num_experts = capacity(setting), setting.num_experts
    routed, rows = [], []
    for rank in range(num_ranks):
        chosen = np.argsort(-scores(setting, rank, step), axis=1, kind="stable")[:, : setting.top_k]
        routed.append(np.bincount(chosen.ravel(), minlength=num_experts))
        if setting.compress == "lsh":
            rows.append(_centroids(setting, rank, step, chosen, most))
    asked = np.stack(routed)
    kept = np.minimum(asked, most)
    sent = np.stack(rows) if rows else np.full_like(kept, most) if setting.pad else kept
    return Traffic(asked, kept, sent, owners(setting, num_ranks))


def _centroids(setting: Setting, rank: int, step: int, chosen: Array, most: int) -> Array:
    """Buckets that the kept tokens of each expert fall into, shape [num_experts]."""
    import torch

    from effkit.models.lsh import buckets, directions

    x = torch.from_numpy(tokens(setting, rank, step)).to(getattr(torch, setting.dtype))  # rounded, as the layer has it
    bucket = buckets(x, directions(setting.hidden, setting.num_hashes)).numpy()
    flat = chosen.T.ravel()  # first choices before second ones
    kept = [np.flatnonzero(flat == expert)[:most] % setting.num_tokens for expert in range(setting.num_experts)]
    return np.array([len(np.unique(bucket[tokens_of_expert])) for tokens_of_expert in kept])
