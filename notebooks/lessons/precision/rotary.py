"""Rotary positions under rounding, and attention that stays within packed documents with one token that all may see."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from effkit import Account
from effkit.timing import interleaved_ns

WAYS = ("float64", "float32", "bfloat16 rotation", "bfloat16 positions too")


def rotated(x: Tensor, positions: Tensor) -> Tensor:
    """Rotate each pair of channels by its position times its frequency (arXiv 2104.09864), of base 10,000.

    Everything is computed in the dtype of ``positions``; channel i goes with channel i + channels / 2, as in Llama.

    Parameters
    ----------
    x
        Shape (..., tokens, channels), an even number of channels.
    positions
        Shape (tokens,), floating point.

    Returns
    -------
    Tensor
        Shape of x, dtype of positions.

    Raises
    ------
    ValueError
        When the number of channels is odd.
    """
    channels = x.shape[-1]
    if channels % 2:
        raise ValueError(f"x has {channels} channels, expected an even number: they are rotated in pairs")
    dtype = positions.dtype
    frequencies = (10_000 ** -(torch.arange(0, channels, 2, dtype=torch.float64) / channels)).to(dtype)
    angles = positions[:, None] * frequencies
    return _turned(x.to(dtype), angles.cos(), angles.sin())


def shift_errors(shifts: Sequence[int], *, num_tokens: int = 64, channels: int = 64, seed: int = 0) -> pd.DataFrame:
    """How far attention logits move when all positions move together: not at all, in exact arithmetic.

    Queries and keys are random, representable in bfloat16; products of rotated vectors are taken in float64, so that
    only the rotation is at fault. AnchorAttention (arXiv 2411.13476) reports that in trained models the error grows
    with the context, and that the first token has a large part in it: random vectors cannot show either.

    Parameters
    ----------
    shifts
        What is added to the positions 0 to num_tokens - 1.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``shift``; a column per way to rotate (``WAYS``) and ``to a fixed anchor``: in float64, with the key
        at a position that does not move. Root mean square change of the logits over that of the logits.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, num_tokens, channels, generator=generator).bfloat16().double()
    start = torch.arange(num_tokens)

    def logits(shift: int, way: str) -> Tensor:
        a, b = (_in_way(x, start + shift, way) for x in (q, k))
        return a.double() @ b.double().T

    def to_anchor(shift: int) -> Tensor:
        return rotated(q, (start + shift).double()) @ rotated(k[:1], torch.zeros(1, dtype=torch.float64)).T

    rows = {}
    for shift in shifts:
        rows[shift] = [_change(logits(shift, way), logits(0, way)) for way in WAYS]
        rows[shift].append(_change(to_anchor(shift), to_anchor(0)))
    return pd.DataFrame.from_dict(rows, orient="index", columns=[*WAYS, "to a fixed anchor"]).rename_axis("shift")


def _in_way(x: Tensor, positions: Tensor, way: str) -> Tensor:
    if way != "bfloat16 rotation":
        dtype = {"float64": torch.float64, "float32": torch.float32}.get(way, torch.bfloat16)
        return rotated(x, positions.to(dtype))
    ones, zeros = torch.ones_like(x), torch.zeros_like(x)
    # angles in float32, as transformers has them: cosine and sine are what comes out of a rotation of (1, 0)
    half = x.shape[-1] // 2
    turned = rotated(torch.cat([ones[:, :half], zeros[:, half:]], -1), positions.float()).bfloat16()
    return _turned(x.bfloat16(), turned[:, :half], turned[:, half:])


def _turned(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


def _change(moved: Tensor, before: Tensor) -> float:
    return float((moved - before).square().mean().sqrt() / before.square().mean().sqrt())


def document_lengths(num_tokens: int, *, median: float = 150.0, spread: float = 1.0, seed: int = 0) -> list[int]:
    """Log-normal document lengths [tokens] that fill a context; the last document is cut to fit.

    Raises
    ------
    ValueError
        When a number is not positive.
    """
    if num_tokens < 1 or median <= 0 or spread <= 0:
        raise ValueError(f"num_tokens {num_tokens}, median {median}, spread {spread}: expected all above 0")
    generator = torch.Generator().manual_seed(seed)
    lengths: list[int] = []
    while (left := num_tokens - sum(lengths)) > 0:
        drawn = median * float(torch.exp(spread * torch.randn((), generator=generator)))
        lengths.append(min(max(1, round(drawn)), left))
    return lengths


def attended_pairs(lengths: Sequence[int], *, within: bool = True, anchor: bool = False) -> int:
    """Pairs of query and key that causal attention computes over packed documents.

    Parameters
    ----------
    within
        Documents do not see each other; otherwise the row is one text.
    anchor
        Every document sees the first token of the row as well (AnchorAttention, arXiv 2411.13476).
    """
    if not within:
        return attended_pairs([sum(lengths)])
    to_anchor = sum(lengths[1:]) if anchor else 0
    return sum(n * (n + 1) // 2 for n in lengths) + to_anchor


def step_flops(*, layers: int, hidden: int, ffn: int, vocabulary: int, num_tokens: int, num_pairs: int) -> Account:
    """FLOPs of a training step over one row of tokens of a Llama: products, forward and twice that backward.

    Parameters
    ----------
    num_pairs
        What :func:`attended_pairs` says; each costs 4 x hidden in a layer (its score, and its share of the output).
    """
    rows = {
        "weights of the blocks": 3 * 2 * num_tokens * layers * (4 * hidden**2 + 3 * hidden * ffn),
        "attention": 3 * 4 * num_pairs * layers * hidden,
        "output layer": 3 * 2 * num_tokens * hidden * vocabulary,
    }
    return Account.of(
        "Work of a training step", "FLOPs", rows, total=sum(rows.values()), source="these rows", basis="derived"
    )


def full_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over the whole row; shapes (batch, heads, tokens, channels)."""
    return scaled_dot_product_attention(q, k, v, is_causal=True)


def anchored_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Causal attention within each document of a row, and to the row's first token, which all may see.

    The anchor is put before each document and what comes out for it there is dropped, so that a causal kernel, which
    skips the blocks above the diagonal, does all the work.

    Parameters
    ----------
    q, k, v
        Shape (batch, heads, tokens, channels); rotated, where rotary positions are used.
    lengths
        Tokens of the documents; the anchor is the first token of the first.

    Raises
    ------
    ValueError
        When the documents do not fill the row.
    """
    if sum(lengths) != q.shape[2]:
        raise ValueError(f"the documents have {sum(lengths)} tokens and the row {q.shape[2]}; expected as many")
    first, *rest = (tensor.split(list(lengths), dim=2) for tensor in (q, k, v))
    outputs = [full_attention(first[0], rest[0][0], rest[1][0])]
    for document in zip(first[1:], rest[0][1:], rest[1][1:], strict=True):
        led = (torch.cat([row[:, :, :1], part], dim=2) for row, part in zip((q, k, v), document, strict=True))
        outputs.append(full_attention(*led)[:, :, 1:])
    return torch.cat(outputs, dim=2)


def attention_ns(lengths: Sequence[int], *, heads: int = 4, channels: int = 64, repeats: int = 3) -> dict[str, int]:
    """Time of ``full`` and of ``anchored`` attention over these documents, forward and backward, by the clock [ns]."""
    q, k, v = (torch.randn(1, heads, sum(lengths), channels, requires_grad=True) for _ in range(3))
    calls = {
        "full": lambda: full_attention(q, k, v).sum().backward(),
        "anchored": lambda: anchored_attention(q, k, v, lengths).sum().backward(),
    }
    return interleaved_ns(calls, repeats, min)
