"""Many ranks as one Capture, reduced file by file: here, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from effkit import trace
from effkit.captured import Capture, Memory
from effkit.loading.files import Options, described, kind_of, load_file
from effkit.panes import OF_RANK, breakdown, tables
from effkit.progress_bar import advance, working

_ALONE_BYTES = 2**25  # below this many bytes on disk starting processes costs more than it saves
_LEAST_BYTES = 2**20  # a file of less takes as long as one of so many
_RANK = re.compile(r"(?:rank|worker|gpu)[-_]?(\d+)", re.IGNORECASE)
_PARALLEL = re.compile(r"(?<![a-z])(dp|pp|tp|ep)[-_]?(\d+)", re.IGNORECASE)  # in names that SGLang and vLLM give
_OF_A_WORKER = re.compile(r"(.+)\.\d+\.pt\.trace\.json(?:\.gz)?")  # as torch's handler names what a process recorded
_BY_ORDER = "the order of the files"


Digest = Mapping[str, Any]  # what the panes need of one rank: small, whatever the size of its trace


def digest(path: Path, rank: int, options: Options, step: str | None = None) -> Digest:
    """Read one rank's file and reduce it."""
    capture = load_file(path, rank, options)
    events = breakdown.of_steps(capture.events, *options.in_steps) if options.in_steps else capture.events
    each = tables.each_operator(events)  # which two panes begin with
    given: dict[str, list[Any]] = {"overview": [step], "operators": [each], "families": [each]}
    parts = {name: of_rank(events, *given.get(name, [])) for name, of_rank in OF_RANK.items()}
    return parts | {"memory": capture.provenance.get("memory", ())}


def joined(paths: Sequence[Path], options: Options) -> Capture | None:
    """What one process recorded in stretches, one after another, as one Capture; None for other files. Its memory is
    that of the stretch with the highest peak: what was freed between them is in no file."""
    if len(paths) == 1 or len({(_OF_A_WORKER.fullmatch(path.name) or [0, path])[1] for path in paths}) > 1:
        return None
    parts = sorted((load_file(path, None, options) for path in paths), key=lambda part: part.events["start_ns"].min())
    events = pd.concat([part.events for part in parts], ignore_index=True)
    apart = all(one.events["start_ns"].max() <= other.events["start_ns"].min() for one, other in pairwise(parts))
    if not apart or events["rank"].nunique() > 1 or any(part.steps.empty for part in parts):
        return None
    peaks = [[(each["device"] != "cpu", each["peak_bytes"]) for each in part._recorded_memory()] for part in parts]
    fullest = parts[peaks.index(max(peaks, key=lambda of_part: max(of_part, default=(False, 0))))]
    memory = "" if fullest.allocations is None else f", the memory of {fullest.provenance['what']}"
    what = f"{len(parts)} stretches of one process{memory}"
    told = {"what": what, "left_out": [words for part in parts for words in part.provenance.get("left_out", ())]}
    return Capture(events, fullest.allocations, {**fullest.provenance, **told}, fullest.segments)


class Fleet(Capture):
    """Many ranks as one Capture: each file is read, reduced to the small frames of the panes, and let go.

    ``events``, ``allocations`` and ``segments`` read all files into memory, when they are first asked for.
    """

    _files: list[tuple[Path, int]]
    _options: Options
    _client: Any
    _cache: dict[str | None, list[Digest]]

    def __init__(self, paths: Sequence[Path], options: Options, client: Any = None) -> None:
        ranks, how, metadata = _ranks(paths)
        provenance = {
            "what": f"{len(paths)} rank{'s' if len(paths) > 1 else ''}",
            **metadata,
            "files": {str(rank): path.name for rank, path in zip(ranks, paths, strict=True)},
            "rank_from": how,
            "missing_ranks": sorted(set(range(metadata.get("world_size", 0))) - set(ranks)),
        }
        files = sorted(zip(paths, ranks, strict=True), key=lambda file: file[1])
        vars(self).update(provenance=provenance, _files=files, _options=options, _client=client, _cache={})
        if how.startswith(_BY_ORDER) and len(paths) > 1 and (apart := _apart(super().overview())):
            one, other = (next(path.name for path, rank in files if rank == each) for each in apart)
            raise ValueError(f"neither metadata nor names tell the ranks of {len(paths)} files, and {one} ends before "
                             f"{other} begins: they are stretches of one rank, or runs of their own. Load one of them, "
                             "or write each one's rank into its name (rank0, rank1, …)")  # fmt: skip

    @cached_property
    def events(self) -> pd.DataFrame:
        """All events of all ranks, on the clock of the first rank."""
        events = pd.concat([capture.events for capture in self._whole], ignore_index=True)
        events["start_ns"] -= events["rank"].map(self._ahead_ns).fillna(0).astype("int64")
        return events.sort_values("start_ns", kind="stable", ignore_index=True)

    @cached_property
    def allocations(self) -> pd.DataFrame | None:
        """All allocations of all ranks, each by its own clock."""
        return self._together("allocations")

    @cached_property
    def segments(self) -> pd.DataFrame | None:
        """All reserved memory of all ranks, each by its own clock."""
        return self._together("segments")

    @cached_property
    def _whole(self) -> list[Capture]:
        return _counted((load_file(path, rank, self._options) for path, rank in self._files), len(self._files))

    def _together(self, name: str) -> pd.DataFrame | None:
        frames = [frame for capture in self._whole if (frame := getattr(capture, name)) is not None]
        return pd.concat(frames, ignore_index=True).rename_axis(name.removesuffix("s")) if frames else None

    @property
    def _ahead_ns(self) -> pd.Series[int]:
        return self.clocks()["offset_ns"].fillna(0).astype("int64")

    def overview(self, step: str | None = None) -> pd.DataFrame:
        frame = super().overview(step)
        if apart := _apart(frame):
            words = "by the files' clocks rank {} ends before rank {} begins: these are no ranks of one run"
            frame.attrs["notes"].append(words.format(*apart))
        ranks = frame.index.get_level_values("rank").to_series(frame.index)
        frame["start_ns"] -= ranks.map(self._ahead_ns).fillna(0).astype("int64")
        return frame

    overview.__doc__ = Capture.overview.__doc__

    def _in_steps(self, step: str | None = None) -> Capture:
        inside = copy(self)  # for its panes
        vars(inside).update(_options=self._options._replace(in_steps=(step,)), _cache={})
        return inside

    def _digests(self, step: str | None = None) -> list[Digest]:
        if step not in self._cache:
            digests = self._map(partial(digest, options=self._options, step=step))
            self._cache[step] = _counted(digests, len(self._files))
        return self._cache[step]

    def _map(self, function: Callable[[Path, int], Digest]) -> Iterable[Digest]:
        """The function of each file, in order: here, in processes of this machine, or where the client has workers."""
        paths, ranks = zip(*self._files, strict=True)
        from joblib import Parallel, delayed  # only where there are many

        if self._client is not None:
            return (future.result() for future in self._client.map(function, paths, ranks, pure=False))
        small = sum(max(_LEAST_BYTES, path.stat().st_size) for path in paths) < _ALONE_BYTES
        workers = 1 if small else min(len(paths), os.cpu_count() or 1)
        return Parallel(n_jobs=workers, return_as="generator", batch_size=1, pre_dispatch="2*n_jobs")(
            delayed(function)(path, rank) for path, rank in self._files
        )

    def _of_ranks(self, pane: str, *options: Any) -> list[Any]:
        # only the overview, which is given its step, depends on it: the others are of any
        read = None if options else next(iter(self._cache.values()), None)
        return [digest[pane] for digest in read or self._digests(*options)]

    def _recorded_memory(self) -> Sequence[Mapping[str, Any]]:
        return [memory for of_rank in self._of_ranks("memory") for memory in of_rank]

    def _memory_of(self, device: str | None, rank: int | None) -> Memory:
        chosen = self._chosen_memory(device, rank)
        path = next(path for path, rank_of_file in self._files if rank_of_file == chosen["rank"])
        return load_file(path, chosen["rank"], self._options)._memory_of(chosen["device"], None)

    def __repr__(self) -> str:
        p = self.provenance
        ranks = ", ".join(p["files"]) if len(p["files"]) < 9 else "…"
        first = f"Capture of {p['what']} ({ranks}), known from {p['rank_from']}"
        return "\n  ".join([first, f"on {p.get('device', 'an unnamed device')}", *self._notes()])


def _counted(items: Iterable[Any], total: int) -> list[Any]:
    read = []
    with working("Reading ranks"):
        for item in items:
            read.append(item)
            advance(len(read), total)
    return read


def _ranks(paths: Sequence[Path]) -> tuple[list[int], str, dict[str, Any]]:
    """The rank of each file, how it is known, and what the files' metadata says in common."""
    heads = list(map(_head, paths))
    recorded = [(head.get("distributedInfo") or {}).get("rank") for head in heads]
    named = [match and int(match[1]) for match in (_RANK.search(path.name) for path in paths)]
    common = described(heads[0])
    if len({described(head).get("world_size") for head in heads if head}) > 1:
        common.pop("world_size", None)
        common["notes"] = ["the files are of different jobs, of unlike numbers of ranks: do not read them as one"]
    grouped = (_places(paths), "the parallel groups in the files' names")
    for ranks, how in ((recorded, "the traces' own metadata"), (named, "the files' names"), grouped):
        numbers = [int(rank) for rank in ranks if isinstance(rank, int) and rank >= 0]
        if len(set(numbers)) == len(ranks):
            return numbers, how, common
    told = [rank for rank in recorded if rank is not None]
    twice = ", for several say that they are one rank" if len(set(told)) < len(told) else ""
    return list(range(len(paths))), _BY_ORDER + twice, common


def _places(paths: Sequence[Path]) -> list[int | None]:
    """Ranks by the parallel groups that serving engines write into names: of tensors, else in the order of them all."""
    places = [{word.lower(): int(number) for word, number in _PARALLEL.findall(path.name)} for path in paths]
    tensor = [place.get("tp") for place in places]
    if len(set(tensor)) == len(paths):
        return tensor
    grid = [tuple(place.get(word, -1) for word in ("dp", "pp", "tp", "ep")) for place in places]
    numbers = {place: number for number, place in enumerate(sorted(set(grid)))}
    return [numbers[place] if any(places) else None for place in grid]


def _apart(frame: pd.DataFrame) -> tuple[int, int] | None:
    """Two ranks of an overview of which one ends before the other begins; None where all share some time."""
    ends = (frame["start_ns"] + frame["dur_ns"]).groupby(level="rank").max()
    starts = frame["start_ns"].groupby(level="rank").min()
    return (int(ends.idxmin()), int(starts.idxmax())) if len(ends) and ends.min() < starts.max() else None


def _head(path: Path) -> Mapping[str, Any]:
    try:
        return trace.head(path) if kind_of(path) == "trace" else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a profiler trace: {error}") from error
