"""A training that runs out of a GPU's memory says in one sentence who asked for more, and who held most."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from effkit.loading import load

_MOST_EVENTS = 100_000  # of the allocator, the latest


class MemoryHistory:
    """What the CUDA allocator did last, kept while a training runs, and written to ``path`` when memory runs out.

    RuntimeError where there is no CUDA device: torch keeps the history of no other memory.
    """

    def __init__(self, path: Path) -> None:
        if not torch.cuda.is_available():
            raise RuntimeError("memory_history=True takes a CUDA device: torch keeps the history of no other memory")
        self._path, self._ended = path, False
        torch.cuda.memory._record_memory_history(max_entries=_MOST_EVENTS)
        observe: Any = torch._C  # types of a build for the CPU do not have it
        observe._cuda_attach_out_of_memory_observer(self._ran_out)  # for good: it cannot be detached

    def close(self) -> None:
        """Keep no more."""
        self._ended = True
        torch.cuda.memory._record_memory_history(enabled=None)

    def _ran_out(self, *_: int) -> None:
        """Called by torch before it raises, while all that is in memory is still there."""
        if self._ended:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            torch.cuda.memory._dump_snapshot(str(self._path))
            full = load(self._path).out_of_memory(by="category")
            said = f"{full.title}, by {full.source}. effkit.load({str(self._path)!r}).out_of_memory() has it all"
        except Exception as error:  # torch's own error is the one to raise
            said = f"out of memory, and no snapshot of it: {type(error).__name__}: {error}"
        warnings.warn(said, stacklevel=2)
