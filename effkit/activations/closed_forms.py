"""Published figures and formulas of activation memory, as printed: each with its paper, its table and its unit."""

from __future__ import annotations

# Mesa (arXiv 2111.11124), README of github.com/ziplab/Mesa, "Results on ImageNet", column "Train Memory (MB)": batch of
# 128, 224 x 224, one GPU. Without and with Mesa (8 bit). Its scripts divide by 1024^2, so that MB is MiB.
MESA_MIB = {"DeiT-Ti": (4171, 1858), "DeiT-S": (8459, 3840), "DeiT-B": (17691, 8616)}
# DeiT (arXiv 2012.12877), Table 1: hidden size and heads; 12 layers, patches of 16, 1000 classes.
DEIT = {"DeiT-Ti": (192, 3), "DeiT-S": (384, 6), "DeiT-B": (768, 12)}

# COAT (arXiv 2410.19313), Table 2, "Llama-style", in U = batch x sequence x hidden x 2 bytes.
COAT_BLOCK_U = {
    "BF16": {"RMSNorm": 4.0, "Act Func": 8.0, "RoPE": 2.0, "FlashAttn": 3.0, "Linear": 5.66, "Total": 22.66},
    "TE": {"RMSNorm": 2.0, "Act Func": 8.0, "RoPE": 2.0, "FlashAttn": 3.0, "Linear": 3.33, "Total": 18.33},
    "COAT": {"RMSNorm": 1.0, "Act Func": 4.0, "RoPE": 2.0, "FlashAttn": 3.0, "Linear": 3.33, "Total": 13.33},
}
# COAT, Table 7, column "Activations" of BF16 [GB], sequences of 2048: Llama-2-7B at batch 2, Llama-2-13B at batch 1.
COAT_MODEL_GB = {"Llama-2-7B": 25.8, "Llama-2-13B": 20.1}
# COAT, Table 6, column "Memory" of BF16 [MB]: one layer, batch 4, by (hidden size, sequence length).
COAT_LAYER_MB = {(2048, 2048): 1457, (4096, 2048): 2914, (4096, 4096): 5828}
# Llama 2 (arXiv 2307.09288): hidden size, width of the MLP, layers, heads, and the batch of COAT's Table 7.
LLAMA = {"Llama-2-7B": (4096, 11008, 32, 32, 2), "Llama-2-13B": (5120, 13824, 40, 40, 1)}
LLAMA_VOCABULARY = 32000

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


def deit_bytes(batch: int, hidden: int, heads: int, *, arithmetic: str, tokens: int = 197) -> int:
    """Activations of one DeiT block [bytes], N tokens, D channels, h heads, statistics of norms left out.

    Parameters
    ----------
    batch, hidden, heads, tokens
        B, D, h and N.
    arithmetic
        ``"float32"``: 4 (16 N D + h N²), where softmax keeps its output. ``"float32, torch 1.7"``: softmax keeps its
        input too, 4 (16 N D + 2 h N²). ``"autocast, torch 1.7"``, how Mesa's baseline is trained: products in 16 bits;
        norms, softmax and GELU in 32: 44 N D + 8 h N². ``"Mesa"``: all of that in 8 bits, 16 N D + 3 h N².
    """
    per_value = {
        "float32": (64, 4),
        "float32, torch 1.7": (64, 8),
        "autocast, torch 1.7": (44, 8),
        "Mesa": (16, 3),
    }
    if arithmetic not in per_value:
        raise ValueError(f"arithmetic is one of {', '.join(per_value)}; given: {arithmetic!r}")
    of_tokens, of_scores = per_value[arithmetic]
    return batch * (of_tokens * tokens * hidden + of_scores * heads * tokens * tokens)
