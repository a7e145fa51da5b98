"""Mixture-of-experts layers of a model, and how its tokens fall on their experts."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from effkit.device import synchronize
from effkit.models.moe import ExpertParallel
from effkit.moe import Setting

Array = np.ndarray[Any, np.dtype[Any]]
ROUNDS = 4  # of a layer's measurement
_SKEWS = np.arange(0.0, 4.001, 0.05)


@dataclass(frozen=True)
class Experts:
    """The expert layers of a model, all of one shape."""

    num_layers: int
    num_experts: int  # of each layer
    top_k: int  # experts that a token is sent to
    hidden: int  # width of the model
    ffn: int  # width of an expert's inside
    num_tokens: int  # of a step
    loads: Array  # tokens on each expert of the most uneven layer, shape [num_steps, num_experts]
    forward_ns: float  # of all layers, per step

    @property
    def popularity(self) -> Array:
        """Share of each expert, over all steps; they sum to 1."""
        return np.asarray(self.loads.sum(axis=0) / self.loads.sum())

    @property
    def skew(self) -> float:
        """The Zipf exponent that comes nearest to the popularity, in the order of popularity."""
        share = np.sort(self.popularity)[::-1]
        ranks = np.arange(1, self.num_experts + 1, dtype="float64")
        errors = [np.square(ranks**-s / (ranks**-s).sum() - share).sum() for s in _SKEWS]
        return float(np.round(_SKEWS[int(np.argmin(errors))], 2))

    def placement(self, num_ranks: int) -> tuple[int, ...]:
        """The rank that holds each expert, the most popular first, when neighbours share a rank.

        >>> Experts(1, 4, 1, 8, 8, 10, np.array([[1, 2, 3, 4]]), 0.0).placement(num_ranks=2)
        (1, 1, 0, 0)
        """
        order = np.argsort(-self.popularity, kind="stable")
        return tuple(int(expert * num_ranks // self.num_experts) for expert in order)

    def setting(self, num_ranks: int) -> Setting:
        """A layer as the MoE lab knows layers: its popularity as the nearest Zipf law, each expert where it is."""
        return Setting(num_tokens=self.num_tokens, hidden=self.hidden, ffn=self.ffn, num_experts=self.num_experts,
                       top_k=self.top_k, skew=self.skew, placement=self.placement(num_ranks))  # fmt: skip


def layers_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules that route tokens to experts: ``models.expert_parallel``, and blocks with a gate and experts."""
    return [module for module in model.modules() if isinstance(module, ExpertParallel)
            or (_gate(module) is not None and hasattr(module, "experts"))]  # fmt: skip


def watched(model: torch.nn.Module, steps: list[Callable[[], object]]) -> Experts | None:
    """Run steps and note where tokens go; None for a model without such layers, or where that does not show."""
    layers = layers_of(model)
    if not layers:
        return None
    counts: list[list[Array]] = [[] for _ in layers]
    chosen: dict[int, int] = {}
    marks: list[int] = []  # begins of calls below 0, ends above it: they sum to the time in these layers

    def before(*_: Any) -> None:
        synchronize()
        marks.append(-time.perf_counter_ns())

    def after(number: int, module: Any, *_: Any) -> None:
        synchronize()
        marks.append(time.perf_counter_ns())
        if isinstance(module, ExpertParallel):
            counts[number].append(module.kept_counts.numpy().copy())
            chosen[number] = module.top_k

    def routed(number: int, _: Any, __: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else ()
        index = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
        if index is not None:
            num = _sizes(layers[number])[0]
            counts[number].append(torch.bincount(index.reshape(-1).cpu(), minlength=num).numpy())
            chosen[number] = index.shape[-1]

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(before).remove)
            hooks.callback(layer.register_forward_hook(partial(after, number)).remove)
            if (gate := _gate(layer)) is not None and not isinstance(layer, ExpertParallel):
                hooks.callback(gate.register_forward_hook(partial(routed, number)).remove)
        for step in steps:
            before_step = [len(of_layer) for of_layer in counts]
            step()
            for of_layer, first in zip(counts, before_step, strict=True):
                if of_layer[first:]:  # micro-batches belong to one step
                    of_layer[first:] = [np.sum(of_layer[first:], axis=0)]
    visible = [number for number, of_layer in enumerate(counts) if of_layer]
    if not visible:
        return None
    worst = max(visible, key=lambda number: float(np.mean([load.max() / load.mean() for load in counts[number]])))
    loads, top_k = np.stack(counts[worst]), chosen[worst]
    num, hidden, ffn = _sizes(layers[worst])
    tokens = round(loads.sum(axis=1).mean() / top_k)
    return Experts(len(layers), num, top_k, hidden, ffn, tokens, loads, sum(marks) / len(steps))


def _gate(module: torch.nn.Module) -> torch.nn.Module | None:
    return next((child for name, child in module.named_children() if name in ("gate", "router")), None)


def _sizes(layer: Any) -> tuple[int, int, int]:
    """Experts, hidden width, inner width."""
    if isinstance(layer, ExpertParallel):
        return layer.num_experts, layer.hidden, int(next(iter(layer.inner.values())).shape[1])
    experts = layer.experts
    num = getattr(experts, "num_experts", None) or len(experts)
    # of a Linear, shape [out, in]
    first = next((parameter for parameter in experts.parameters() if parameter.dim() == 2), None)
    hidden, ffn = (getattr(experts, f"{name}_dim", None) or getattr(experts, f"{name}_size", None)
                   for name in ("hidden", "intermediate"))  # fmt: skip
    if first is not None:
        hidden, ffn = hidden or first.shape[1], ffn or first.shape[0]
    if not hidden or not ffn:
        kind = type(experts).__name__
        raise ValueError(f"the widths of {kind} are not visible: neither attributes nor weights say them")
    return int(num), int(hidden), int(ffn)
