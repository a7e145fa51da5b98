"""MegaScale (arXiv 2402.15627): its table of model FLOPs utilisation, from its own iteration times, and its bubble."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from effkit import Account

# Section 6.1: the 175B model. The peak is an A100's dense rate in 16 bits.
LAYERS, HIDDEN, VOCABULARY, SEQUENCE = 96, 12_288, 64_000, 2_048
PEAK_FLOPS_PER_S = 312e12
# Table 2, strong scaling: (system, GPUs) -> batch, seconds per iteration, thousand tokens/s, MFU, aggregate PFLOP/s
TABLE2: Mapping[tuple[str, int], tuple[int, float, float, float, float]] = {
    ("Megatron-LM", 256): (768, 40.0, 39.3, 0.530, 43.3),
    ("Megatron-LM", 512): (768, 21.2, 74.1, 0.499, 77.6),
    ("Megatron-LM", 768): (768, 15.2, 103.8, 0.467, 111.9),
    ("Megatron-LM", 1024): (768, 11.9, 132.7, 0.447, 131.9),
    ("Megatron-LM", 3072): (6144, 29.02, 433.6, 0.487, 466.8),
    ("Megatron-LM", 6144): (6144, 14.78, 851.6, 0.478, 916.3),
    ("Megatron-LM", 8192): (6144, 12.24, 1027.9, 0.433, 1106.7),
    ("Megatron-LM", 12288): (6144, 8.57, 1466.8, 0.412, 1579.5),
    ("MegaScale", 256): (768, 32.0, 49.0, 0.653, 52.2),
    ("MegaScale", 512): (768, 16.5, 95.1, 0.635, 101.4),
    ("MegaScale", 768): (768, 11.5, 136.7, 0.613, 146.9),
    ("MegaScale", 1024): (768, 8.9, 176.9, 0.590, 188.5),
    ("MegaScale", 3072): (6144, 23.66, 531.9, 0.591, 566.5),
    ("MegaScale", 6144): (6144, 12.21, 1030.9, 0.573, 1098.4),
    ("MegaScale", 8192): (6144, 9.56, 1315.6, 0.549, 1400.6),
    ("MegaScale", 12288): (6144, 6.34, 1984.0, 0.552, 2166.3),
}
PUBLISHED_BUBBLE_SAVED_FRAC = 0.875  # section 3.1, by a batch that LAMB makes four times as large
# Rows of one system rest on one count of FLOPs per token; a row that is further off than this contradicts the others.
_CONSISTENT_FRAC = 0.005


def flops_per_token(attention: str = "full") -> Account:
    """Training FLOPs of one token of the 175B model, forward and backward, nothing recomputed.

    6 (12 L h² + V h) for the products with weights (Megatron-LM's count, arXiv 2104.04473, section 5.1, without its
    recomputation), and for attention 12 L h s, of which a causal mask leaves half.

    Parameters
    ----------
    attention
        ``"full"``: scores of all pairs count; ``"causal"``: those of a token with the tokens before it.

    Raises
    ------
    ValueError
        For another word.
    """
    if attention not in ("full", "causal"):
        raise ValueError(f"attention is {attention!r}, expected 'full' or 'causal'")
    pairs = 12 * LAYERS * HIDDEN * SEQUENCE // (1 if attention == "full" else 2)
    rows = {"layers": 72 * LAYERS * HIDDEN**2, "attention scores": pairs, "output layer": 6 * VOCABULARY * HIDDEN}
    return Account.of(
        "Training FLOPs of one token",
        "FLOPs",
        rows,
        total=6 * (12 * LAYERS * HIDDEN**2 + VOCABULARY * HIDDEN) + pairs,
        source=f"6 x weights + {attention} attention",
        basis="derived",
    )


def megascale() -> pd.DataFrame:
    """MFU of every row of Table 2 from its throughput, by both counts of FLOPs.

    Returns
    -------
    DataFrame
        Indexed by ``system`` and ``num_gpus``: ``tokens_per_s`` from batch and iteration time;
        ``published_tokens_per_s``, with more digits, from which the MFU is computed; ``mfu_full_frac`` and
        ``mfu_causal_frac``; ``published_mfu_frac``; ``rate_mfu_frac``, the MFU that the row's own aggregate FLOP/s
        amount to; ``consistent``: the row's MFU implies as many FLOPs per token as its system's others; ``fits``, the
        count that comes nearer in the system's median row; ``mfu_frac`` by that count; ``gap_frac``, recomputed minus
        published.
    """
    full, causal = (flops_per_token(how).total for how in ("full", "causal"))
    rows = []
    for (system, num_gpus), (batch, seconds, thousands, mfu, petaflops) in TABLE2.items():
        peak = num_gpus * PEAK_FLOPS_PER_S
        rows.append({
            "system": system, "num_gpus": num_gpus, "tokens_per_s": batch * SEQUENCE / seconds,
            "published_tokens_per_s": 1e3 * thousands, "mfu_full_frac": 1e3 * thousands * full / peak,
            "mfu_causal_frac": 1e3 * thousands * causal / peak, "published_mfu_frac": mfu,
            "implied_flops": mfu * peak / (1e3 * thousands), "rate_mfu_frac": petaflops * 1e15 / peak,
        })  # fmt: skip
    table = pd.DataFrame(rows).set_index(["system", "num_gpus"])
    typical = table.groupby("system")["implied_flops"].transform("median")
    table["consistent"] = (table["implied_flops"] / typical - 1).abs() < _CONSISTENT_FRAC
    as_full = (typical - full).abs() < (typical - causal).abs()
    table["fits"] = as_full.map({True: "full", False: "causal"})
    table["mfu_frac"] = table["mfu_full_frac"].where(as_full, table["mfu_causal_frac"])
    table["gap_frac"] = table["mfu_frac"] - table["published_mfu_frac"]
    return table.drop(columns="implied_flops")


def bubbles(batch_factor: int = 4) -> Account:
    """What of the pipeline's idle time a larger batch leaves, per sequence [ppm of what it was].

    An interleaved pipeline idles for (p - 1) / v micro-batches a step (Narayanan et al., arXiv 2104.04473, section
    2.2), however many micro-batches the step has: b times the batch is b times fewer steps, and 1 / b of the idle time.
    Four times the batch saves 75%; 87.5%, as published, would take eight times.

    Raises
    ------
    ValueError
        When the factor is less than 1.
    """
    if batch_factor < 1:
        raise ValueError(f"batch_factor is {batch_factor}, expected at least 1")
    left = round(1e6 / batch_factor)
    return Account.of(
        "Idle time of a pipeline",
        "ppm",
        {"left": left, "saved": 1_000_000 - left},
        total=1_000_000,
        source=f"(p - 1) / v micro-batches a step, {batch_factor} times fewer steps",
        basis="derived",
    )
