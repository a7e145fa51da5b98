"""Activations of one transformer layer by Korthikanti et al. (arXiv 2205.05198), beside a replay of GPT-2."""

from __future__ import annotations

import pandas as pd

from effkit import models
from effkit.activations.fake_step import Replayer
from effkit.activations.levers import Levers
from lessons.recounted import beside

_MIB = 2**20
_STATISTIC_BYTES = 4  # mean and reciprocal deviation of a LayerNorm, log-sum-exp of attention: float32


def korthikanti_bytes(batch: int, sequence: int, hidden: int, heads: int) -> int:
    """Activations of one transformer layer [bytes]: s b h (34 + 5 a s / h).

    Korthikanti et al. (arXiv 2205.05198), equation (1): 16-bit values, dropout with masks of 1 byte, stored scores, a
    GELU that keeps its input alone.

    >>> korthikanti_bytes(1, 2048, 12288, 96)
    2868903936
    """
    return 34 * sequence * batch * hidden + 5 * heads * sequence * sequence * batch


def adapted_bytes(
    batch: int,
    sequence: int,
    hidden: int,
    heads: int,
    *,
    bytes_per_value: int = 2,
    dropout: bool = True,
    mask_bytes: int = 1,
    attention: str = "eager",
    act_copies: int = 1,
) -> int:
    """The same [bytes] for another data type, without dropout, or with attention that stores no scores.

    Parameters
    ----------
    batch, sequence, hidden, heads
        b, s, h and a of the paper; the MLP is 4 h wide.
    bytes_per_value
        2 in the paper; 4 for float32.
    dropout, mask_bytes
        Whether there is any, and bytes per value of its masks: 1 on a GPU, those of a value on a CPU.
    attention
        ``"eager"`` stores the softmax [b, a, s, s], and with dropout its mask and what is left of it; ``"sdpa"`` stores
        one number per query and head. On a CPU, SDPA with dropout is computed as if eager: give that then.
    act_copies
        Tensors of the MLP's width that the activation function keeps: 1 for a fused GELU, 4 for transformers'
        ``gelu_new``, which is written out.
    """
    if attention not in ("eager", "sdpa"):
        raise ValueError(f"attention is eager or sdpa; given: {attention!r}")
    # two norms, the inputs of qkv, projection and the MLP's first product: 5; q, k, v: 3; the MLP's second product: 4
    values = 12 + 4 * act_copies
    per_token = values * hidden * bytes_per_value + 4 * _STATISTIC_BYTES
    scores = bytes_per_value
    if dropout:
        per_token += 2 * hidden * mask_bytes
        scores += bytes_per_value + mask_bytes
    per_token += heads * (scores * sequence if attention == "eager" else _STATISTIC_BYTES)
    return per_token * batch * sequence


def korthikanti(*, hidden: int = 768, heads: int = 12, sequence: int = 1024, batch: int = 2) -> pd.DataFrame:
    """One GPT-2 block in float32 on a CPU [MiB]: 34 s b h + 5 a s^2 b, as printed, and adapted to what runs.

    ``gap_frac`` is of the form as printed, ``adapted_gap_frac`` of :func:`adapted_bytes`: four bytes per
    value and per value of a mask, a GELU that is written out, dropout and attention as they are (bar: within 3%).
    """
    shape = (batch, sequence, hidden, heads)
    rows, adapted = [], []
    for attention in ("eager", "sdpa"):
        for dropout in (0.1, 0.0):
            model = models.gpt(
                layers=2, hidden=hidden, heads=heads, max_input_cells=sequence, dropout=dropout, attention=attention,
                device="cpu",
            )  # fmt: skip
            retained = Replayer(model).replay(model.random_batch(batch, sequence), Levers()).retained
            own = retained[retained["module"].astype(str).str.contains(".h.1.", regex=False)]
            item = f"{attention}, dropout {dropout}"
            rows.append((item, "MiB", korthikanti_bytes(*shape) / _MIB, own["size_bytes"].sum() / _MIB))
            adapted.append(
                adapted_bytes(
                    *shape,
                    bytes_per_value=4,
                    dropout=dropout > 0,
                    mask_bytes=4,
                    attention="eager" if dropout else attention,
                    act_copies=4,
                )
                / _MIB
            )
    table = beside(rows)
    return table.assign(adapted=adapted, adapted_gap_frac=table["recomputed"] / adapted - 1)
