"""Published figures of unbalanced decoders and of compressed attention, recounted: Canary, PixArt-Sigma."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pandas as pd

# Canary (arXiv 2503.05931): encoder and decoder layers, and RTFx (seconds of audio per second) on Open ASR sets, A100.
# canary-1b is 24/24, canary-1b-flash 32/4; 32/8 is of the same width
RTFX: Mapping[tuple[int, int], float] = {(32, 4): 1046.0, (32, 8): 749.0}
BALANCED = (24, 24)
OTHER_WIDTH = (17, 4)  # canary-180m-flash
PUBLISHED_SPEED_UP = 3.0  # abstract: "3x inference speedup as measured by inverse real-time factor (RTFx)"

PUBLISHED_SAVED_FRAC = 0.34  # PixArt-Sigma (arXiv 2403.04692), at 4K, second-hand: "about 34%" of time, not of FLOPs


def layer_times(rtfx: Mapping[tuple[int, int], float] = RTFX) -> tuple[float, float]:
    """Time of one encoder and of one decoder layer [s per second of audio], solved from two splits.

    1 / RTFx = L_e e + L_d d: the layers and nothing else (no output layer, no features, no start).

    Parameters
    ----------
    rtfx
        (encoder layers, decoder layers) -> RTFx, of two splits of one width.

    Raises
    ------
    ValueError
        When there are not two splits, or one is a multiple of the other.
    """
    if len(rtfx) != 2:
        raise ValueError(f"rtfx has {len(rtfx)} splits, expected two: two times are solved from two measurements.")
    ((a, b), first), ((c, d), second) = rtfx.items()
    determinant = a * d - b * c
    if not determinant:
        raise ValueError(f"rtfx has the splits {a}/{b} and {c}/{d}, expected two of different proportion; add another.")
    return (d / first - b / second) / determinant, (a / second - c / first) / determinant


def canary(rtfx: Mapping[tuple[int, int], float] = RTFX) -> pd.DataFrame:
    """Canary's layer splits: from the RTFx of 32/4 and 32/8, that of 24/24, so the gain of moving layers.

    By :func:`layer_times` a decoder layer takes as long as 5.3 encoder layers. At 24/24 the decoder then has 84% of
    the time, RTFx is 369, and 24/24 -> 32/4 gains 2.83x, 6% less than the 3x of the abstract. Whether its 3x is
    rounded, or the layers are not all, the two figures do not tell.

    Returns
    -------
    Indexed by ``split``: ``encoder_layers``, ``decoder_layers``, ``rtfx``, ``decoder_frac`` (share of the decoder in
    the time), ``speed_up`` over 24/24, ``published`` (the speed-up) and ``error`` (relative), ``basis`` of ``rtfx``.
    17/4 is of another width (182M parameters), which the line does not reach: NaN, not a guess; its card says more
    than 1200. In ``attrs``: ``layer_ratio``, a decoder layer's time over an encoder layer's, and ``source``.
    """
    encoder_s, decoder_s = layer_times(rtfx)
    splits = [BALANCED, *sorted(rtfx, key=lambda split: -split[1])]
    table = pd.DataFrame(splits, columns=["encoder_layers", "decoder_layers"])
    time_s = table["encoder_layers"] * encoder_s + table["decoder_layers"] * decoder_s
    table["rtfx"] = 1 / time_s
    table["decoder_frac"] = table["decoder_layers"] * decoder_s / time_s
    table["speed_up"] = time_s[0] / time_s
    table["published"] = [PUBLISHED_SPEED_UP if split == (32, 4) else math.nan for split in splits]
    table["error"] = table["speed_up"] / table["published"] - 1
    table["basis"] = ["published" if split in rtfx else "derived" for split in splits]
    table.loc[len(table)] = [*OTHER_WIDTH, *[math.nan] * 5, "not visible"]
    table = table.astype({"encoder_layers": int, "decoder_layers": int})
    table.index = pd.Index([f"{e}/{d}" for e, d in [*splits, OTHER_WIDTH]], name="split")
    table.attrs = {"layer_ratio": decoder_s / encoder_s, "source": "Canary, arXiv 2503.05931, and its model cards"}
    return table


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
