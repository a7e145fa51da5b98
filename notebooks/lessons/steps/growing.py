"""A large model out of a small one (AquilaMoE, arXiv 2408.06567): wider, deeper, then experts from its feed-forward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lessons import meter
from lessons.steps.distilling import adamw
from lessons.steps.language import Learning, english_ids, language_model, pieces

NUM_EXPERTS, TOP_K = 4, 2


def _doubled_inputs(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(out, in) -> (out, 2 in): each column split in two unequal parts, so that equal inputs give the same output."""
    part = 0.5 + 0.5 * (torch.rand(weight.shape[1], generator=generator) - 0.5)
    return torch.cat([weight * part, weight * (1 - part)], 1)


def _doubled_outputs(weight: torch.Tensor) -> torch.Tensor:
    return torch.cat([weight, weight], 0)


@torch.no_grad()
def widened(model: Any, *, seed: int = 0) -> Any:
    """A Llama of twice the width, heads and feed-forward, which computes what the given one does.

    Every unit stands twice, and what reads it is split between the two, unequally, so that they part when they learn:
    a function-preserving initialisation in the manner of Net2Net (arXiv 1511.05641) and bert2BERT (arXiv 2110.07143).
    AquilaMoE compares several initialisations; which of them it settled on we did not check.

    Raises
    ------
    ValueError
        When the model has fewer key heads than heads.
    """
    config = copy.deepcopy(model.config)
    if config.num_key_value_heads != config.num_attention_heads:
        raise ValueError(
            f"the model has {config.num_attention_heads} heads and {config.num_key_value_heads} key heads, expected as "
            "many"
        )
    config.hidden_size, config.intermediate_size = 2 * config.hidden_size, 2 * config.intermediate_size
    config.num_attention_heads = config.num_key_value_heads = 2 * config.num_attention_heads
    config.head_dim = model.config.hidden_size // model.config.num_attention_heads
    grown = type(model)(config).to(model.device)
    grown.loss_type = model.loss_type
    generator = torch.Generator().manual_seed(seed)
    wide = grown.state_dict()
    for name, weight in model.state_dict().items():
        if weight.dim() == 1:
            wide[name].copy_(torch.cat([weight, weight]))
        elif "embed_tokens" in name:
            wide[name].copy_(torch.cat([weight, weight], 1))
        else:
            doubled = _doubled_inputs(weight.cpu(), generator).to(weight)
            wide[name].copy_(doubled if "lm_head" in name else _doubled_outputs(doubled))
    return grown.train()


@torch.no_grad()
def deepened(model: Any) -> Any:
    """A Llama of twice the depth: each layer stands twice in a row. This does change what it computes."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 2 * len(model.model.layers)
    grown = type(model)(config).to(model.device)
    grown.loss_type = model.loss_type
    layers = {name: value for name, value in model.state_dict().items() if ".layers." not in name}
    for number, layer in enumerate(model.model.layers):
        for copied in (2 * number, 2 * number + 1):
            layers |= {f"model.layers.{copied}.{name}": value for name, value in layer.state_dict().items()}
    grown.load_state_dict(layers)
    return grown.train()


class Experts(nn.Module):
    """Copies of one feed-forward, of which a router chooses ``top_k`` for each token, by weights that sum to 1."""

    def __init__(self, feed_forward: nn.Module, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}, expected 1 to the number of experts, {num_experts}")
        self.top_k = top_k
        self.router = nn.Linear(hidden, num_experts, bias=False)
        nn.init.normal_(self.router.weight, std=0.02)
        self.experts = nn.ModuleList(copy.deepcopy(feed_forward) for _ in range(num_experts))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(pieces, letters, hidden) -> the same."""
        tokens = x.flatten(0, -2)
        scores, chosen = self.router(tokens).topk(self.top_k, dim=-1)
        weights, order = scores.softmax(-1).flatten(), chosen.flatten().argsort()  # rows by expert
        loads = chosen.flatten().bincount(minlength=len(self.experts)).tolist()
        rows = tokens[order // self.top_k].split(loads)
        made = torch.cat([expert(own) for expert, own in zip(self.experts, rows, strict=True)])
        return torch.zeros_like(tokens).index_add(0, order // self.top_k, weights[order, None] * made).view_as(x)


def upcycled(model: Any, *, seed: int = 0) -> Any:
    """A copy of the model whose feed-forwards have become four experts, all of them alike: it computes what it did.

    Sparse upcycling (Komatsuzaki et al., arXiv 2212.05055), AquilaMoE's "scale-out".
    """
    torch.manual_seed(seed)
    grown = copy.deepcopy(model)
    for layer in grown.model.layers:
        layer.mlp = Experts(layer.mlp, grown.config.hidden_size, NUM_EXPERTS, TOP_K).to(grown.device)
    return grown


class Grown(Learning):
    """A small model learns, becomes wide and deep, learns, becomes a mixture of experts, and learns on.

    Phases: ``"small"`` (1 layer of width 32), ``"grown"`` (2 of 64), ``"experts"`` (4 of them, 2 per token).

    Parameters
    ----------
    seed
        Of weights and batches.
    num_small_steps, num_grown_steps
        Steps before each change; with 0 of both, the mixture learns from scratch.
    """

    def __init__(self, seed: int, num_small_steps: int, num_grown_steps: int) -> None:
        if num_small_steps < 0 or num_grown_steps < 0:
            raise ValueError(f"{num_small_steps} and {num_grown_steps} steps before a change; expected none below 0")
        generator = meter.reproducible(seed)
        learn, held = english_ids()
        self.seed = seed
        self._left = {"small": num_small_steps, "grown": num_grown_steps}
        small = num_small_steps > 0
        model = language_model(layers=1 if small else 2, hidden=32 if small else 64, seed=seed)
        super().__init__(model, [], pieces(learn, 16, generator), held, phase="small" if small else "grown")
        if not small and not num_grown_steps:
            self._become("experts")
        else:
            self.updates = [adamw(self.model, 4e-3 if small else 2e-3)]

    def _become(self, phase: str) -> None:
        if phase == "grown":
            self.model = deepened(widened(self.model, seed=self.seed))
        else:
            self.model = upcycled(self.model, seed=self.seed)
        self.updates, self.phase = [adamw(self.model)], phase

    def step(self) -> None:
        """One step; after the last one of a phase, the model changes."""
        super().step()
        if self.phase in self._left:
            self._left[self.phase] -= 1
            if not self._left[self.phase]:
                if self.phase == "small":
                    self._become("grown")
                if not self._left["grown"]:
                    self._become("experts")


def growing(num_small_steps: int = 100, num_grown_steps: int = 20) -> Callable[[int], Grown]:
    """A start for the meter."""
    return lambda seed: Grown(seed, num_small_steps, num_grown_steps)
