"""Length lists rebuilt from published bucket tables, where the data were not published; and FLOPs of plans."""

from __future__ import annotations

import numpy as np
import pandas as pd

from effkit import Account
from effkit.padding import Plan


def lengths_from_buckets(profile: pd.DataFrame, num_examples: int, *, seed: int = 0) -> pd.DataFrame:
    """A list of lengths that would give these buckets.

    Bucket edges are placed so that each input bucket holds the same summed length (the rule by which Lhotse and NeMo
    estimate them). So a bucket between ``lo`` and ``hi`` holds examples in proportion to ``1 / mean length``; inside,
    inputs are uniform. Output buckets inside an input bucket follow the same rule: the published table says no more.

    Parameters
    ----------
    profile
        One row per bucket: upper edges ``input_length`` and ``output_length`` [cells]; rows of one input edge are its
        output buckets.
    num_examples
        How many to draw.
    seed
        Of the draw.

    Returns
    -------
    DataFrame
        Integer ``input_length`` and ``output_length`` [cells].
    """
    missing = {"input_length", "output_length"} - set(profile.columns)
    if missing:
        raise ValueError(f"a bucket profile has the columns input_length and output_length; missing: {sorted(missing)}")
    rng = np.random.default_rng(seed)
    edges = np.unique(profile["input_length"].to_numpy())
    lower = np.concatenate([[0], edges[:-1]])
    weight = 2 / (lower + edges)
    bucket = rng.choice(len(edges), size=num_examples, p=weight / weight.sum())
    inputs = lower[bucket] + rng.random(num_examples) * (edges - lower)[bucket]
    outputs = np.empty(num_examples)
    for i, edge in enumerate(edges):
        members = np.flatnonzero(bucket == i)
        second = np.sort(profile.loc[profile["input_length"] == edge, "output_length"].to_numpy())
        floor = np.concatenate([[0], second[:-1]])
        share = 2 / (floor + second)
        column = rng.choice(len(second), size=len(members), p=share / share.sum())
        outputs[members] = floor[column] + rng.random(len(members)) * (second - floor)[column]
    return pd.DataFrame(
        {"input_length": np.maximum(1, np.ceil(inputs)), "output_length": np.maximum(1, np.ceil(outputs))}
    ).astype("int64")


def forward_flops(
    plan: Plan, *, hidden: int = 1024, encoder_layers: int = 24, decoder_layers: int = 24, subsampling: int = 8
) -> Account:
    """FLOPs of an encoder-decoder transformer's forward pass over one epoch of a plan: rows ``real`` and ``padding``.

    Per layer and example 24·h²·T + 4·h·T² (Narayanan et al. 2021, arXiv 2104.04473, section 5.1, forward pass without
    recomputation: 24·B·s·h² + 4·B·s²·h); a decoder layer adds cross-attention 4·h²·(U + T) + 4·h·U·T. ``T`` is the
    input length after ``subsampling``. The defaults are Canary-1B's 24 + 24 layers of width 1024 with 8x subsampling
    (arXiv 2503.05931, section 3); embeddings and output layer are left out. A packed row is computed as one long
    example, which is what a dense mask does.
    """

    def flops(shapes: pd.DataFrame) -> int:
        t, u, h = np.asarray(shapes["input_length"]) / subsampling, np.asarray(shapes.get("output_length", 0)), hidden
        encoder = encoder_layers * (24 * h * h * t + 4 * h * t * t)
        decoder = decoder_layers * (24 * h * h * u + 4 * h * u * u + 4 * h * h * (u + t) + 4 * h * u * t)
        return round(float((shapes.get("num_rows", 1) * (encoder + np.where(u > 0, decoder, 0))).sum()))

    real, total = flops(plan.lengths), flops(plan.frame)
    return Account.of(
        "Forward FLOPs of one epoch", "FLOPs", {"real": real, "padding": total - real}, total=total,
        source="the shapes of the batches", basis="derived", setting={"strategy": plan.strategy, **plan.limits},
    )  # fmt: skip
