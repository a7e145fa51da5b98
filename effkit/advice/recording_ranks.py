"""record(): every rank of a run writes down a few of its steps, for a study of all of them together."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from effkit.arguments import checked_step, checked_whole
from effkit.recording import trace_of
from effkit.whole_files import replacing

_WARM_UP = 2  # steps that are run and not recorded


def record(folder: str | Path, step: Callable[..., object], loader: Any = None, *, num_steps: int = 4) -> Path:
    """Run a few training steps under the profiler, and write this rank's trace into a folder that all ranks share.

    Call it on every rank: it has no collective of its own, and each rank runs as many steps as the others, whatever
    collectives are in them. Without ``torch.distributed`` this is rank 0. The steps are real ones: the model learns.

    ::

        # train.py, started by torchrun
        ek.advice.record("traces/", step, loader)

        # afterwards, anywhere
        ek.study(trace="traces/").overview()

    TypeError or ValueError when ``step`` cannot be called, ``num_steps`` is less than 1, or the loader is empty.
    RuntimeError when another profiler is active. Errors of ``step`` come through unchanged.

    Parameters
    ----------
    folder
        Where to; it is made if it is absent. A trace that the same rank wrote there before is replaced.
    step
        A training step: ``step(batch)``, or ``step()`` without a loader.
    loader
        What yields batches; begun again where it has too few.
    num_steps
        To record, after 2 that are not.

    Returns
    -------
    Path
        The file of this rank, ``rank<number>.pt.trace.json.gz``: whole, or not there.
    """
    checked_step(step, loader)
    num_steps = checked_whole("num_steps", num_steps, 1)
    batches = None if loader is None else _endless(loader)
    # a batch is drawn inside of the step, so that waiting for it is seen
    trace = trace_of(step if batches is None else lambda: step(next(batches)), warmup=_WARM_UP, steps=num_steps)
    path = Path(folder) / f"rank{_rank()}.pt.trace.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as part:
        part.write_bytes(gzip.compress(trace, mtime=0))
    return path


def _endless(loader: Any) -> Iterator[Any]:
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            raise ValueError("the loader is empty: there is no batch to record a step with")


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    rank = os.environ.get("RANK", "")  # torchrun counts ranks, whether they form a group or not
    return int(rank) if rank.isdecimal() else 0
