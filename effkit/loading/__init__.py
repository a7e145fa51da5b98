"""load(path): what others recorded, one file or many ranks, opens as the Capture that a live run gives."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from effkit import trace
from effkit.arguments import described
from effkit.captured import Capture
from effkit.loading.files import Options, load_file
from effkit.loading.fleet import Fleet, joined

_SUFFIXES = (".json", ".json.gz", ".zip", ".pickle", ".pkl")


def load(
    path: str | Path | Sequence[str | Path], *, columns: Sequence[str] = trace.DETAIL_COLUMNS, stacks: bool = False,
    client: Any = None,
) -> Capture:  # fmt: skip
    """Read what PyTorch or :meth:`Capture.save` wrote. Needs neither torch nor a GPU.

    FileNotFoundError when there is nothing at the path. ValueError when a file is something else, or damaged, or holds
    far more than its size lets expect.

    Parameters
    ----------
    path
        A profiler trace (Chrome JSON of ``torch.profiler``, compressed or not), a memory snapshot
        (``torch.cuda.memory._dump_snapshot()``), a saved capture; or a folder or list of these, one per rank (or one
        per cycle of a process whose schedule repeats, as torch's handler names them: they become one).
    columns
        Which of ``effkit.trace.DETAIL_COLUMNS`` to keep beside the nine columns that every event has.
    stacks
        Keep the events of Python functions.
    client
        A ``dask.distributed.Client``: ranks are then read by its workers, which must see the same paths.

    Examples
    --------
    >>> load("traces/").overview()                        # doctest: +SKIP
    >>> load("rank0.pt.trace.json.gz").operators()        # doctest: +SKIP
    >>> load("snapshot.pickle").memory(by="stack")        # doctest: +SKIP
    """
    if isinstance(columns, str):
        columns = [columns]
    if unknown := set(columns) - set(trace.DETAIL_COLUMNS):
        raise ValueError(f"no such column: {', '.join(sorted(unknown))}; there are {', '.join(trace.DETAIL_COLUMNS)}")
    options = Options(tuple(columns), stacks)
    paths = _files(path)
    if len(paths) == 1 and isinstance(path, str | Path) and Path(path).is_file():
        return load_file(paths[0], None, options)
    return joined(paths, options) or Fleet(paths, options, client)


def _files(path: str | Path | Sequence[str | Path]) -> list[Path]:
    given = list(path) if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    if wrong := [each for each in given if not isinstance(each, str | Path)]:
        raise TypeError(f"load() takes a path or a list of paths; given: {described(wrong[0])}")
    paths = list(map(Path, given))
    files = [file for each in paths for file in (_inside(each) if each.is_dir() else [each])]
    absent = next((file for file in files if not file.is_file()), None)
    if absent or not files:
        inner = next(iter(paths[0].glob("*/")), None) if paths and not files else None
        raise FileNotFoundError(
            f"no capture at {absent or path}: give the path of a file that Capture.save() wrote, of a profiler trace, "
            f"of a memory snapshot, or of a folder that holds such files ({', '.join(_SUFFIXES)})"
            + (f", for instance of {inner}" if inner else "")
        )
    times = Counter(file.resolve() for file in files)
    if twice := [file for file in files if times[file.resolve()] > 1]:
        raise ValueError(f"{twice[0]} is listed twice: give the file of each rank once")
    return files


def _inside(folder: Path) -> list[Path]:
    """The captures of a folder, in the order in which people count: rank2 before rank10."""
    captures = (file for file in folder.iterdir() if file.name.endswith(_SUFFIXES))
    return sorted(captures, key=lambda file: re.sub(r"\d+", lambda number: number[0].zfill(20), file.name))
