"""What the lossy levers of a setting do to the layer's output and gradients, before training and in it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit.moe import routing
from effkit.moe.costs import message_bytes
from effkit.moe.layers import layer_of
from effkit.moe.setting import Setting

_NUM_CLUSTERS = 64  # where a setting has none
_LOSSLESS: dict[str, Any] = {"compress": "none", "message_dtype": "same", "capacity_factor": 0.0, "pad": False}
#: how the trained layers travel: compress, compensate
_WAYS = {"none": ("none", False), "lsh": ("lsh", False), "lsh + residual": ("lsh", True)}
_SMALL = Setting(num_tokens=256, hidden=32, ffn=64, num_experts=4, num_clusters=16, num_hashes=4)


def output_error(setting: Setting | None = None, **changes: Any) -> pd.DataFrame:
    """The error that the lossy levers of a setting make together, on clustered and on random tokens.

    The levers are ``compress`` with ``compensate``, ``message_dtype``, and the tokens that ``capacity_factor`` drops.
    The layer with them is compared to the layer without any: same weights, tokens and routing. It runs in this process
    alone, on the tokens that rank 0 has in its first step; the ranks of a run have the same weights, and messages are
    packed and unpacked here as they are there.

    The gradient that comes from above is a random linear function of the token, so that tokens that are alike have
    gradients that are alike. LSH hands every token of a bucket the mean of their gradients: where m tokens of a bucket
    have independent ones, the error of the input's gradient is near sqrt(1 - 1 / m) instead.

    Parameters
    ----------
    setting
        ``Setting()`` unless given.
    **changes
        To the setting, such as ``compress="lsh"``.

    Returns
    -------
    pandas.DataFrame
        Rows ``clustered`` (the setting's clusters, 64 if it has none) and ``random``. ``output_error_frac``,
        ``input_gradient_error_frac``, ``weight_gradient_error_frac`` (all weights as one vector): the L2 norm of the
        difference over that of the exact one; the gradients are nan without a backward pass. ``sent_frac``: rows sent
        over token copies kept; ``bytes_frac``: bytes of the messages over those of the lossless layer, over all
        exchanges (dispatch and combine, forward and backward).

    Raises
    ------
    ValueError
        For a change that no setting has or allows.

    Examples
    --------
    >>> output_error(num_tokens=64, hidden=16, ffn=16, message_dtype="bfloat16")["bytes_frac"].tolist()
    [0.5, 0.5]
    """
    setting = (setting or Setting()).change(**changes).change(num_chunks=1, num_chunks_backward=0, num_replicas=0)
    rows = {}
    for name, num_clusters in (("clustered", setting.num_clusters or _NUM_CLUSTERS), ("random", 0)):
        of_tokens = setting.change(num_clusters=num_clusters)
        lossy, exact = _Step(of_tokens), _Step(of_tokens.change(**_LOSSLESS))
        rows[name] = {
            "output_error_frac": _error(lossy.output, exact.output),
            "input_gradient_error_frac": _error(lossy.input_gradient, exact.input_gradient),
            "weight_gradient_error_frac": _error(lossy.weight_gradient, exact.weight_gradient),
            "sent_frac": lossy.num_sent / lossy.num_kept,
            "bytes_frac": lossy.size_bytes / exact.size_bytes,
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("tokens")


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
    setting = setting.change(num_clusters=setting.num_clusters or _NUM_CLUSTERS, num_chunks=1, num_chunks_backward=0,
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


class _Step:
    """One step of the layer of a setting, in this process, and what it sent."""

    def __init__(self, setting: Setting) -> None:
        layer = layer_of(setting)
        x = torch.from_numpy(routing.tokens(setting, 0, 0)).to(layer.gate.weight).requires_grad_(setting.backward)
        scores = torch.from_numpy(routing.scores(setting, 0, 0)).to(x.device)
        with torch.set_grad_enabled(setting.backward):
            output = layer(x, scores)
        self.output = output.detach()
        self.input_gradient = self.weight_gradient = None
        if setting.backward:
            draw = np.random.default_rng([setting.seed, 5]).standard_normal((setting.hidden, setting.hidden))
            above = x.detach() @ torch.from_numpy(draw / math.sqrt(setting.hidden)).to(x)
            grads = torch.autograd.grad(output, [x, *layer.parameters()], above)
            self.input_gradient = grads[0]
            self.weight_gradient = torch.cat([grad.reshape(-1) for grad in grads[1:]])
        self.num_sent, self.num_kept = int(layer.sent_counts.sum()), int(layer.kept_counts.sum())
        ways = (True, False) if setting.backward else (True,)
        self.size_bytes = self.num_sent * sum(
            message_bytes(setting, forward=forward, out=out) for forward in ways for out in (True, False)
        )


class _Block(nn.Module):
    def __init__(self, setting: Setting) -> None:
        super().__init__()
        self.moe = layer_of(setting)
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
            "output_error_frac": _error(output, exact),
            "sent_frac": float(model.moe.sent_counts.sum() / model.moe.kept_counts.sum()),
        }
    return rows


def _error(found: torch.Tensor | None, exact: torch.Tensor | None) -> float:
    """Relative L2 error; nan where there is nothing to compare."""
    if found is None or exact is None:
        return math.nan
    return float((found.double() - exact.double()).norm() / exact.double().norm())
