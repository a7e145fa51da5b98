"""Mesa's published training memory of DeiT, recounted: replays of the net as its authors trained it."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from effkit import models
from effkit.activations.compressing import compressed
from effkit.activations.fake_step import Replayer
from effkit.activations.gradients import ALL, gradient_error
from effkit.activations.levers import NONE, Levers
from effkit.activations.timeline import CATEGORIES
from lessons.recounted import beside

# Mesa (arXiv 2111.11124), README of github.com/ziplab/Mesa, "Results on ImageNet", column "Train Memory (MB)": batch of
# 128, 224 x 224, one GPU. Without and with Mesa (8 bit). Its scripts divide by 1024^2, so that MB is MiB.
MESA_MIB = {"DeiT-Ti": (4171, 1858), "DeiT-S": (8459, 3840), "DeiT-B": (17691, 8616)}
# DeiT (arXiv 2012.12877), Table 1: hidden size and heads; 12 layers, patches of 16, 1000 classes.
DEIT = {"DeiT-Ti": (192, 3), "DeiT-S": (384, 6), "DeiT-B": (768, 12)}

_MIB, _BATCH, _LAYERS = 2**20, 128, 12
_FULLEST = "gelu_backward"
# Values that share a scale: few enough scales to weigh as little as Mesa's, of which each head has one.
_FEW_SCALES = 4096


class _OldSoftmax(torch.autograd.Function):
    """As in torch 1.7 under autocast: computed in float32, and both its input and its output are kept."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = scores.float().softmax(-1)
        ctx.save_for_backward(scores, weights)
        return weights

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scores, weights = ctx.saved_tensors
        return torch._softmax_backward_data(gradients[0], weights, -1, torch.float32).to(scores.dtype)


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int, old: bool) -> None:
        super().__init__()
        self.heads, self.old = heads, old
        self.norm1, self.norm2 = nn.LayerNorm(hidden), nn.LayerNorm(hidden)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 4 * hidden), nn.Linear(4 * hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, hidden = x.shape
        width = hidden // self.heads
        qkv = self.qkv(self.norm1(x)).reshape(batch, tokens, 3, self.heads, width).permute(2, 0, 3, 1, 4)
        scores = (qkv[0] @ qkv[1].transpose(-2, -1)) * width**-0.5
        weights: Tensor = _OldSoftmax.apply(scores) if self.old else scores.softmax(-1)
        x = x + self.proj((weights @ qkv[2]).transpose(1, 2).reshape(x.shape))
        # .float(): autocast of torch 1.7 computed GELU in float32
        y: Tensor = x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x)).float()))
        return y


class _Deit(nn.Module):
    """DeiT as Mesa trains it (github.com/HubHop/deit-mesa: timm 0.3.2, torch 1.7.1), without dropout, which is off."""

    def __init__(self, name: str, layers: int, old: bool = True) -> None:
        super().__init__()
        hidden, heads = DEIT[name]
        self.patches = nn.Conv2d(3, hidden, 16, 16)
        self.token = nn.Parameter(torch.empty(1, 1, hidden))
        self.positions = nn.Parameter(torch.empty(1, 197, hidden))
        self.blocks = nn.Sequential(*(_Block(hidden, heads, old) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 1000)

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        x = self.patches(pixels).flatten(2).transpose(1, 2)
        x = torch.cat((self.token.expand(len(x), -1, -1), x), 1) + self.positions
        return nn.functional.cross_entropy(self.head(self.norm(self.blocks(x))[:, 0]).float(), labels)


def _images(batch: int) -> tuple[Tensor, Tensor]:
    return torch.empty(batch, 3, 224, 224), torch.zeros(batch, dtype=torch.long)


def _parts(replayer: Replayer, batch: int, levers: Levers) -> pd.Series[float]:
    """Bytes by category when backward is at the last GELU: at batch 128 the fullest moment; ``per layer``: retained."""
    timeline = replayer.replay(_images(batch), levers)
    at_peak = pd.Series(timeline.levels()[:, timeline.ops.index(_FULLEST)], CATEGORIES, dtype="float64")
    own = timeline.retained["module"].astype(str).str.contains("blocks.0", regex=False)
    at_peak["per layer"] = timeline.retained.loc[own, "size_bytes"].sum()
    return at_peak


def _at_full_batch(replayer: Replayer, levers: Levers) -> pd.Series[float]:
    """Linear in the batch, so that 1 and 2 images tell of 128: compressing is many operators."""
    if levers.compress == NONE:
        return _parts(replayer, _BATCH, levers)
    one, two = (_parts(replayer, batch, levers) for batch in (1, 2))
    return one + (two - one) * (_BATCH - 1)


@cache
def _deit_parts(name: str, group: int) -> pd.Series[float]:
    """What there is at the peak of one step [bytes], by category; ``group``: of int8, 0 for no compression.

    One layer is replayed; each of the eleven before it adds what a layer retains.
    """
    levers = Levers(autocast="bfloat16", compress="int8" if group else NONE, group=group or _FEW_SCALES)
    at_peak = _at_full_batch(_on_meta(name), levers)
    at_peak["saved activation"] += (_LAYERS - 1) * at_peak.pop("per layer")
    with torch.device("meta"):
        parameter = sum(4 * weight.numel() for weight in _Deit(name, _LAYERS).parameters())
    at_peak["parameter"], at_peak["optimizer state"] = parameter, 2 * parameter
    # set to zero and not freed by torch 1.7's zero_grad(); DistributedDataParallel holds a copy in its buckets
    at_peak["gradient"] = at_peak["gradient bucket"] = parameter
    return at_peak[at_peak > 0]


@cache
def _on_meta(name: str, layers: int = 1, *, old: bool = True) -> Replayer:
    with torch.device("meta"):
        model = _Deit(name, layers, old)
    return Replayer(model, loss=lambda loss: loss)


def mesa(group: int = _FEW_SCALES) -> pd.DataFrame:
    """Training memory of DeiT, plain and with Mesa [MiB], as in Mesa's README (bar: the plain ones within 2%).

    What closes it, all of it read from the authors' scripts: autocast to 16 bits with the rules of torch 1.7 (GELU,
    norms and softmax in 32 bits, softmax keeps its input), AdamW, gradients that are zeroed and not freed, and a copy
    of them in the buckets of DistributedDataParallel. ``group``: values that share a scale in ours.
    """
    rows = []
    for name, figures in MESA_MIB.items():
        for item, figure, of in zip((name, f"{name} with Mesa"), figures, (0, group), strict=True):
            rows.append((item, "MiB", figure, float(_deit_parts(name, of).sum()) / _MIB))
    return beside(rows)


def mesa_parts(group: int = _FEW_SCALES) -> pd.DataFrame:
    """What the totals of :func:`mesa` consist of [MiB], one column per item: what is not saved is not compressed."""
    columns: dict[str, pd.Series[float]] = {}
    for name in DEIT:
        columns |= {name: _deit_parts(name, 0), f"{name} with Mesa": _deit_parts(name, group)}
    return (pd.DataFrame(columns) / _MIB).rename_axis("part")


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
