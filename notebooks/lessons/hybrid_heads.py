"""A language model with attention heads and heads of constant-size state; what its decoding costs as contexts grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from effkit.models.building import check_counts, check_heads, random_tokens, ready
from effkit.timing import interleaved_ns
from lessons.small_models import Output

_CHUNK = 64  # positions that the parallel form multiplies at once
_KEPT = 3.0  # bias of the gates: a fresh state keeps sigmoid(3) = 95% of itself at each token


class Past(NamedTuple):
    """What one layer knows of the tokens before.

    ``keys`` and ``values`` [B, attention heads, T, head_dim]; ``state`` [B, state heads, head_dim, head_dim].
    """

    keys: torch.Tensor
    values: torch.Tensor
    state: torch.Tensor


Cache = tuple[Past, ...]


class Mixer(nn.Module):
    """Attention heads and state heads side by side, in one projection; the first ``state_heads`` have a state.

    An attention head sees all keys and values up to its own. A state head keeps a matrix S, of one size at any length,
    with a gate a in (0, 1) that each token sets::

        S[t] = a[t] * S[t-1] + k[t]^T v[t],    y[t] = q[t] S[t] / sqrt(head_dim)
    """

    def __init__(self, hidden: int, heads: int, state_heads: int) -> None:
        super().__init__()
        self.heads, self.state_heads = heads, state_heads
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.gate = nn.Linear(hidden, state_heads) if state_heads else None
        if self.gate is not None:
            nn.init.constant_(self.gate.bias, _KEPT)
        self.out = nn.Linear(hidden, hidden, bias=False)

    def forward(self, x: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        """``x`` [B, T, hidden] and what was before it, to an output of the same shape and what is known after."""
        batch, length, _ = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        keys, values, state = past
        mixed = []
        if self.gate is not None:
            n = self.state_heads
            log_gate = functional.logsigmoid(self.gate(x).float()).transpose(1, 2)
            y, state = _recurrence(q[:, :n], k[:, :n], v[:, :n], log_gate, state)
            mixed.append(y)
        if self.state_heads < self.heads:
            q, k, v = (heads[:, self.state_heads :] for heads in (q, k, v))
            before = keys.shape[2]
            if before:
                k, v = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
            keys, values = k, v
            # is_causal aligns the first query with the first key, which is wrong where there are keys before it
            mask = x.new_ones(length, before + length, dtype=torch.bool).tril(before) if before and length > 1 else None
            mixed.append(functional.scaled_dot_product_attention(q, k, v, mask, is_causal=not before and length > 1))
        together = torch.cat(mixed, dim=1).transpose(1, 2).reshape(batch, length, -1)
        return self.out(together), Past(keys, values, state)


def _recurrence(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gate: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, heads, T, d] of a state head and its state after them, a chunk of positions at a time.

    With L[i] the sum of log gates from the chunk's first position to i, position i weighs j <= i by exp(L[i] - L[j]),
    and the state from before the chunk by exp(L[i]).
    """
    q = q / q.shape[-1] ** 0.5
    if q.shape[2] == 1:  # a step of decoding
        state = log_gate.exp().to(state)[..., None] * state + k.transpose(2, 3) * v
        return q @ state, state
    found = []
    pieces = (part.split(_CHUNK, dim=2) for part in (q, k, v, log_gate))
    for queries, keys, values, gates in zip(*pieces, strict=True):
        total = gates.cumsum(dim=2)
        later = torch.ones(total.shape[2], total.shape[2], dtype=torch.bool, device=q.device).triu(1)
        weights = (total[..., :, None] - total[..., None, :]).masked_fill(later, -torch.inf).exp().to(q)
        inside = (queries @ keys.transpose(2, 3) * weights) @ values
        found.append(inside + total.exp().to(q)[..., None] * (queries @ state))
        end = total[..., -1:]
        keys = keys * (end - total).exp().to(q)[..., None]
        state = end.exp().to(q)[..., None] * state + keys.transpose(2, 3) @ values
    return torch.cat(found, dim=2), state


class Block(nn.Module):
    """Norm and mixer, norm and MLP, each added to what comes in."""

    def __init__(self, hidden: int, heads: int, state_heads: int, ffn: int) -> None:
        super().__init__()
        self.norm, self.mixer = nn.RMSNorm(hidden), Mixer(hidden, heads, state_heads)
        self.mlp_norm = nn.RMSNorm(hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, ffn), nn.GELU(), nn.Linear(ffn, hidden))

    def forward(self, x: torch.Tensor, past: Past) -> tuple[torch.Tensor, Past]:
        """``x`` [B, T, hidden] and what was before it, to the same of the layer above."""
        mixed, past = self.mixer(self.norm(x), past)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), past


class Hybrid(nn.Module):
    """Attention and state heads in parallel in each layer, after Falcon-H1 (arXiv 2507.22448). Input cells are tokens.

    Simplified: Falcon-H1's state heads are Mamba-2's (convolution, discretised step, one q and k for several heads),
    its attention has grouped queries and rotary positions. Here a state head is a gated linear recurrence of the same
    size as an attention head, and order is told by causality and by the gates alone.
    """

    def __init__(self, layers: int, hidden: int, ffn: int, heads: int, state_heads: int, vocabulary: int) -> None:
        super().__init__()
        self.heads, self.state_heads, self.head_dim = heads, state_heads, hidden // heads
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.layers = nn.ModuleList(Block(hidden, heads, state_heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden)
        self.head = nn.Linear(hidden, vocabulary, bias=False)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> Output:
        """``input_ids`` and ``labels`` [B, T] to a mean cross-entropy of each next token and logits [B, T, V].

        All positions at once, which gives the logits of one step after the other. Without labels the loss is nan.
        """
        logits, _ = self.advance(input_ids, None)
        if labels is None:
            return Output(logits.new_tensor(torch.nan), logits)
        return Output(functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), logits)

    def advance(self, tokens: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """``tokens`` [B, T] after those in the cache (none for None) to logits [B, T, V] and a cache with them too."""
        if cache is None:
            cache = self._cache(tokens.shape[0], 0)
        x, after = self.embedding(tokens), []
        for layer, past in zip(self.layers, cache, strict=True):
            x, known = layer(x, past)
            after.append(known)
        return self.head(self.norm(x)), tuple(after)

    @torch.no_grad()
    def step(self, token: torch.Tensor, cache: Cache | None = None) -> tuple[torch.Tensor, Cache]:
        """One step of greedy decoding: ``token`` [B] to the likeliest next token [B] and a cache with ``token`` in it.

        Keys and values are concatenated, as transformers' DynamicCache does it, so the cache that was given stays good.
        A prompt is put into a cache by :meth:`advance`.
        """
        logits, cache = self.advance(token[:, None], cache)
        return logits[:, -1].argmax(dim=-1), cache

    def random_cache(self, batch_size: int, length: int, seed: int = 0) -> Cache:
        """The cache of ``length`` tokens that nobody computed: normal keys, values and states, for timing a step."""
        check_counts(batch_size=batch_size)
        generator = torch.Generator().manual_seed(seed)
        cache = self._cache(batch_size, length)
        for past in cache:
            for part in past:
                part.copy_(torch.randn(part.shape, generator=generator))
        return cache

    def _cache(self, batch_size: int, length: int) -> Cache:
        attention = self.heads - self.state_heads
        of_tokens = (batch_size, attention, length if attention else 0, self.head_dim)
        of_state = (batch_size, self.state_heads, self.head_dim, self.head_dim)
        zeros = self.head.weight.new_zeros
        return tuple(Past(zeros(of_tokens), zeros(of_tokens), zeros(of_state)) for _ in self.layers)

    def random_batch(self, batch_size: int, length: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """``input_ids`` and ``labels`` [B, T]; ``length`` is T [tokens]."""
        return random_tokens(self.embedding.num_embeddings, batch_size, length, seed, self.head.weight.device)


def cache_bytes(cache: Cache) -> int:
    """Keys, values and states of all layers [bytes]: of the tensors that are read, not of storages behind them."""
    return sum(part.nbytes for past in cache for part in past)


def build(
    *,
    layers: int = 4,
    hidden: int = 128,
    ffn: int | None = None,
    heads: int = 4,
    state_heads: int = 2,
    vocabulary: int = 1000,
    device: str | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Hybrid:
    """A hybrid language model from its configuration, in training mode, on the GPU where there is one.

    Parameters
    ----------
    layers, hidden, ffn, heads, vocabulary
        Its size; ``ffn`` is 4 x hidden unless given.
    state_heads
        How many of the heads of each layer keep a state instead of keys and values: 0 is plain attention, ``heads``
        has no cache that grows.
    """
    check_counts(layers=layers, hidden=hidden, heads=heads, vocabulary=vocabulary)
    check_heads(hidden, heads)
    if not 0 <= state_heads <= heads:
        raise ValueError(f"state_heads is from 0 to heads ({heads}); given: {state_heads}")
    torch.manual_seed(seed)
    model = Hybrid(layers, hidden, 4 * hidden if ffn is None else ffn, heads, state_heads, vocabulary)
    return ready(model, device, dtype)


def hybrid_cache_bytes(
    layers: int, heads: int, state_heads: int, head_dim: int, batch: int, length: int, value_bytes: int = 4
) -> int:
    """Keys, values and states of a :class:`Hybrid` after ``length`` tokens [bytes].

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
        Of :func:`build`: ``layers``, ``hidden``, ``heads`` and others.

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
            decoder = build(state_heads=num, seed=seed, **model).eval()
            token = torch.zeros(batch, dtype=torch.long, device=decoder.head.weight.device)
            for length in lengths:
                cache = decoder.random_cache(batch, length, seed)
                rows[num, length] = {"token_ns": 0, "cache_bytes": cache_bytes(cache)}
                steps[num, length] = lambda step=decoder.step, token=token, cache=cache: step(token, cache)  # type: ignore[misc]
        for key, median in interleaved_ns(steps, repeats).items():
            rows[key]["token_ns"] = median
    index = pd.MultiIndex.from_tuples(list(rows), names=["state_heads", "length"])
    return pd.DataFrame(list(rows.values()), index=index, dtype="int64")
