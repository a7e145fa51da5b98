"""LSH-MoE (arXiv 2411.08446): its speed-ups by Amdahl's law, and training with its compressed all-to-all."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit.moe import routing
from effkit.moe.setting import Setting
from lessons.moe_compression import NUM_CLUSTERS, relative_error

# LSH-MoE (arXiv 2411.08446): share of all-to-all in a step, fraction of its bytes still sent, published speed-up
LSH: Mapping[str, tuple[float, float, float]] = {
    "GPT": (0.30, 0.20, 1.3),
    "RoBERTa": (0.40, 0.20, 1.6),
    "Swin": (0.70, 0.117, 1.28),
}
#: speed-ups of its Table 2: the means over models of 15 and of 52 billion parameters, and T5's
TABLE_2: Mapping[str, float] = {"mean, 15B": 1.33, "mean, 52B": 1.38, "T5": 2.2}
#: how the trained layers travel: compress, compensate
_WAYS = {"none": ("none", False), "lsh": ("lsh", False), "lsh + residual": ("lsh", True)}
_SMALL = Setting(num_tokens=256, hidden=32, ffn=64, num_experts=4, num_clusters=16, num_hashes=4)


def lsh_moe() -> pd.DataFrame:
    """LSH-MoE's speed-ups beside 1 / (1 - p + p c), when nothing but the exchange shrinks (Amdahl's law).

    Indexed by model: ``share_frac`` p, ``sent_frac`` c, ``published``, ``recomputed`` and ``error`` (relative);
    ``limit``, the speed-up were nothing sent at all; ``implied_sent_frac``, the c that the published speed-up needs.
    GPT closes. RoBERTa needs a c near 0.06: more than bytes shrank, perhaps the experts' work. Swin stays at half of
    what its share and compression allow: hashing has its price, or the share is of another set-up.
    """
    table = pd.DataFrame.from_dict(LSH, orient="index", columns=["share_frac", "sent_frac", "published"])
    share, sent = table["share_frac"], table["sent_frac"]
    table["recomputed"] = 1 / (1 - share + share * sent)
    table["error"] = table["recomputed"] / table["published"] - 1
    table["limit"] = 1 / (1 - share)
    table["implied_sent_frac"] = (1 / table["published"] - (1 - share)) / share
    table.attrs["source"] = "LSH-MoE, arXiv 2411.08446"
    return table.rename_axis("model")


def compare_training(
    setting: Setting | None = None, *, num_steps: int = 300, num_seeds: int = 3, learning_rate: float = 2e-2,
    **changes: Any,
) -> pd.DataFrame:  # fmt: skip
    """Train a small model with and without LSH compression and its residual compensation, and run each all ways.

    The model is one residual block, ``head(x + moe(norm(x)))``, and learns a fixed random function, a tanh layer
    between two random matrices, of clustered tokens that are new in every step. From each seed it is trained three
    times, from the same weights on the same tokens, with Adam and a cosine schedule; its own router chooses. Each
    result is then run three ways on tokens that it has not seen: trained with ``"lsh"`` and run with
    ``"lsh + residual"`` is compensation added after training.

    Parameters
    ----------
    setting
        Tokens of a step, widths, experts, ``num_clusters`` (64 if 0), ``num_hashes``; ``compress`` and ``compensate``
        are set by the ways, and what else it loses (capacity, dtype of messages) is lost in all of them. A small one
        unless given: 256 tokens, hidden 32, 4 experts, 16 clusters, 4 hashes.
    num_steps
        Of each training.
    num_seeds
        Trainings of each way, from the setting's seed on.
    learning_rate
        Of Adam, in the beginning.
    **changes
        To the setting.

    Returns
    -------
    pandas.DataFrame
        Nine rows, indexed by ``trained`` and ``run``: ``none``, ``lsh``, ``lsh + residual``. ``loss_frac``: mean
        squared error over the variance of what is learned (1: nothing was), mean over seeds; ``loss_spread_frac``: its
        standard deviation, nan for one seed; ``output_error_frac``: L2 norm of the difference to the same weights run
        with ``none``, over that of their output; ``output_error_spread_frac``; ``sent_frac``: rows sent over token
        copies kept.

    Raises
    ------
    ValueError
        For fewer than one step or seed, or a change that no setting has or allows.
    """
    if num_steps < 1 or num_seeds < 1:
        raise ValueError(f"num_steps and num_seeds are at least 1; given: {num_steps} and {num_seeds}")
    setting = (setting or _SMALL).change(**changes).change(pad=False)
    setting = setting.change(num_clusters=setting.num_clusters or NUM_CLUSTERS, num_chunks=1, num_chunks_backward=0,
                             num_replicas=0, compress="lsh")  # fmt: skip
    found = []
    for seed in range(setting.seed, setting.seed + num_seeds):
        of_seed = setting.change(seed=seed)
        teacher = _Teacher(of_seed)
        for trained, way in _WAYS.items():
            model = _trained(of_seed, teacher, way, num_steps, learning_rate)
            for run, row in _run_all_ways(model, teacher, of_seed, num_steps).items():
                found.append({"trained": trained, "run": run, **row})
    by_way = pd.DataFrame(found).groupby(["trained", "run"], sort=False)
    table = by_way.mean()
    for name in ("loss", "output_error"):
        table.insert(table.columns.get_loc(f"{name}_frac") + 1, f"{name}_spread_frac", by_way[f"{name}_frac"].std())
    return table


class _Block(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.moe = setting.layer()
        self.norm = nn.LayerNorm(setting.hidden)
        self.head = nn.Linear(setting.hidden, setting.hidden)
        draw = torch.Generator().manual_seed(setting.seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=draw) / math.sqrt(setting.hidden))
            self.head.bias.zero_()
        self.to(self.moe.gate.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x + self.moe(self.norm(x)))


class _Teacher:
    """Tokens of each step and what is to be learned of them; a function of about unit variance."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        draw = np.random.default_rng([setting.seed, 6])
        hidden, inner = setting.hidden, 2 * setting.hidden
        self.inner = torch.from_numpy(draw.standard_normal((hidden, inner), dtype=np.float32)) * 2 / math.sqrt(hidden)
        self.outer = torch.from_numpy(draw.standard_normal((inner, hidden), dtype=np.float32)) / math.sqrt(inner)

    def batch(self, step: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.from_numpy(routing.tokens(self.setting, 0, step))
        return x.to(like), (torch.tanh(x @ self.inner) @ self.outer).to(like)


def _trained(
    setting: Setting, teacher: _Teacher, way: tuple[str, bool], num_steps: int, learning_rate: float
) -> _Block:
    model = _Block(setting)
    model.moe.compress, model.moe.compensate = way
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)
    with torch.enable_grad():
        for step in range(num_steps):
            x, target = teacher.batch(step, model.head.weight)
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model


@torch.no_grad()
def _run_all_ways(model: _Block, teacher: _Teacher, setting: Setting, step: int) -> dict[str, dict[str, float]]:
    """Figures of each way to run a trained model, on a batch that comes after those it was trained on."""
    x, target = teacher.batch(step, model.head.weight)
    rows, exact = {}, None
    for run, way in _WAYS.items():
        model.moe.compress, model.moe.compensate = way
        output = model(x).double()
        exact = output if exact is None else exact
        rows[run] = {
            "loss_frac": float((output - target).square().mean() / target.double().var(correction=0)),
            "output_error_frac": relative_error(output, exact),
            "sent_frac": float(model.moe.sent_counts.sum() / model.moe.kept_counts.sum()),
        }
    return rows
