"""Activations of Llama in bfloat16 beside what COAT prints of them (arXiv 2410.19313): replays of the same nets."""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effkit.activations.fake_step import Replayer
from effkit.activations.levers import Levers
from lessons.recounted import beside

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

_GB, _MIB = 10**9, 2**20
_SEQUENCE = 2048
# Which of COAT's operators a module of transformers' Llama block is, by the end of its name.
_COAT_OPERATORS = {"norm": "RMSNorm", "act_fn": "Act Func", "mlp": "Act Func", "self_attn": "FlashAttn"}


def _llama(hidden: int, ffn: int, layers: int, heads: int, batch: int, sequence: int = _SEQUENCE) -> pd.DataFrame:
    """What a bfloat16 Llama retains for backward: ``size_bytes``, ``module``, ``operator`` of each storage."""
    configuration = LlamaConfig(
        vocab_size=LLAMA_VOCABULARY,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        use_cache=False,
        attn_implementation="sdpa",  # type: ignore[call-arg]
    )
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(configuration).to(torch.bfloat16)  # type: ignore[arg-type]
    cells = torch.zeros(batch, sequence, dtype=torch.long)
    return Replayer(model).replay({"input_ids": cells, "labels": cells}, Levers()).retained


def _second_layer(retained: pd.DataFrame) -> pd.DataFrame:
    """A typical one: the first keeps the rotary angles that all layers share."""
    return retained[retained["module"].astype(str).str.contains(".layers.1.", regex=False)]


def _coat_operator(module: str, operator: str) -> str:
    end = module.rpartition(".")[2]
    if operator == "mm":  # what attention yields is kept once, and counts for the product that follows
        return "Linear"
    return _COAT_OPERATORS["norm" if end.endswith("norm") else end]


def coat_block() -> pd.DataFrame:
    """One Llama block in bfloat16, by operator [U = batch x sequence x hidden x 2 bytes], as in COAT's Table 2.

    The totals agree (bar: within 1%), single rows do not: transformers' RMSNorm keeps its output in 16 bits beside its
    input in 32 (3 U each, 2 printed); RoPE keeps nothing that attention does not keep. Widths are those of Llama-2-7B,
    whose MLP is 2.69 times as wide as its hidden state (8 / 3 printed). ``TE`` and ``COAT`` are printed beside.
    """
    hidden, ffn, _, heads, batch = LLAMA["Llama-2-7B"]
    own = _second_layer(_llama(hidden, ffn, 2, heads, batch))
    unit = batch * _SEQUENCE * hidden * 2
    operators = [
        _coat_operator(str(module), str(op)) for module, op in zip(own["module"], own["operator"], strict=True)
    ]
    counted = own.groupby(operators)["size_bytes"].sum() / unit
    counted["Total"] = counted.sum()
    printed = COAT_BLOCK_U
    table = beside((item, "U", figure, float(counted.get(item, 0.0))) for item, figure in printed["BF16"].items())
    others = pd.DataFrame({f"published_{name}": printed[name] for name in ("TE", "COAT")})
    return table.join(others)


def coat_totals() -> pd.DataFrame:
    """Activations of whole Llama models and of single layers in bfloat16, as in COAT's Tables 7 and 6.

    Table 7 closes in GB of 1e9 bytes (bar: within 4%), with the logits in float32 that the loss keeps. Table 6 prints
    for a layer at batch 4 twice what is counted, to a thousandth [MB of 1024^2 bytes]: what batch 8 takes.
    """
    rows: list[tuple[str, str, float | None, float]] = []
    for name, figure in COAT_MODEL_GB.items():
        hidden, ffn, layers, heads, batch = LLAMA[name]
        retained = _llama(hidden, ffn, 2, heads, batch)
        of_layer = int(_second_layer(retained)["size_bytes"].sum())
        rest = int(retained["size_bytes"].sum()) - 2 * of_layer
        rows.append((name, "GB", figure, (layers * of_layer + rest) / _GB))
        rows.append((f"{name}: layers", "GB", None, layers * of_layer / _GB))
        rows.append((f"{name}: logits, last norm, angles", "GB", None, rest / _GB))
    ffn_per_hidden = LLAMA["Llama-2-7B"][1] / LLAMA["Llama-2-7B"][0]
    for (hidden, sequence), figure in COAT_LAYER_MB.items():
        own = _second_layer(_llama(hidden, int(ffn_per_hidden * hidden), 2, hidden // 128, 4, sequence))
        rows.append((f"layer {hidden} x {sequence}", "MiB", figure, int(own["size_bytes"].sum()) / _MIB))
    return beside(rows)
