"""The decoder that most published recordings of GPU memory were made with: assignment 2 of Stanford's course CS336.

Written anew from the public description of the model, its loss and its optimizer, for :mod:`ledger_recorded`. What a
step keeps in memory depends on how these are written: products by ``einsum``, a softmax of single operations, rotary
positions on halves, an optimizer that makes new moments at every step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY = 10_000
# width, width of the feed-forward, number of blocks, number of heads
SIZES = {"medium": (1024, 4096, 24, 16), "xl": (2560, 10240, 32, 32)}


class Product(nn.Module):
    """A linear layer without a bias."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out, width))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("...i,oi->...o", x, self.weight)


class RootMeanSquare(nn.Module):
    """The norm before each half of a block, in float32."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
        return (self.weight * scaled).to(x.dtype)


class Rotation(nn.Module):
    """Rotary positions: each pair of neighbours is turned by an angle that grows with the position."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(2, length, width // 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        even, odd = x.unflatten(-1, (x.shape[-1] // 2, 2)).movedim(-1, 0).unbind(0)
        cosine, sine = self.table[:, : even.shape[-2]].unbind(0)
        return torch.cat((cosine * even - sine * odd, sine * even + cosine * odd), -1)


def softmax(scores: Tensor) -> Tensor:
    """Over the last dimension, in three operations."""
    shifted = scores - torch.max(scores, dim=-1, keepdim=True)[0]
    exponentials = torch.exp(shifted)
    return exponentials / torch.sum(exponentials, dim=-1, keepdim=True)


class Attention(nn.Module):
    """Causal self-attention whose scores are tensors."""

    def __init__(self, width: int, heads: int, rotation: Rotation) -> None:
        super().__init__()
        self.heads, self.rotation = heads, rotation
        self.query, self.key, self.value, self.out = (Product(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (self._split(layer(x)) for layer in (self.query, self.key, self.value))
        query, key = self.rotation(query), self.rotation(key)
        position = torch.arange(x.shape[1], device=x.device)
        scores = torch.einsum("bhqd,bhkd->bhqk", query, key) / math.sqrt(key.shape[-1])
        scores = torch.where(position[:, None] >= position, scores, float("-inf"))
        mixed = torch.einsum("bhqk,bhkd->bhqd", softmax(scores), value)
        return self.out(mixed.transpose(1, 2).flatten(2).contiguous())

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, x.shape[-1] // self.heads)).transpose(1, 2)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = Product(width, inner), Product(width, inner), Product(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return self.down(gate * torch.sigmoid(gate) * self.up(x))


class Block(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, rotation: Rotation) -> None:
        super().__init__()
        self.attention, self.feed_forward = Attention(width, heads, rotation), FeedForward(width, inner)
        self.before_attention, self.before_feed_forward = RootMeanSquare(width), RootMeanSquare(width)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.attention(self.before_attention(x))
        x = x + attended
        fed = self.feed_forward(self.before_feed_forward(x))
        return x + fed


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in single operations."""
    shifted = logits - torch.max(logits, dim=-1, keepdim=True)[0]
    surprise = -(shifted - torch.log(torch.sum(torch.exp(shifted), dim=-1, keepdim=True)))
    return torch.mean(torch.gather(surprise, -1, labels.unsqueeze(-1)))


def torch_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """torch's cross-entropy, in float32."""
    return nn.functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1))


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "own": own_loss, "torch": torch_loss, "sum": lambda logits, labels: logits.sum(),
}  # fmt: skip


class Decoder(nn.Module):
    """Tokens to logits; with labels, to a loss.

    ``recompute`` blocks are computed again in backward together; 0: none are; ``"nested"``: halves of halves. The
    logits of the latest step are held, as those who recorded hold them in a variable. Unless it ``keeps_casts``,
    autocast casts a weight anew for each product, as under inference mode.
    """

    def __init__(
        self, size: str | Sequence[int], length: int, loss: str = "own", recompute: int | str = 0, *,
        keeps_casts: bool = True, vocabulary: int = VOCABULARY,
    ) -> None:  # fmt: skip
        super().__init__()
        width, inner, num_blocks, heads = SIZES[size] if isinstance(size, str) else size
        self.embedding = nn.Parameter(torch.empty(vocabulary, width))
        rotation = Rotation(length, width // heads)
        self.blocks = nn.ModuleList(Block(width, inner, heads, rotation) for _ in range(num_blocks))
        self.norm, self.head = RootMeanSquare(width), Product(width, vocabulary)
        self.loss, self.recompute, self.keeps_casts = LOSSES[loss], recompute, keeps_casts
        self.logits: Tensor | None = None

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> Tensor:
        if not self.keeps_casts and torch.is_autocast_enabled("cpu"):
            torch.set_autocast_cache_enabled(False)  # until autocast is left
        logits = self.head(self.norm(self._through(list(self.blocks), self.embedding[tokens, :])))
        if labels is None:
            return logits
        self.logits = logits
        return self.loss(logits, labels)

    def _through(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        num = len(blocks) if not self.recompute else self.recompute
        if isinstance(num, str):
            return self._halved(blocks, x)
        for first in range(0, len(blocks), num):
            part = blocks[first : first + num]
            x = _again(partial(_in_turn, part), x) if self.recompute else _in_turn(part, x)
        return x

    def _halved(self, blocks: list[nn.Module], x: Tensor) -> Tensor:
        if len(blocks) == 1:
            return blocks[0](x)
        middle = len(blocks) // 2
        for part in (blocks[:middle], blocks[middle:]):
            x = _again(partial(self._halved, part), x)
        return x


def _in_turn(blocks: Sequence[nn.Module], x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def _again(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)  # nothing here is random


class ReplacingAdamW(torch.optim.Optimizer):
    """AdamW, one parameter after another, which puts new moments into the place of the old ones."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            rate, (first, second), decay = group["lr"], group["betas"], group["weight_decay"]
            for parameter in (one for one in group["params"] if one.grad is not None):
                gradient, state = parameter.grad.data, self.state[parameter]
                time = state.get("time", 1)
                pace = rate * math.sqrt(1 - second**time) / (1 - first**time)
                parameter.data -= rate * decay * parameter.data
                mean = state.get("mean", torch.zeros_like(gradient))
                square = state.get("square", torch.zeros_like(gradient))
                new_mean = first * mean + (1 - first) * gradient
                new_square = second * square + (1 - second) * torch.square(gradient)
                parameter.data -= pace * new_mean / (torch.sqrt(new_square) + group["eps"])
                state["mean"], state["square"], state["time"] = new_mean, new_square, time + 1


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "replaces its moments": ReplacingAdamW,
    "all parameters at once": torch.optim.AdamW,
    "one parameter at a time": partial(torch.optim.AdamW, foreach=False),
}
