"""Attention among the tokens of an image whose keys and values are condensed, R x R neighbours into one.

After the key-value compression of PixArt-Sigma (arXiv 2403.04692, Section 3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from effkit.timing import interleaved_ns
from lessons.saved_for_backward import saved_bytes

PUBLISHED_SAVED_FRAC = 0.34  # PixArt-Sigma (arXiv 2403.04692), at 4K, second-hand: "about 34%" of time, not of FLOPs


class CondensedAttention(nn.Module):
    """Self-attention over a square grid of tokens; keys and values are condensed, queries are not.

    One depthwise convolution with stride R, the same for keys and values, begins as their mean (weights 1/R², bias 0)
    and learns from there. The authors' code has a LayerNorm behind it, which is left out here, so that weights trained
    without condensing start from averages::

        condensed = CondensedAttention(hidden, heads, ratio=2)
        condensed.load_state_dict(plain.state_dict(), strict=False)

    Parameters
    ----------
    hidden, heads
        Width of a token and how many heads share it.
    ratio
        R: R² tokens become one key and one value. 1 is plain attention, and has no convolution.

    Raises
    ------
    ValueError
        When heads do not divide hidden or ratio is below 1; from ``forward``, when N is no square or R does not divide
        its side.

    Examples
    --------
    >>> attention = CondensedAttention(64, 4, ratio=2)
    >>> attention(torch.ones(1, 256, 64)).shape, attention.keys_values(torch.ones(1, 256, 64))[0].shape
    (torch.Size([1, 256, 64]), torch.Size([1, 4, 64, 16]))
    """

    def __init__(self, hidden: int, heads: int, ratio: int = 1) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"hidden is a multiple of heads; given: {hidden} and {heads}")
        if ratio < 1:
            raise ValueError(f"ratio is at least 1; given: {ratio}")
        self.heads, self.ratio = heads, ratio
        self.query, self.key, self.value, self.out = (nn.Linear(hidden, hidden) for _ in range(4))
        self.condense = nn.Conv2d(hidden, hidden, ratio, stride=ratio, groups=hidden) if ratio > 1 else None
        if self.condense is not None and self.condense.bias is not None:
            nn.init.constant_(self.condense.weight, 1 / ratio**2)
            nn.init.zeros_(self.condense.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens`` [B, N, hidden], row by row of the grid, to the same shape."""
        keys, values = self.keys_values(tokens)
        mixed = functional.scaled_dot_product_attention(self._split(self.query(tokens)), keys, values)
        return self.out(mixed.transpose(1, 2).flatten(2))

    def keys_values(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What the queries see of ``tokens`` [B, N, hidden]: keys and values [B, heads, N / R², hidden / heads]."""
        side = _side(tokens.shape[1], self.ratio)
        keys, values = (self._condensed(of(tokens), side) for of in (self.key, self.value))
        return self._split(keys), self._split(values)

    def _condensed(self, x: torch.Tensor, side: int) -> torch.Tensor:
        if self.condense is None:
            return x
        image = x.transpose(1, 2).unflatten(2, (side, side))
        condensed: torch.Tensor = self.condense(image).flatten(2).transpose(1, 2)
        return condensed.contiguous()  # else no fused attention takes it, and all scores are kept

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


def attention_flops(num_tokens: int, hidden: int, ratio: int = 1, batch: int = 1) -> int:
    """FLOPs of the forward of :class:`CondensedAttention`, a multiplication with its addition counted as two.

    Four projections, 8 N H²; two convolutions, each of whose inputs is used once, 4 N H (none for R = 1); scores and
    their sum of values, 4 N (N / R²) H. Softmax and biases are left out. A backward takes about twice as many.

    >>> round(attention_flops(4096, 128, 2) / attention_flops(4096, 128), 3)
    0.294
    """
    convolutions = 4 * num_tokens * hidden if ratio > 1 else 0
    return batch * (8 * num_tokens * hidden**2 + convolutions + 4 * num_tokens * (num_tokens // ratio**2) * hidden)


def condensed(
    num_tokens: Sequence[int] = (256, 1024, 4096),
    ratios: Sequence[int] = (1, 2, 4),
    *,
    hidden: int = 128,
    heads: int = 4,
    batch: int = 1,
    repeats: int = 3,
    device: str | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Time and memory of attention among ``num_tokens`` tokens of an image at each ratio of condensing.

    Attention is ``scaled_dot_product_attention``, which keeps no scores where it is fused. There condensing *adds* to
    what is saved: the convolution keeps the full keys and values for its own backward, beside the condensed ones that
    attention keeps. What it saves is time, and bytes of keys and values in a forward without gradients.

    Parameters
    ----------
    num_tokens
        N, each a square.
    ratios
        R, each a divisor of all grids' sides.
    hidden, heads, batch
        Of the attention and its input, in float32.
    repeats
        Steps of each, run in turn.
    device
        The GPU where there is one, when None.

    Returns
    -------
    pandas.DataFrame
        Indexed by ``num_tokens`` and ``ratio``. ``time_ns``: median of a forward and backward, with a gradient of the
        input; ``kv_bytes``: keys and values that queries see; ``saved_bytes``: storages that autograd keeps for
        backward, each once, without parameters and input; ``flops``: of a forward, by :func:`attention_flops`.

    Raises
    ------
    ValueError
        When a number of tokens is no square, a ratio does not divide its side, or repeats is below 1.
    """
    where = device or ("cuda" if torch.cuda.is_available() else "cpu")
    for num in num_tokens:
        for ratio in ratios:
            _side(num, ratio)
    steps: dict[tuple[int, int], Callable[[], object]] = {}
    rows: dict[tuple[int, int], dict[str, int]] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(seed)
        inputs = {num: torch.randn(batch, num, hidden, device=where, requires_grad=True) for num in num_tokens}
        attentions = {ratio: CondensedAttention(hidden, heads, ratio).to(where) for ratio in ratios}
        for num, x in inputs.items():
            for ratio, attention in attentions.items():
                rows[num, ratio] = {
                    "time_ns": 0,
                    "kv_bytes": sum(part.nbytes for part in attention.keys_values(x)),
                    "saved_bytes": saved_bytes(lambda a=attention, x=x: a(x), [x, *attention.parameters()]),  # type: ignore[misc]
                    "flops": attention_flops(num, hidden, ratio, batch),
                }
                steps[num, ratio] = lambda a=attention, x=x: torch.autograd.grad(a(x).sum(), [x, *a.parameters()])  # type: ignore[misc]
        for key, median in interleaved_ns(steps, repeats).items():
            rows[key]["time_ns"] = median
    index = pd.MultiIndex.from_tuples(list(rows), names=["num_tokens", "ratio"])
    return pd.DataFrame(list(rows.values()), index=index, dtype="int64")


def pixart_flops(
    num_tokens: int = 65_536,
    ratio: int = 2,
    num_layers: int = 28,
    num_compressed: int = 14,
    hidden: int = 1152,
    *,
    mlp_ratio: int = 4,
    num_text_tokens: int = 0,
) -> pd.DataFrame:
    """FLOPs of PixArt-Sigma's transformer (one image, one step), without and with compressed keys and values.

    A multiply-add is two. Per layer, with N tokens, width h and R = ``ratio``:

    * projections: 8 N h^2 (query, key, value, output); keys and values are compressed *after* their projection, which
      therefore saves nothing;
    * attention: 4 N M h, scores and values, with M = N keys, or N / R^2 in the compressed layers;
    * feed-forward: 4 N h^2 ``mlp_ratio``;
    * cross-attention, when T = ``num_text_tokens`` is not 0: 4 N h^2 + 4 T h^2 + 4 N T h;
    * compressing: 4 N h, a depthwise R x R convolution with stride R of keys and of values.

    At 65,536 tokens (4096 x 4096 pixels) with R = 2 in 14 of 28 layers that is 33.9% fewer, without cross-attention;
    33.3% fewer with that to 300 text tokens. If keys and values were compressed before their projection, 34.5% and
    33.8%.

    Parameters
    ----------
    num_tokens, ratio, num_layers, num_compressed, hidden, mlp_ratio, num_text_tokens
        N, R, layers, those of them that compress, h, feed-forward's width over h, T.

    Returns
    -------
    Indexed by ``item``, the last being ``total``: ``full_flops``, ``compressed_flops`` [FLOPs], and ``saved_frac``,
    what the item saves as a fraction of the full total. In ``attrs``: ``published``, ``recomputed``, ``error``
    (relative), ``source``.

    Raises
    ------
    ValueError
        When a layer cannot be compressed so.
    """
    if not 0 <= num_compressed <= num_layers:
        raise ValueError(f"num_compressed is {num_compressed}, expected 0 to {num_layers}, the layers there are.")
    if ratio < 1 or num_tokens % ratio**2:
        raise ValueError(f"num_tokens is {num_tokens:,}, expected a multiple of ratio squared; given: ratio {ratio}.")
    projected = 4 * num_tokens * hidden**2
    text = projected + 4 * num_text_tokens * hidden * (hidden + num_tokens) if num_text_tokens else 0
    scores, num_full = 4 * num_tokens * hidden, num_layers - num_compressed
    keys = num_full * num_tokens + num_compressed * num_tokens // ratio**2
    rows = {
        "projections": (num_layers * 2 * projected,) * 2,
        "attention": (num_layers * num_tokens * scores, keys * scores),
        "feed-forward": (num_layers * mlp_ratio * projected,) * 2,
        "cross-attention": (num_layers * text,) * 2,
        "compressing": (0, num_compressed * 4 * num_tokens * hidden if ratio > 1 else 0),
    }
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["full_flops", "compressed_flops"])
    table.loc["total"] = table.sum()
    table["saved_frac"] = (table["full_flops"] - table["compressed_flops"]) / table.loc["total", "full_flops"]
    recomputed = float(table.loc["total", "saved_frac"])
    table.attrs = {
        "published": PUBLISHED_SAVED_FRAC,
        "recomputed": recomputed,
        "error": recomputed / PUBLISHED_SAVED_FRAC - 1,
        "source": "PixArt-Sigma, arXiv 2403.04692, second-hand; shapes of PixArt-XL/2",
    }
    return table.rename_axis("item")


def _side(num_tokens: int, ratio: int) -> int:
    side = math.isqrt(num_tokens)
    if side * side != num_tokens:
        raise ValueError(f"the tokens make up a square grid; given: {num_tokens}, which is no square number")
    if ratio < 1 or side % ratio:
        raise ValueError(f"ratio divides the side of the grid ({side}); given: {ratio}")
    return side
