"""Setting: one expert-parallel layer and the load on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from effkit.lab import changed, check, flag, number, one_of, whole
from effkit.models import expert_parallel

if TYPE_CHECKING:
    from effkit.models.moe import ExpertParallel

COMPRESSIONS = ("none", "lsh")
MAX_HASHES = 12  # as in effkit.models.lsh, which needs torch
MESSAGE_DTYPES = ("same", "bfloat16", "float8")
PLACEMENTS = ("block", "balanced")
DTYPES = ("float32", "bfloat16")
# what a layer is not told: its tokens and their routing, and which rank holds what, which depends on the ranks
_OF_THE_LOAD = ("num_tokens", "skew", "num_modalities", "num_clusters", "placement", "num_replicas", "backward")


@dataclasses.dataclass(frozen=True)
class Setting:
    """One expert-parallel layer and the load on it.

    ValueError when a value is out of range; the sentence says which.

    Parameters
    ----------
    num_tokens
        Tokens of each rank in a step.
    hidden, ffn
        Widths of the model and of an expert's inner layer.
    num_experts, top_k
        Experts over all ranks, and how many of them each token goes to.
    capacity_factor
        An expert takes at most ``ceil(capacity_factor * top_k * num_tokens / num_experts)`` tokens from each rank and
        the rest are dropped (GShard, 2006.16668, section 2.2); 0 drops none.
    pad
        Send every expert exactly its capacity, empty rows included, so that all messages have one size.
    skew
        Zipf exponent of the experts' popularity: expert ``i`` is drawn with probability proportional to
        ``(i + 1) ** -skew``; 0 makes all alike.
    num_modalities
        Tokens and experts fall into this many equal groups, and a token is routed within its own (MoMa, 2407.21770).
    num_clusters
        Tokens lie near this many points, and those of one cluster choose the same experts; 0 spreads them at random.
    num_chunks, num_chunks_backward
        Into how many pieces the exchange is cut so that it overlaps with the experts (degree r); backward as forward
        when 0.
    compress, num_hashes
        ``"lsh"``: one centroid travels for all tokens of a rank and expert that share a bucket of ``num_hashes``
        cross-polytope hashes, at most 12 (LSH-MoE, 2411.08446). On tokens in clusters, 4 send the fewest rows at which
        the error is no more than the clusters' own width.
    compensate
        With ``"lsh"``: add what each token differs from its centroid to the expert's answer. For a model that is
        trained with it; added afterwards it makes the error larger, as notebook 03 shows.
    message_dtype
        What travels: ``"same"`` as computed, ``"bfloat16"``, or ``"float8"``: dispatch forward in e4m3 with a scale
        per 128 numbers, the rest in bfloat16 (as DeepEP does).
    placement
        Which rank holds which expert: ``"block"`` (neighbours together), ``"balanced"`` by expected load, or a tuple.
    num_replicas
        The most popular experts that every rank holds for itself; their gradients are summed over the ranks.
    dtype
        Of parameters and activations.
    backward
        Whether a step has a backward pass.
    seed
        Of tokens, routing and weights.
    """

    num_tokens: int = whole(1024)
    hidden: int = whole(256)
    ffn: int = whole(512)
    num_experts: int = whole(8)
    top_k: int = whole(2)
    capacity_factor: float = number(0.0)
    pad: bool = flag(False)
    skew: float = number(0.5)
    num_modalities: int = whole(1)
    num_clusters: int = whole(0, least=0)
    num_chunks: int = whole(1)
    num_chunks_backward: int = whole(0, least=0)
    compress: str = one_of("none", words=COMPRESSIONS)
    num_hashes: int = whole(4)
    compensate: bool = flag(False)
    message_dtype: str = one_of("same", words=MESSAGE_DTYPES)
    placement: str | tuple[int, ...] = "block"
    num_replicas: int = whole(0, least=0)
    dtype: str = one_of("float32", words=DTYPES)
    backward: bool = flag(True)
    seed: int = whole(0, least=0)

    def __post_init__(self) -> None:
        check(self)
        placed = not isinstance(self.placement, str)
        if placed:
            object.__setattr__(self, "placement", tuple(int(rank) for rank in self.placement))
        choices = self.num_experts // self.num_modalities
        for wrong, sentence in (
            (not placed and self.placement not in PLACEMENTS,
             f"placement is one of {', '.join(PLACEMENTS)}, or a rank per expert; given: {self.placement!r}"),
            (placed and len(self.placement) != self.num_experts, "placement names a rank for each expert; given: "
             f"{len(self.placement)} ranks for {self.num_experts} experts"),
            (self.num_experts % self.num_modalities,
             f"num_experts is a multiple of num_modalities; given: {self.num_experts} and {self.num_modalities}"),
            (self.top_k > choices,
             f"top_k is at most the number of experts to choose from, {choices}; given: {self.top_k}"),
            (self.num_replicas > self.num_experts,
             f"num_replicas is at most num_experts, {self.num_experts}; given: {self.num_replicas}"),
            (self.num_hashes > MAX_HASHES, f"num_hashes is at most {MAX_HASHES}; given: {self.num_hashes}"),
            (self.pad and not self.capacity_factor,
             "pad fills every expert up to its capacity: give a capacity_factor"),
            (self.pad and self.compress != "none",
             "pad sends messages of one size and compress makes them smaller: choose one"),
            (self.message_dtype == "float8" and self.hidden % 128,
             f"float8 messages have a scale per 128 numbers: hidden is a multiple of 128; given: {self.hidden}"),
        ):  # fmt: skip
            if wrong:
                raise ValueError(sentence)

    @property
    def degrees(self) -> tuple[int, int]:
        """Pieces of the exchange, forward and backward."""
        return self.num_chunks, self.num_chunks_backward or self.num_chunks

    def change(self, **changes: Any) -> Setting:
        """This setting with these changes; None leaves a knob as it is. ValueError for a name or value that cannot be.

        >>> Setting().change(num_chunks=2).degrees
        (2, 2)
        """
        return changed(self, changes)

    def layer(self, **placed: Any) -> ExpertParallel:
        """The layer that this describes; ``placed`` are other keywords of :func:`effkit.models.expert_parallel`."""
        import torch

        knobs = {name: value for name, value in self.plain().items() if name not in _OF_THE_LOAD}
        return expert_parallel(**knobs | {"dtype": getattr(torch, self.dtype)}, **placed)

    def plain(self) -> dict[str, Any]:
        """A dictionary of plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> Setting:
        """The setting of such a dictionary."""
        return cls().change(**plain)
