"""pipeline(): the peak of each rank that holds some of a model's blocks, by a formula over one replay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn

from effkit.activations.checkpointing import blocks
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import complete, parted
from effkit.activations.live import check_trains
from effkit.activations.timeline import Timeline
from effkit.arguments import checked_whole
from effkit.progress_bar import working
from effkit.training import Loss, MakeOptimizer

_STATE = "optimizer state"


@working("Forecasting the stages of a pipeline")
def pipeline(
    model: nn.Module, batch_like: Any, *, num_stages: int, num_micro_batches: int, num_chunks: int = 1,
    loss: Loss | None = None, optimizer: MakeOptimizer | None = None, device: str | None = None, **setting: Any,
) -> pd.DataFrame:  # fmt: skip
    """What each rank of a pipeline needs, in the schedule 1F1B, from one replay of two micro-batches on one process.

    Rank i of p runs forward p - i times before its first backward, and keeps that many micro-batches; with v chunks
    2 (p - i - 1) + (v - 1) p + 1 micro-batches of a chunk each (Narayanan et al., arXiv 2104.04473). Its peak is what
    it holds all through a step, what all but one of these save for backward, and the fullest moment of its part of one
    more: of the first, or of a later one beside the gradients; or of the optimizer's step. What stages send each other
    is in it once. ValueError for blocks that run more than once, or in another order than the model holds them.

    Parameters
    ----------
    model, batch_like, loss, optimizer, device
        As in :func:`forecast`; ``batch_like`` is one micro-batch.
    num_stages
        Ranks, each with as many of the model's :func:`blocks` as another, or one more. What comes before all blocks is
        on the first, what comes after a block on that block's rank, and a parameter that several ranks use on each.
    num_micro_batches
        Of a step.
    num_chunks
        Parts of the model on each rank, in turn (interleaved 1F1B).
    setting
        As in :func:`predict`; of a micro-batch, on ranks that share nothing else.

    Returns
    -------
    DataFrame
        By ``rank``: ``blocks`` (numbers of them, as a text), ``parameter_bytes``, ``held_bytes`` (with gradients and
        optimizer states), ``in_flight`` [micro-batches of a chunk], ``saved_bytes`` of one of these, ``peak_bytes``.
        ``attrs["idle_frac"]`` is the share of a step in which a rank waits, (p - 1) / (v m + p - 1), where all stages
        take equally long.
    """
    check_trains(model, loss, optimizer, None, runs=False)
    p, m, v = (checked_whole(name, value, 1) for name, value in (
        ("num_stages", num_stages), ("num_micro_batches", num_micro_batches), ("num_chunks", num_chunks)))  # fmt: skip
    parts = blocks(model)
    if p * v > len(parts):
        raise ValueError(f"{p} stages of {v} chunks take {p * v} blocks or more; this model has {len(parts)}")
    if v > 1 and m % p:
        raise ValueError(f"chunks take turns where the stages divide the micro-batches; given: {p} and {m}")
    forecaster = Forecaster(model, batch_like, loss=loss, optimizer=optimizer, device=device)
    size, levers = parted(complete(forecaster.rest(), setting))
    if levers.world_size > 1 or levers.micro_batches > 1:
        raise ValueError("a stage is forecast on its own: leave out world_size and micro_batches")
    step = forecaster.timeline(replace(size, num_rows=2 * size.num_rows), replace(levers, micro_batches=2))
    *firsts, _ = bounds = [number * len(parts) // (p * v) for number in range(p * v + 1)]
    names = {id(module): name for name, module in model.named_modules()}
    chunks = _chunks(step, [names[id(part)] for part in parts], firsts)
    parameters = _parameters(model, [parts[first] for first in firsts])
    updating = step.levels()[:, step.segments[-1].first :].sum(axis=0).max() - sum(step.resident_bytes.values())
    trained = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    rows = []
    for rank in range(p):
        own = range(rank, p * v, p)
        held_by, learning = (sum(parameters[chunk][what] for chunk in own) for what in (0, 1))
        share = learning / trained
        held = held_by + learning + share * step.resident_bytes.get(_STATE, 0) + step.resident_bytes.get("input", 0)
        flying = min(m * v, p - rank if v == 1 else 2 * (p - rank - 1) + (v - 1) * p + 1)
        saved, first, later = (np.mean([chunks[chunk][what] for chunk in own]) for what in (0, 1, 2))
        beside = flying - 1 - (flying == m * v)  # beside a later backward; where all were in flight, one has gone
        full = max((flying - 1) * saved + first - learning, beside * saved + later if m * v > 1 else 0)
        peak = held + max(full, share * (updating - trained))
        which = ", ".join(f"{bounds[chunk]} to {bounds[chunk + 1] - 1}" for chunk in own)
        rows.append((which, held_by, round(held), flying, round(saved), round(peak)))
    columns = ["blocks", "parameter_bytes", "held_bytes", "in_flight", "saved_bytes", "peak_bytes"]
    frame = pd.DataFrame(rows, columns=columns).rename_axis("rank")
    frame.attrs["idle_frac"] = (p - 1) / (v * m + p - 1)
    return frame


def _chunks(step: Timeline, names: list[str], firsts: list[int]) -> list[tuple[int, int, int]]:
    """Bytes that each chunk saves for backward, its fullest moment in the first micro-batch, and in the second, beyond
    the gradients of the first; ``firsts`` are the numbers of the blocks that chunks begin with."""
    starts, modules = [segment.first for segment in step.segments], step.allocations["module"]
    inside = [((modules == name) | modules.str.startswith(f"{name}.")).to_numpy() for name in names]
    early, late = (_fullest(step, inside, firsts, *starts[begin : begin + 3]) for begin in (0, 2))
    return [(saved, first, later) for (_, first), (saved, later) in zip(early, late, strict=True)]


def _fullest(step: Timeline, inside: list[Any], firsts: list[int], *passes: int) -> Iterator[tuple[int, int]]:
    """The same of one micro-batch: its forward, its backward and what follows begin with the operators ``passes``."""
    (forward, backward, after), frame = passes, step.allocations
    born, died, sizes = (frame[column].to_numpy() for column in ("birth", "death", "size_bytes"))
    kept = (born >= forward) & (born < backward) & (died > backward)
    births = [np.sort(born[one & kept]) for one in inside]
    if not all(len(births[first]) for first in firsts[1:]):
        raise ValueError("a block that saves nothing for backward, as a frozen one, cannot begin a stage")
    # a block's input may be older than what the block before saves last; most of what a block saves is not
    if any(one[-1] > other[(len(other) - 1) // 2] for one, other in pairwise(filter(len, births))):
        raise ValueError("a pipeline takes blocks that run once, in the order in which the model holds them")
    begins = [forward, *(int(births[first][0]) for first in firsts[1:]), backward]
    ends = [after, *(int(died[inside[first] & kept].max()) for first in firsts[1:]), backward]
    for parts in zip(pairwise(begins), (pair[::-1] for pair in pairwise(ends)), strict=True):
        own, over = (np.any([(when >= begin) & (when < end) for begin, end in parts], axis=0) for when in (born, died))
        summed = np.flatnonzero(over & (born < forward))  # gradients that give way to their sums
        gone = tuple(("gradient", int(died[i]), int(sizes[i])) for i in summed)
        level = replace(step, allocations=frame[own], resident_bytes={}, let_go=gone).levels().sum(axis=0)
        yield int(sizes[own & kept].sum()), int(max(level[slice(*part)].max() for part in parts))


def _parameters(model: nn.Module, begins: list[nn.Module]) -> list[tuple[int, int]]:
    """Bytes of the parameters of each chunk, and of those that learn: from the block that it begins with to the next
    such; the first has what stands before all blocks too."""
    held: list[dict[int, torch.Tensor]] = [{} for _ in begins]
    chunk = 0
    for _, module in model.named_modules(remove_duplicate=False):
        chunk = begins.index(module) if module in begins else chunk
        held[chunk].update({id(one): one for one in module.parameters(recurse=False)})
    return [(sum(one.nbytes for one in of_one.values()),
             sum(one.nbytes for one in of_one.values() if one.requires_grad)) for of_one in held]  # fmt: skip
