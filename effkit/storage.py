"""The file of a Capture: a zip of capture.json and one CSV per frame. Nothing in it is code."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pandas as pd
from pandas.api.types import is_integer_dtype

from effkit import snapshot, trace
from effkit.whole_files import checked_place, replacing

Frames = dict[str, pd.DataFrame]

FORMAT = "effkit capture"
VERSION = 1
_LARGEST_BYTES = 4 * 2**30  # what a saved capture may unpack to
_EPOCH = (1980, 1, 1, 0, 0, 0)  # zip entries carry no clock, so that equal captures are equal files
_LARGEST_HEADER = 2**24
_MOST_COLUMNS = 1000  # of a frame
_DENSEST = 200  # times that an entry may unpack; tables of numbers and names stay far below
FRAMES: Mapping[str, tuple[str, ...]] = {
    "events": trace.EVENT_COLUMNS,
    "allocations": snapshot.ALLOCATION_COLUMNS,
    "segments": snapshot.SEGMENT_COLUMNS,
}
_MAY_LACK_TEXT = {*trace.DETAIL_COLUMNS, "stack"}  # of other columns an empty text is a text
_WHOLE = re.compile(r"_ns$|_bytes$|^(?:rank|stream|correlation)$")  # columns of whole numbers


_Whole = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]


class _OutOfMemory(msgspec.Struct):
    asked_bytes: _Whole
    device_free_bytes: _Whole
    time_ns: _Whole
    stack: str | None


class _Memory(msgspec.Struct):
    rank: _Whole
    device: str
    peak_bytes: _Whole
    peak_source: str
    oom: _OutOfMemory | None = None
    peak: str = ""
    clock: str = ""


class _Provenance(msgspec.Struct):
    """What is read of a provenance, that somebody else may have written."""

    memory: list[_Memory] = []
    missing_ranks: list[_Whole] = []
    left_out: list[str] = []
    notes: list[str] = []
    world_size: Annotated[int, msgspec.Meta(ge=1, lt=2**20)] | None = None
    settings: dict[str, Any] | None = None


def write(path: Path, frames: Mapping[str, pd.DataFrame], provenance: Mapping[str, Any]) -> Path:
    """Write the file, whole or not at all; equal content makes equal bytes."""
    columns = {name: {c: str(t) for c, t in frame.dtypes.items()} for name, frame in frames.items()}
    header = {"format": FORMAT, "version": VERSION, "provenance": dict(provenance), "columns": columns}
    path.parent.mkdir(parents=True, exist_ok=True)
    checked_place(path, "capture.zip")
    tables = ((f"{name}.csv", frame.to_csv(index=False, lineterminator="\n")) for name, frame in frames.items())
    texts = chain([("capture.json", json.dumps(header, indent=1, sort_keys=True, default=str))], tables)
    with replacing(path) as part, zipfile.ZipFile(part, "w") as archive:
        for name, text in texts:
            archive.writestr(zipfile.ZipInfo(name, date_time=_EPOCH), text, compress_type=zipfile.ZIP_DEFLATED)
    return path


def read(path: Path) -> tuple[Frames, dict[str, Any]]:
    """The frames and the provenance of a file that :func:`write` wrote.

    ValueError for any other file, a damaged one, one that unpacks to too much, or one of a newer version.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return _read(archive)
    except Exception as error:  # whatever a stranger's bytes provoke in zip, JSON or CSV readers is one answer here
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} is not a capture that can be read: {reason}") from error


def _read(archive: zipfile.ZipFile) -> tuple[Frames, dict[str, Any]]:
    for entry in archive.infolist():
        if entry.file_size > _LARGEST_BYTES or entry.file_size > _LARGEST_HEADER + _DENSEST * entry.compress_size:
            raise ValueError(f"{entry.filename} would unpack from {entry.compress_size:,} to {entry.file_size:,} bytes")
    if archive.getinfo("capture.json").file_size > _LARGEST_HEADER:
        raise ValueError(f"its capture.json is larger than {_LARGEST_HEADER:,} bytes")
    header = json.loads(archive.read("capture.json"))
    if not isinstance(header, dict) or header.get("format") != FORMAT or not isinstance(header.get("provenance"), dict):
        raise ValueError(f"its capture.json does not say “{FORMAT}”")
    version = header.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(f"it is of version {version} and this effkit reads up to {VERSION}: upgrade effkit")
    frames = {name: _frame(archive, name, columns) for name, columns in header["columns"].items() if name in FRAMES}
    if "events" not in frames:
        raise ValueError("it holds no events")
    try:
        msgspec.convert(header["provenance"], _Provenance)
    except msgspec.ValidationError as error:
        raise ValueError(f"its provenance is damaged: {error}") from error
    return frames, header["provenance"]


def _frame(archive: zipfile.ZipFile, name: str, columns: dict[str, str]) -> pd.DataFrame:
    if missing := [column for column in FRAMES[name] if column not in columns]:
        raise ValueError(f"its {name} lack the columns {', '.join(missing)}")
    if len(columns) > _MOST_COLUMNS:
        raise ValueError(f"its {name} have {len(columns):,} columns, and a capture's have at most {_MOST_COLUMNS:,}")
    absent = {column: [""] for column, kind in columns.items() if kind != "str" or column in _MAY_LACK_TEXT}
    with archive.open(f"{name}.csv") as file:
        # the line ends that save() writes and no others: a name may hold a carriage return
        frame = pd.read_csv(file, dtype=columns, keep_default_na=False, na_values=absent, lineterminator="\n")
    if set(frame.columns) != set(columns):
        raise ValueError(f"its {name} have the columns {', '.join(frame.columns)}, and capture.json names others")
    if damaged := [column for column in frame if _WHOLE.search(column) and not is_integer_dtype(frame[column])]:
        raise ValueError(f"its {name} hold no whole numbers in {', '.join(damaged)}")
    return frame if name == "events" else frame.rename_axis(name.removesuffix("s"))
