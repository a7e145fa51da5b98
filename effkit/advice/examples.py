"""The examples behind a loader: which came in which batch, how long each is, and batches of any of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from effkit.advice.probing import Step
from effkit.device import synchronize
from effkit.padding import Plan, Watch, real_rows, watch
from effkit.restoring import remembered

DELIVERED = "as delivered"
WARM_UP = 4  # batches, of a loader with processes


@dataclass(frozen=True, eq=False)
class Examples:
    """Examples that a map-style DataLoader would deliver, in its order."""

    loader: DataLoader[Any]
    items: Sequence[Any]  # the examples, as the dataset gave them
    groups: tuple[tuple[int, ...], ...]  # their numbers in the dataset, batch by batch
    watched: Watch | None  # what the batches show: lengths, padding; None where they show neither masks nor lengths
    why_unseen: str
    loading_ns: int  # wall time to make one batch in this process
    loading_cpu_ns: int  # processor time of the same

    @property
    def sizes(self) -> list[int]:
        """Rows of each batch."""
        return [len(group) for group in self.groups]

    def batch(self, rows: Iterable[int]) -> Any:
        """The examples with these numbers, put together as the loader does."""
        return self.loader.collate_fn([self.items[int(i)] for i in rows])

    def make_batch(self, rows: Sequence[Any], _: pd.DataFrame) -> Any:
        """As the padding lab asks for it: where every batch has one width, others than those delivered are cut, since
        what a step costs at other widths is to be found."""
        numbers = np.concatenate(list(rows)).tolist()
        whole = numbers in map(list, self._delivered)
        batch = self.batch(numbers)
        return batch if whole or self.watched is None or self.watched.fixed_width is None else to_longest(batch)

    @property
    def batches(self) -> list[Any]:
        """The batches as they were delivered."""
        return [self.batch(rows) for rows in self._delivered]

    @property
    def _delivered(self) -> list[range]:
        return [range(a, b) for a, b in pairwise(np.cumsum([0, *self.sizes]).tolist())]

    @property
    def plan(self) -> Plan:
        """The batches as a plan of the padding lab.

        ValueError when no lengths are visible.
        """
        if self.watched is None:
            raise ValueError(self.why_unseen)
        order, starts = np.arange(len(self.items)), np.cumsum([0, *self.sizes[:-1]])
        usual = int(np.median(self.sizes))
        limits = {"batch_size": usual} | (self.watched.padded_to or {})
        return Plan(self.watched.lengths, DELIVERED, limits, order, None, starts,
                    np.zeros(len(starts), dtype="int64"))  # fmt: skip


def why_not_drawn(loader: Any) -> str | None:
    """Why examples of this loader cannot be put together in another way; None where they can."""
    if not isinstance(loader, DataLoader):
        return f"the loader is a {type(loader).__name__}, not a DataLoader: its batches cannot be put together anew"
    if isinstance(loader.dataset, IterableDataset):
        return "the dataset is a stream: its batches cannot be put together anew"
    if loader.batch_sampler is None:
        return "the loader has no batch sampler: its batches cannot be put together anew"
    return None


def drawn(loader: DataLoader[Any], num_batches: int) -> Examples:
    """The first batches that the loader's sampler names, made in this process."""
    with remembered(loader):
        groups = [list(group) for group in islice(iter(loader.batch_sampler), num_batches)]  # type: ignore[arg-type]
    if not groups:
        raise ValueError("the loader is empty: there is no batch to study")
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    fetch = getattr(loader.dataset, "__getitems__", None)
    items: list[Any] = []
    made = []
    for group in groups:
        fetched = list(fetch(group)) if fetch else [loader.dataset[i] for i in group]
        made.append(loader.collate_fn(fetched))
        items += fetched
    loading = (time.perf_counter_ns() - wall) // len(groups), (time.process_time_ns() - cpu) // len(groups)
    watched, why = watch(made), ""
    try:
        if sum(map(len, groups)) != len(watched.run().lengths):
            why = "the batches have other rows than their examples: padding is not visible"
        elif watched.padded_to is None:
            why = "rows are wider than the longest, by no multiple: what padding costs is not visible"
    except ValueError as error:
        why = str(error)
    return Examples(loader, items, tuple(map(tuple, groups)), None if why else watched, why, *loading)


def wait_ns(step: Step, loader: Any, num_batches: int) -> tuple[float, float]:
    """Run over a loader: what a step waits for it, and the whole loop per step [ns].

    The first batches are not counted where processes prepare them: these have to start, and memory that was shared when
    they did is copied page by page.
    """
    aside = WARM_UP if getattr(loader, "num_workers", 0) else 0
    iterator, taken = iter(loader), list[tuple[int, int]]()
    for _ in range(num_batches + aside):
        begun = time.perf_counter_ns()
        if (batch := next(iterator, None)) is None:
            break
        waited = time.perf_counter_ns() - begun
        step(batch)
        synchronize()
        taken.append((waited, time.perf_counter_ns() - begun))
    waits, whole = np.reshape(taken[aside:], (-1, 2)).sum(axis=0) / max(1, len(taken) - aside)
    return float(waits), float(whole)


def to_longest(batch: Any) -> Any:
    """A batch without the cells beyond its longest row: all dimensions as wide as its rows are cut, of every tensor."""
    real = real_rows(batch)
    first, last = np.flatnonzero(real.any(axis=0))[[0, -1]].tolist()

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        for axis in range(1, tensor.ndim):
            if tensor.shape[axis] == real.shape[1]:
                tensor = tensor.narrow(axis, first, last + 1 - first)
        return tensor.contiguous()

    return tree_map_only(torch.Tensor, cut, dict(batch) if hasattr(batch, "keys") else batch)


def collated_to_longest(collate: Callable[[list[Any]], Any], items: list[Any]) -> Any:
    """What a collate function makes, cut to its longest row."""
    return to_longest(collate(items))


def rebuilt(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """The same loader with other arguments: ``batch_sampler``, ``num_workers``, ``batch_size``, …"""
    arguments: dict[str, Any] = {
        "batch_sampler": loader.batch_sampler, "num_workers": loader.num_workers, "collate_fn": loader.collate_fn,
        "pin_memory": loader.pin_memory, "timeout": loader.timeout, "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context, "generator": loader.generator,
        "drop_last": loader.drop_last if changes.get("batch_size") else False,
    } | changes  # fmt: skip
    if arguments["num_workers"]:
        arguments = {"prefetch_factor": loader.prefetch_factor, "persistent_workers": True} | arguments
    return DataLoader(loader.dataset, **arguments)
