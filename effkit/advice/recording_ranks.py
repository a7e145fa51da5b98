"""Every rank of a run writes down a few of its steps, for a study of all of them together."""

from __future__ import annotations

import atexit
import gc
import gzip
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from effkit.advice.recorded_study import RecordedStudy
from effkit.advice.studies import Study
from effkit.arguments import checked_step, checked_whole
from effkit.recording import steps_traced, trace_of
from effkit.whole_files import replacing

_WARM_UP = 2  # steps that are run and not recorded
_PATIENCE_S = 30.0  # with ranks whose files have not come when training has ended: their disk may be another


def record(folder: str | Path, step: Callable[..., object], loader: Any = None, *, num_steps: int = 4) -> Path:
    """Run a few training steps under the profiler, and write this rank's trace, with its memory, into a shared folder.

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
        Where to; it is made if it is absent. The file of this rank, whose path is returned, is
        ``rank<number>.pt.trace.json.gz``: whole, or not there. One that the same rank wrote there before is replaced.
    step
        A training step: ``step(batch)``, or ``step()`` without a loader.
    loader
        What yields batches; begun again where it has too few.
    num_steps
        To record, after 2 that are not.
    """
    checked_step(step, loader)
    num_steps = checked_whole("num_steps", num_steps, 1)
    batches = None if loader is None else _endless(loader)
    # a batch is drawn inside of the step, so that waiting for it is seen
    run = step if batches is None else lambda: step(next(batches))
    trace = trace_of(run, warmup=_WARM_UP, steps=num_steps, memory=True)
    return _written(_file(folder, place()[0]), trace)


class RankRecording:
    """This rank's part in a recording of the steps that a trainer takes anyway. It has no collective of its own.

    It begins when it is made; ``step_taken()`` has to follow each step, and ``finish()`` the last. Errors of the
    profiler and of the disk come through; then there is no file of this rank, and rank 0 says so on its page.
    """

    def __init__(self, folder: Path, num_steps: int, rank: int, num_ranks: int) -> None:
        self._folder, self._rank, self._num_steps = folder, rank, num_steps
        self._files = [_file(folder, number) for number in range(num_ranks)]
        self._files[rank].unlink(missing_ok=True)  # of an earlier run: rank 0 would take it for one of this
        if _profiled():
            raise RuntimeError("another profiler is at work, and there can be but one")
        self._steps: Any = steps_traced(warmup=_WARM_UP, steps=num_steps, memory=True, give_way=self.close)
        next(self._steps)
        atexit.register(self.close)  # a process that ends while it is recorded would end by SIGSEGV

    def step_taken(self) -> None:
        """One more step of this rank is done."""
        steps, self._steps = self._steps, None
        if steps is not None:
            if (trace := next(steps)) is None:
                self._steps = steps
            else:
                _written(self._files[self._rank], trace)

    def finish(self) -> Study | None:
        """On rank 0, the study of all ranks, whose page is then beside their traces; None on the others.

        RuntimeError when rank 0 has no trace.
        """
        self.close()
        if self._rank:
            return None
        if not self._files[0].is_file():
            raise RuntimeError(f"there is no trace of rank 0: that takes {_WARM_UP} steps to warm up and "
                               f"{self._num_steps} to record, and no other profiler that begins meanwhile")  # fmt: skip
        end = time.monotonic() + _PATIENCE_S
        while not all(file.is_file() for file in self._files) and time.monotonic() < end:
            time.sleep(0.1)
        study = RecordedStudy([file for file in self._files if file.is_file()], None)
        study.report(self._folder / "report.html")
        return study

    def close(self) -> None:
        """Record no more."""
        atexit.unregister(self.close)
        steps, self._steps = self._steps, None
        if steps is not None:
            steps.close()


def place() -> tuple[int, int]:
    """This process's rank, and the number of ranks in its group: 1 where it is in none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    rank = os.environ.get("RANK", "")  # torchrun counts ranks, whether they form a group or not
    return int(rank) if rank.isdecimal() else 0, 1


def _profiled() -> bool:
    """Whether a profiler is at work, or warms up: torch does not tell, and ends a process that starts a second one."""
    kind = torch.autograd.profiler.profile
    return any(type(one) is kind and one.entered and one.kineto_results is None for one in gc.get_objects())


def _file(folder: str | Path, number: int) -> Path:
    return Path(folder) / f"rank{number}.pt.trace.json.gz"


def _written(path: Path, trace: bytes) -> Path:
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
