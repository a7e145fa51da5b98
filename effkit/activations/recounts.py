"""Published activation memory, recounted: replays of the same nets beside what their papers print."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import pandas as pd
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from effkit import models
from effkit.activations import closed_forms as published
from effkit.activations.compressing import compressed
from effkit.activations.gradients import ALL, gradient_error
from effkit.activations.levers import Levers
from effkit.activations.replaying import Replayer

_GB, _MIB = 10**9, 2**20
_SEQUENCE = 2048
# Which of COAT's operators a module of transformers' Llama block is, by the end of its name.
_COAT_OPERATORS = {"norm": "RMSNorm", "act_fn": "Act Func", "mlp": "Act Func", "self_attn": "FlashAttn"}


def beside(rows: Iterable[tuple[str, str, float | None, float]]) -> pd.DataFrame:
    """(item, unit, published or None, recomputed) -> ``unit``, ``published``, ``recomputed``, ``gap_frac`` by item."""
    table = pd.DataFrame(rows, columns=["item", "unit", "published", "recomputed"]).set_index("item")
    table = table.astype({"published": "Float64", "recomputed": "Float64"})
    return table.assign(gap_frac=table["recomputed"] / table["published"] - 1)


def _llama(hidden: int, ffn: int, layers: int, heads: int, batch: int, sequence: int = _SEQUENCE) -> pd.DataFrame:
    """What a bfloat16 Llama retains for backward: ``size_bytes``, ``module``, ``operator`` of each storage."""
    configuration = LlamaConfig(
        vocab_size=published.LLAMA_VOCABULARY,
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


def _second_layer(retained: pd.DataFrame, within: str = ".layers.1.") -> pd.DataFrame:
    """A typical one: the first keeps the rotary angles that all layers share."""
    return retained[retained["module"].astype(str).str.contains(within, regex=False)]


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
    hidden, ffn, _, heads, batch = published.LLAMA["Llama-2-7B"]
    own = _second_layer(_llama(hidden, ffn, 2, heads, batch))
    unit = batch * _SEQUENCE * hidden * 2
    operators = [
        _coat_operator(str(module), str(op)) for module, op in zip(own["module"], own["operator"], strict=True)
    ]
    counted = own.groupby(operators)["size_bytes"].sum() / unit
    counted["Total"] = counted.sum()
    printed = published.COAT_BLOCK_U
    table = beside((item, "U", figure, float(counted.get(item, 0.0))) for item, figure in printed["BF16"].items())
    others = pd.DataFrame({f"published_{name}": printed[name] for name in ("TE", "COAT")})
    return table.join(others)


def coat_totals() -> pd.DataFrame:
    """Activations of whole Llama models and of single layers in bfloat16, as in COAT's Tables 7 and 6.

    Table 7 closes in GB of 1e9 bytes (bar: within 4%), with the logits in float32 that the loss keeps. Table 6 prints
    for a layer at batch 4 twice what is counted, to a thousandth [MB of 1024^2 bytes]: what batch 8 takes.
    """
    rows: list[tuple[str, str, float | None, float]] = []
    for name, figure in published.COAT_MODEL_GB.items():
        hidden, ffn, layers, heads, batch = published.LLAMA[name]
        retained = _llama(hidden, ffn, 2, heads, batch)
        of_layer = int(_second_layer(retained)["size_bytes"].sum())
        rest = int(retained["size_bytes"].sum()) - 2 * of_layer
        rows.append((name, "GB", figure, (layers * of_layer + rest) / _GB))
        rows.append((f"{name}: layers", "GB", None, layers * of_layer / _GB))
        rows.append((f"{name}: logits, last norm, angles", "GB", None, rest / _GB))
    ffn_per_hidden = published.LLAMA["Llama-2-7B"][1] / published.LLAMA["Llama-2-7B"][0]
    for (hidden, sequence), figure in published.COAT_LAYER_MB.items():
        own = _second_layer(_llama(hidden, int(ffn_per_hidden * hidden), 2, hidden // 128, 4, sequence))
        rows.append((f"layer {hidden} x {sequence}", "MiB", figure, int(own["size_bytes"].sum()) / _MIB))
    return beside(rows)


def korthikanti(*, hidden: int = 768, heads: int = 12, sequence: int = 1024, batch: int = 2) -> pd.DataFrame:
    """One GPT-2 block in float32 on a CPU [MiB]: 34 s b h + 5 a s^2 b, as printed, and adapted to what runs.

    ``gap_frac`` is of the form as printed, ``adapted_gap_frac`` of :func:`~closed_forms.adapted_bytes`: four bytes per
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
            own = _second_layer(retained, ".h.1.")
            item = f"{attention}, dropout {dropout}"
            rows.append((item, "MiB", published.korthikanti_bytes(*shape) / _MIB, own["size_bytes"].sum() / _MIB))
            adapted.append(
                published.adapted_bytes(
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


def head_groups(*, steps: int = 20, heads: int = 4, seed: int = 0) -> pd.DataFrame:
    """Error of the gradient with int8, by what shares a scale: Mesa's heads (section 3.1), a tensor, or 128 values.

    A vision transformer and a GPT-2, lightly trained. ``relative_error`` and ``cosine`` of all parameters together;
    ``noise_relative_error``: that of another batch's gradient.
    """
    nets: dict[str, tuple[Any, Any]] = {
        "vision": (models.vision(layers=3, hidden=64, heads=heads, device="cpu", seed=seed), (8,)),
        "gpt": (models.gpt(layers=3, hidden=64, heads=heads, device="cpu", seed=seed), (4, 64)),
    }
    rows = {}
    for name, (model, shape) in nets.items():
        update = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for step in range(steps):
            update.zero_grad()
            model(**model.random_batch(*shape, seed=step)).loss.backward()
            update.step()
        batch, other = (model.random_batch(*shape, seed=steps + i) for i in range(2))
        for item, group, num_heads in (("head", "head", heads), ("tensor", "tensor", None), ("128 values", 128, None)):
            levers = partial(compressed, "int8", group, num_heads=num_heads)
            errors = gradient_error(model, batch, levers, batches=[other]).set_index("parameter")
            rows[name, item] = errors.loc[ALL, ["relative_error", "cosine", "noise_relative_error"]]
    return pd.DataFrame(rows).T.rename_axis(["net", "scale_shared_by"]).astype(float)
