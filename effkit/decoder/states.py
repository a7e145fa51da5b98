"""What a step of decoding costs as the context grows, with attention heads and with heads of constant-size state."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch

from effkit import models
from effkit.models.parallel_heads import cache_bytes
from effkit.side_by_side import interleaved_ns


def hybrid_cache_bytes(
    layers: int, heads: int, state_heads: int, head_dim: int, batch: int, length: int, value_bytes: int = 4
) -> int:
    """Keys, values and states of a :class:`effkit.models.parallel_heads.Hybrid` after ``length`` tokens [bytes].

    Per layer and sequence an attention head keeps 2 x length x head_dim values and a state head head_dim², whatever
    the length: the two are equal at a length of head_dim / 2 tokens, and from there on a state is the smaller. (Keys
    and values that several heads share, as in Falcon-H1, move that point up.)

    Parameters
    ----------
    heads, state_heads
        Of each layer; ``state_heads`` of the ``heads`` have a state instead of keys and values.
    batch, length
        Sequences, and tokens of each.
    value_bytes
        4 for float32, 2 for bfloat16.

    Raises
    ------
    ValueError
        When state_heads is not from 0 to heads.

    Examples
    --------
    >>> [hybrid_cache_bytes(4, 4, n, 32, batch=1, length=1024) for n in (0, 2, 4)]
    [4194304, 2129920, 65536]
    """
    if not 0 <= state_heads <= heads:
        raise ValueError(f"state_heads is from 0 to heads ({heads}); given: {state_heads}")
    values = (heads - state_heads) * 2 * length * head_dim + state_heads * head_dim**2
    return layers * batch * values * value_bytes


def contexts(
    lengths: Sequence[int] = (64, 256, 1024),
    state_heads: Sequence[int] = (0, 2, 4),
    *,
    batch: int = 1,
    repeats: int = 15,
    seed: int = 0,
    **model: Any,
) -> pd.DataFrame:
    """Time of one decoding step and bytes of the cache at each context length, by how many heads have a state.

    The caches are filled with random keys, values and states: nothing is generated to get there, and the time of a
    step does not depend on what they hold. Keys and values are concatenated at each step, as transformers'
    ``DynamicCache`` does it, so a step reads and writes the whole cache once more than attention needs.

    Parameters
    ----------
    lengths
        Tokens in the cache before the step.
    state_heads
        Heads of each layer that have a state.
    batch
        Sequences that are decoded together.
    repeats
        Steps of each, run in turn; a step takes about a millisecond.
    **model
        Of :func:`effkit.models.hybrid`: ``layers``, ``hidden``, ``heads`` and others.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``state_heads`` and ``length``. ``token_ns``: median time of a step, a token for each sequence;
        ``cache_bytes``: of the cache before the step.

    Raises
    ------
    ValueError
        When lengths are below 0, repeats or batch below 1, or state_heads above heads.
    """
    if min(lengths, default=0) < 0:
        raise ValueError(f"lengths are at least 0; given: {min(lengths)}")
    steps: dict[tuple[int, int], Callable[[], object]] = {}
    rows: dict[tuple[int, int], dict[str, int]] = {}
    with torch.random.fork_rng():
        for num in state_heads:
            decoder = models.hybrid(state_heads=num, seed=seed, **model).eval()
            token = torch.zeros(batch, dtype=torch.long, device=decoder.head.weight.device)
            for length in lengths:
                cache = decoder.random_cache(batch, length, seed)
                rows[num, length] = {"token_ns": 0, "cache_bytes": cache_bytes(cache)}
                steps[num, length] = lambda step=decoder.step, token=token, cache=cache: step(token, cache)  # type: ignore[misc]
        for key, median in interleaved_ns(steps, repeats).items():
            rows[key]["token_ns"] = median
    index = pd.MultiIndex.from_tuples(list(rows), names=["state_heads", "length"])
    return pd.DataFrame(list(rows.values()), index=index, dtype="int64")
