"""Levers on what a step is given: batches of like length, larger batches, a loader that keeps up."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler

from effkit import padding
from effkit.account import Account
from effkit.advice.examples import WARM_UP, Examples, collated_to_longest, rebuilt, to_longest, wait_ns
from effkit.advice.levers import LEFT, Lever, banded, limit_bytes
from effkit.advice.training_loop import TrainingLoop
from effkit.padding import EPOCH_CELLS, PEAK, input_lengths, plan_at
from effkit.units import readable

_BUCKETS = (2, 3, 4, 6, 8, 12)
_GROWTHS = (2, 4, 8)
_WORKERS = (1, 2, 4, 8)
_SMALL_FRAC = 0.1  # of a step's time that does not grow with the batch: below it, larger ones gain nothing
_WORTH_TRYING_FRAC = 0.05  # that a first guess has to save
_WAITING_FRAC = 0.03
_LOADER_DOUBT_FRAC = 0.2  # handing batches from process to process, and what else the processors do
_LEAST_DOUBT_FRAC = 0.02  # of a step


def levers(study: TrainingLoop, budget_bytes: int | None) -> list[Lever]:
    """Levers on the batches, where these show lengths, and on the loader, where steps wait for it."""
    examples = study.examples
    if examples is None:
        return []
    levers: list[Lever | None] = []
    if study.epoch is not None and (watched := examples.watched) is not None:
        grouping = next((sentence for sentence in watched.findings if "grouping" in sentence), None)
        if (fixed := watched.fixed_width) is not None:
            levers.append(_padded_to_longest(study, examples, study.epoch, fixed))
        levers += [_bucketed(study, examples, study.epoch, grouping, cut=fixed is not None),
                   _larger(study, examples, study.epoch, grouping, budget_bytes)]  # fmt: skip
    if study.waiting_ns >= _WAITING_FRAC * study.account.total:
        levers.append(_workers(study, examples))
    return [lever for lever in levers if lever is not None]


def _padded_to_longest(study: TrainingLoop, examples: Examples, epoch: Account, fixed: str) -> Lever:
    predicted = padding.predict(epoch, pad_to_multiple_of=1)
    found = f"{fixed} ({_left(epoch):.0%} of the cells are padding, and {_left(predicted):.0%} would be)"
    return _lever(
        study, examples, epoch, predicted, "padding", "pad to the longest row", found,
        "tokenize without padding='max_length', and let the collate function pad: padding='longest'",
        ["batches have different widths: compiled models compile anew, or dynamically"], lambda: _cut(examples.loader),
    )  # fmt: skip


def _lever(
    study: TrainingLoop, examples: Examples, epoch: Account, predicted: Account, kind: str, name: str, found: str,
    code: str, effects: list[str], use: Callable[[], Any],
) -> Lever:  # fmt: skip
    """Other batches of the same examples: those that the padding lab ``predicted`` from ``epoch``."""

    def run() -> Account:
        setting = dict(predicted.setting)
        planned = [examples.batch(batch) for batch in plan_at(epoch, setting).batches]
        if setting.get("pad_to_multiple_of") == 1:
            planned = [to_longest(batch) for batch in planned]
        now, then = ([partial(study.step, batch) for batch in batches] for batches in (study.batches, planned))
        return study.in_turn(now, then)

    # as time per step of the loop as it is
    scale = study.computing_ns / epoch.total
    assert predicted.high is not None
    total = scale * predicted.total + study.waiting_ns
    half = scale * (predicted.high - predicted.total) + _LEAST_DOUBT_FRAC * study.computing_ns
    promised = banded(study.account, {LEFT: round(total)}, total, half, predicted.source, in_range=predicted.in_range)
    return Lever(kind, name, found, study.account, promised, code, tuple(effects), group="batches", use=use,
                 keep=study.receipts.append, run=run)  # fmt: skip


def _cut(loader: Any) -> Any:
    return rebuilt(loader, collate_fn=partial(collated_to_longest, loader.collate_fn))


def _bucketed(
    study: TrainingLoop, examples: Examples, epoch: Account, grouping: str | None, *, cut: bool
) -> Lever | None:
    share = _left(epoch)
    if not share:
        return None
    size = epoch.setting["batch_size"]
    counts = [num for num in _BUCKETS if num * size <= len(examples.items)] or [1]
    wanted = {"strategy": "bucket", "batch_size": size} | ({"pad_to_multiple_of": 1} if cut else {})
    best = min((padding.predict(epoch, num_buckets=num, **wanted) for num in counts), key=lambda one: one.total)
    found = f"{share:.0%} of the input cells are padding, and {_left(best):.0%} would be"
    if _groups(examples.loader) and grouping is not None:
        found = f"{grouping}; in buckets {_left(best):.0%} would be"
    effects = ["batches hold examples of like length"] + ["they are padded to their longest row"] * cut
    before, after = epoch.companion(PEAK).total, best.companion(PEAK).total
    if after > 1.01 * before:
        effects.append(f"the peak rises by {after / before - 1:.0%}")
    num = best.setting["num_buckets"]
    code = (f"plan = padding.plan(padding.lengths(...), 'bucket', batch_size={size}, num_buckets={num})\n"
            "loader = DataLoader(dataset, batch_sampler=plan.batch_sampler(), collate_fn=...)")  # fmt: skip
    return _lever(study, examples, epoch, best, "padding", "batches of like length", found, code, effects,
                  lambda: _loader(_cut(examples.loader) if cut else examples.loader, strategy="bucket",
                                  batch_size=size, num_buckets=num))  # fmt: skip


def _larger(
    study: TrainingLoop, examples: Examples, epoch: Account, grouping: str | None, budget_bytes: int | None
) -> Lever | None:
    overhead = min(1.0, epoch.frame["value"]["step overhead"] / max(1, epoch.total))  # a row is modelled, not timed
    size = epoch.setting["batch_size"]
    sizes = [size * growth for growth in _GROWTHS if 2 * size * growth <= len(examples.items)]
    if overhead < _SMALL_FRAC or not sizes:
        return None
    grouped = _groups(examples.loader) and grouping is None
    strategy: dict[str, Any] = {"strategy": "bucket", "num_buckets": 4} if grouped else {"strategy": "random"}
    limit = limit_bytes(budget_bytes) - study.memory.total + epoch.companion(PEAK).total
    guesses = {larger: padding.predict(epoch, batch_size=larger, **strategy) for larger in sizes}
    fitting = [larger for larger, guess in guesses.items() if guess.companion(PEAK).total <= limit]
    hoped = min((guesses[larger].total for larger in fitting), default=epoch.total)
    if hoped > (1 - _WORTH_TRYING_FRAC) * epoch.total:
        return None
    # beyond what was run so far: a few batches of that size join the calibration
    with study.held():
        calibrated = study.measured_plan(padding.plan(epoch.calibration.plan.lengths, "random", batch_size=fitting[-1]))
    bests = (padding.predict(calibrated, batch_size=larger, **strategy) for larger in fitting)
    best = min(bests, key=lambda one: one.total)
    largest = best.setting["batch_size"]
    effects = [f"{largest // size} times fewer optimizer steps: the learning rate has to follow"]
    grown = best.companion(PEAK).total - epoch.companion(PEAK).total
    if grown > 0:
        effects.append(f"the peak rises by {readable(grown, 'bytes')}, predicted")
    return _lever(
        study, examples, calibrated, best, "batch size", f"batches of {largest}",
        f"{overhead:.0%} of a step of {size} examples does not grow with them",
        f"loader = DataLoader(dataset, batch_size={largest}, ...)", effects,
        lambda: rebuilt(examples.loader, batch_sampler=None, batch_size=largest, sampler=examples.loader.sampler),
    )  # fmt: skip


def _workers(study: TrainingLoop, examples: Examples) -> Lever | None:
    # of the loop, which is run once and does not wait for a quiet moment
    step, load, cpu = study.loop_ns - study.waiting_ns, examples.loading_ns, examples.loading_cpu_ns
    scale = study.account.total / study.loop_ns
    cores = os.cpu_count() or 1
    workers = examples.loader.num_workers

    def predicted(num: int) -> float:
        busy = (step * min(cores, torch.get_num_threads()) + cpu) / cores
        return scale * max(step, load / num, busy)

    times = {num: predicted(num) for num in _WORKERS if num > workers}
    if not times:
        return None
    num = next(num for num, taken in times.items() if taken <= 1.02 * min(times.values()))
    base = study.account
    account = banded(base, {LEFT: round(times[num])}, times[num], _LOADER_DOUBT_FRAC * times[num],
                     "the longest of a step, a share of loading, and all processors' work")  # fmt: skip
    who = f"{workers} processes" if workers else "the training process itself"
    return Lever(
        "data loading", f"{num} loader processes",
        f"a step waits {readable(round(study.waiting_ns), 'ns')} for a batch, which {who} makes in "
        f"{readable(load, 'ns')}",
        base, account, f"loader = DataLoader(dataset, num_workers={num}, persistent_workers=True, ...)",
        (f"{num} more processes, each with its copy of what the dataset holds",),
        run=lambda: _with_workers(study, examples, num), keep=study.receipts.append,
        use=lambda: rebuilt(examples.loader, num_workers=num),
    )  # fmt: skip


def _with_workers(study: TrainingLoop, examples: Examples, num: int) -> Account:
    """The loop over the same batches with other loaders, in turn."""
    loader, groups = examples.loader, [list(group) for group in examples.groups]
    warmed = [*(groups * WARM_UP)[:WARM_UP], *groups]
    fastest: dict[int, float] = {}  # by number of processes
    with study.held():
        study.step(study.batches[0])
        for workers in (loader.num_workers, num) * 2:
            other = rebuilt(loader, batch_sampler=warmed if workers else groups, num_workers=workers,
                            persistent_workers=False)  # fmt: skip
            taken = wait_ns(study.step, other, len(groups))[1]
            fastest[workers] = min(taken, fastest.get(workers, taken))
    whole = study.account.total * fastest[num] / fastest[loader.num_workers]
    return study.relative(1.0, waiting_ns=max(0.0, whole - study.computing_ns))


def _left(predicted: Account) -> float:
    return float(predicted.companion(EPOCH_CELLS).share["padding"])


def _groups(loader: Any) -> bool:
    """Whether this loader has a way of its own to put batches together."""
    usual = RandomSampler, SequentialSampler
    return type(loader.batch_sampler) is not BatchSampler or type(loader.sampler) not in usual


def _loader(loader: Any, **limits: Any) -> Any:
    """A DataLoader over the whole dataset in batches of like length: every example is read once for its length."""
    lengths = [int(np.asarray(input_lengths(loader.collate_fn([loader.dataset[i]]))[0])[0])
               for i in range(len(loader.dataset))]  # fmt: skip
    planned = padding.plan(pd.DataFrame({"input_length": lengths}), **limits)
    return rebuilt(loader, batch_sampler=planned.batch_sampler())
