"""Many ranks as one Capture, reduced file by file: here, in processes of this machine, or on a Dask cluster."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pandas as pd
from joblib import Parallel, delayed
from tqdm.auto import tqdm

from effkit import trace
from effkit.captured import Capture, Memory
from effkit.loading.files import SLOW_S, Options, described, kind_of, load_file
from effkit.panes import OF_RANK

Item = TypeVar("Item")
_ALONE_BYTES = 2**25  # below this many bytes on disk starting processes costs more than it saves
_RANK = re.compile(r"(?:rank|worker|gpu)[-_]?(\d+)", re.IGNORECASE)


class Digest(NamedTuple):
    """What the panes need of one rank: small, whatever the size of its trace."""

    overview: Any
    operators: Any
    kernels: Any
    families: Any
    collectives: Any
    memory: Sequence[Mapping[str, Any]]


def digest(path: Path, rank: int, options: Options, step: str | None = None) -> Digest:
    """Read one rank's file and reduce it."""
    one = load_file(path, rank, options)
    parts = {name: of_rank(one.events, *([step] if name == "overview" else [])) for name, of_rank in OF_RANK.items()}
    return Digest(**parts, memory=one.provenance.get("memory", ()))


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
        world = metadata.get("world_size", 0)
        counted = f"{len(paths)} rank{'s' if len(paths) > 1 else ''}"
        seen = {
            "what": counted,
            **metadata,
            "files": {str(rank): path.name for rank, path in zip(ranks, paths, strict=True)},
            "rank_from": how,
            "missing_ranks": sorted(set(range(world)) - set(ranks)) if world else [],
        }
        order = sorted(range(len(ranks)), key=ranks.__getitem__)
        files = [(paths[i], ranks[i]) for i in order]
        vars(self).update(provenance=seen, _files=files, _options=options, _client=client, _cache={})

    @cached_property
    def events(self) -> pd.DataFrame:
        """All events of all ranks, on the clock of the first rank."""
        ahead_ns = self._ahead_ns
        frames = [
            one.events.assign(start_ns=one.events["start_ns"] - ahead_ns.get(rank, 0))
            for (_, rank), one in zip(self._files, self._whole, strict=True)
        ]
        return pd.concat(frames).sort_values("start_ns", kind="stable", ignore_index=True)

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
        return [load_file(path, rank, self._options) for path, rank in _shown(self._files, len(self._files))]

    def _together(self, name: str) -> pd.DataFrame | None:
        frames = [frame for one in self._whole if (frame := getattr(one, name)) is not None]
        return pd.concat(frames, ignore_index=True).rename_axis(name.removesuffix("s")) if frames else None

    @property
    def _ahead_ns(self) -> pd.Series[int]:
        return self.clocks()["offset_ns"].fillna(0).astype("int64")

    def overview(self, step: str | None = None) -> pd.DataFrame:
        frame = super().overview(step)
        ranks = frame.index.get_level_values("rank").to_series(frame.index)
        frame["start_ns"] -= ranks.map(self._ahead_ns).fillna(0).astype("int64")
        return frame

    overview.__doc__ = Capture.overview.__doc__

    def _digests(self, step: str | None = None) -> list[Digest]:
        if step not in self._cache:
            self._cache[step] = list(
                _shown(self._map(partial(digest, options=self._options, step=step)), len(self._files))
            )
        return self._cache[step]

    def _map(self, function: Callable[[Path, int], Digest]) -> Iterable[Digest]:
        """The function of each file, in order: here, in processes of this machine, or where the client has workers."""
        paths, ranks = zip(*self._files, strict=True)
        if self._client is not None:
            return (future.result() for future in self._client.map(function, paths, ranks, pure=False))
        small = sum(path.stat().st_size for path in paths) < _ALONE_BYTES
        workers = 1 if small else min(len(paths), os.cpu_count() or 1)
        return Parallel(n_jobs=workers, return_as="generator", batch_size=1, pre_dispatch="2*n_jobs")(
            delayed(function)(path, rank) for path, rank in self._files
        )

    def _of_ranks(self, pane: str, *options: Any) -> list[Any]:
        digests = self._digests(*options) if options else self._any_digests()
        return [getattr(one, pane) for one in digests]

    def _any_digests(self) -> list[Digest]:
        """Those of any step: only the overview depends on it."""
        return next(iter(self._cache.values()), None) or self._digests()

    def _recorded_memory(self) -> Sequence[Mapping[str, Any]]:
        return [memory for one in self._any_digests() for memory in one.memory]

    def _memory_of(self, device: str | None, rank: int | None) -> Memory:
        chosen = self._chosen_memory(device, rank)
        path = next(path for path, its in self._files if its == chosen["rank"])
        return load_file(path, chosen["rank"], self._options)._memory_of(chosen["device"], None)

    def __repr__(self) -> str:
        p = self.provenance
        return "\n  ".join([
            f"Capture of {p['what']} ({', '.join(map(str, p['files'])) if len(p['files']) < 9 else '…'}), "
            f"known from {p['rank_from']}",
            f"on {p.get('device', 'an unnamed device')}",
            *self._notes(),
        ])  # fmt: skip


def _shown(items: Iterable[Item], total: int) -> Iterable[Item]:
    return tqdm(items, total=total, unit="rank", delay=SLOW_S, leave=False)


def _ranks(paths: Sequence[Path]) -> tuple[list[int], str, dict[str, Any]]:
    """The rank of each file, how it is known, and what the files' metadata says in common."""
    heads = list(map(_head, paths))
    told = [(head.get("distributedInfo") or {}).get("rank") for head in heads]
    named = [found and int(found[1]) for found in (_RANK.search(path.name) for path in paths)]
    common = described(heads[0])
    worlds = {described(head).get("world_size") for head in heads if head}
    if len(worlds) > 1:
        common.pop("world_size", None)
        common["notes"] = ["the files are of different jobs, of unlike numbers of ranks: do not read them as one"]
    for ranks, how in ((told, "the traces' own metadata"), (named, "the files' names")):
        if (numbers := _distinct(ranks)) is not None:
            return numbers, how, common
    return list(range(len(paths))), "the order of the files", common


def _head(path: Path) -> Mapping[str, Any]:
    """What a trace says of itself; nothing for a file of another kind."""
    try:
        return trace.head(path) if kind_of(path) == "trace" else {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a profiler trace: {error}") from error


def _distinct(ranks: Sequence[Any]) -> list[int] | None:
    """The ranks, if each is one, and they all differ."""
    numbers = [int(rank) for rank in ranks if isinstance(rank, int) and rank >= 0]
    return numbers if len(set(numbers)) == len(ranks) else None
