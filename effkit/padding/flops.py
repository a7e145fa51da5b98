"""FLOPs of a transformer's forward pass as a function of input and output length."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd


def transformer(
    input_length: Any, output_length: Any = 0, *, rows: Any = 1, hidden: int = 1024,
    encoder_layers: int = 24, decoder_layers: int = 24, subsampling: int = 8,
) -> Any:  # fmt: skip
    """Forward FLOPs of ``rows`` examples of an encoder-decoder transformer, all padded to the lengths given.

    Per layer and example 24·h²·T + 4·h·T² (Narayanan et al. 2021, arXiv 2104.04473, section 5.1, forward pass without
    recomputation: 24·B·s·h² + 4·B·s²·h); a decoder layer adds cross-attention 4·h²·(U + T) + 4·h·U·T. ``T`` is the
    input length after ``subsampling``. The defaults are Canary-1B's 24 + 24 layers of width 1024 with 8x subsampling
    (arXiv 2503.05931, section 3); embeddings and output layer are left out.
    """
    t, u, h = np.asarray(input_length) / subsampling, np.asarray(output_length), hidden
    encoder = encoder_layers * (24 * h * h * t + 4 * h * t * t)
    decoder = decoder_layers * (24 * h * h * u + 4 * h * u * u + 4 * h * h * (u + t) + 4 * h * u * t)
    return rows * (encoder + np.where(u > 0, decoder, 0))


def of_batches(lengths: pd.DataFrame, frame: pd.DataFrame, **model: int) -> tuple[int, int]:
    """FLOPs of the real cells and of all cells of one epoch: of examples, and of the batches of a plan.

    A packed row is computed as one long example, which is what a dense mask does.
    """
    real = transformer(lengths["input_length"], lengths.get("output_length", 0), **model)
    padded = transformer(frame["input_length"], frame.get("output_length", 0), rows=frame["num_rows"], **model)
    return round(float(real.sum())), round(float(padded.sum()))
