"""lengths(): whatever lists examples becomes one tidy frame of input and output lengths."""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import pandas as pd

from effkit.padding.loader_audit import watch
from effkit.padding.real_cells import IGNORED_LABEL, real_cells

FRAMES_PER_SECOND = 100  # 10 ms, the usual step of speech features
_LARGEST_BYTES = 8 * 2**30  # what a manifest may unpack to

# In order of preference. A name ending in _s, or `duration`, is in seconds.
INPUT_COLUMNS = ("input_length", "num_frames", "duration", "duration_s", "input_tokens", "num_tokens", "length",
                 "input_ids")  # fmt: skip
OUTPUT_COLUMNS = ("output_length", "output_tokens", "num_output_tokens", "tokens", "labels", "text")
_MASK = "attention_mask"
_LFS = b"version https://git-lfs"
_LISTS = (list, tuple, np.ndarray)

_Output = str | Literal[False] | None


def lengths(
    source: Any, *, input: str | None = None, output: _Output = None,
    tokenize: Callable[[str], Any] | None = None, frames_per_second: float = FRAMES_PER_SECOND,
) -> pd.DataFrame:  # fmt: skip
    """The length of every example, whatever it is listed in.

    ValueError naming the first line whose length is missing, NaN, zero or negative; or for an empty source.
    FileNotFoundError when the path is none.

    Parameters
    ----------
    source
        An array ``[num_examples]`` or ``[num_examples, 2]``, a DataFrame, a Hugging Face dataset, a running
        ``DataLoader``, or the path of a CSV, a NeMo JSON-lines manifest or Lhotse cuts (``.jsonl``, ``.jsonl.gz``).
    input, output
        Column names, where they are not the usual ones; ``output=False`` takes inputs alone.
    tokenize
        ``text -> tokens`` (or their number) for sources that hold text; without it, characters are counted.
    frames_per_second
        Durations in seconds become input cells of ``1 / frames_per_second``, rounded up.

    Returns
    -------
    DataFrame
        Integer columns ``input_length`` [cells] and, where the source has outputs, ``output_length`` [cells].
        ``attrs["input_unit"]`` and ``attrs["output_unit"]`` say what a cell is.

    Examples
    --------
    >>> lengths([[120, 7], [80, 5]])
       input_length  output_length
    0           120              7
    1            80              5
    """
    if isinstance(source, (str, Path)):
        return _from_file(Path(source), input, output, tokenize, frames_per_second)
    if hasattr(source, "column_names") and hasattr(source, "features"):  # a Hugging Face dataset
        chosen = {input, output, *INPUT_COLUMNS, *OUTPUT_COLUMNS, _MASK}
        columns = {name: list(source[name]) for name in source.column_names if name in chosen}
        source = pd.DataFrame(columns or {name: [] for name in source.column_names}, index=range(len(source)))
    if hasattr(source, "batch_sampler") and hasattr(source, "dataset"):  # a DataLoader
        return watch(source).run().lengths
    if not isinstance(source, pd.DataFrame):
        array = np.asarray(source)
        if not array.size:
            raise ValueError("an empty list of lengths: nothing to plan")
        if array.ndim not in (1, 2) or array.dtype == object or (array.ndim == 2 and array.shape[1] not in (1, 2)):
            raise ValueError(
                f"lengths() takes numbers of shape [examples] or [examples, 2]; given: shape {array.shape}"
            )
        names = ["input_length", "output_length"][: array.reshape(len(array), -1).shape[1]]
        source = pd.DataFrame(array.reshape(len(array), -1), columns=names)
    return _tidy(source, input, output, tokenize, frames_per_second, lambda row: f"row {row}")


def _from_file(path: Path, input: str | None, output: _Output, tokenize: Any, rate: float) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"no list of lengths at {path}")
    name = path.name.removesuffix(".gz")
    if not name.endswith((".jsonl", ".json", ".csv", ".tsv")):
        raise ValueError(
            f"{path.name}: lengths() reads .csv, .tsv, .jsonl, .json, and these with .gz; convert it first"
        )
    mark = "\t" if name.endswith(".tsv") else ","
    lines: list[int] | None = None
    try:
        if name.endswith((".jsonl", ".json")):
            table, lines = _manifest(path, input, output)
        else:  # words like "null" and "NA" are text; a number that is missing shows when it is read as one
            table = pd.read_csv(path, sep=mark, skip_blank_lines=False, keep_default_na=False)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path.name} is not a whole gzip file: {error}") from error
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise ValueError(f"{path.name} cannot be read as a table: {error}") from error
    if not len(table):
        raise ValueError(f"{path.name} holds an empty list of lengths: nothing to plan")

    def where(row: int) -> str:
        return f"{path.name}, line {_line(path, mark, row) if lines is None else lines[row]}"

    return _tidy(table, input, output, tokenize, rate, where)


def _line(path: Path, mark: str, row: int) -> int:
    """The line of a table's row as an editor counts: a quoted text may run over several."""
    with gzip.open(path, "rt", encoding="utf-8") if path.name.endswith(".gz") else path.open(encoding="utf-8") as file:
        reader = csv.reader(file, delimiter=mark)
        for _ in range(row + 2):
            next(reader)
        return reader.line_num


def _manifest(path: Path, input: str | None, output: _Output) -> tuple[pd.DataFrame, list[int]]:
    """A JSON-lines manifest as a table of the columns that any line of it has, and the line number of each row."""
    usual = (*INPUT_COLUMNS, *OUTPUT_COLUMNS)
    every = any(name and name not in usual for name in (input, output))
    decoder = msgspec.json.Decoder(dict[str, Any])
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        if number == 1 and line.startswith(_LFS):
            raise ValueError(f"{path.name} is a pointer of Git LFS and not the file itself: run git lfs pull")
        if number == 1 and line.lstrip().startswith(b"["):
            raise ValueError(f"{path.name} is a JSON list, not an example a line: give lengths(pandas.read_json(path))")
        try:
            entry = _entry(decoder.decode(line))
        except (msgspec.DecodeError, AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"{path.name}, line {number}: {error}") from error
        rows.append(entry if every else {name: entry.get(name) for name in usual})
        numbers.append(number)
    return pd.DataFrame(rows).dropna(axis=1, how="all"), numbers


def _entry(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a NeMo manifest, or of Lhotse cuts, whose text is in supervisions, and which may be mixed of tracks."""
    tracks, spoken = line.get("tracks") or [], line.get("supervisions") or []
    if tracks and line.get("duration") is None:
        ends = [track.get("offset", 0) + end for track in tracks if (end := track["cut"].get("duration")) is not None]
        line["duration"] = max(ends, default=None)
        spoken = [one for track in tracks for one in track["cut"].get("supervisions") or []]
    said = [one["text"] for one in spoken if one.get("text") is not None]
    return line | {"text": " ".join(said)} if said and line.get("text") is None else line


def _lines(path: Path) -> Iterator[bytes]:
    total = 0
    with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
        for line in file:
            total += len(line)
            if total > _LARGEST_BYTES:
                raise ValueError(f"{path.name} unpacks to more than {_LARGEST_BYTES:,} bytes; split it")
            yield line


def _choose(names: Any, asked: str | None, usual: tuple[str, ...], *, required: bool = True) -> str | None:
    if asked is not None:
        if asked not in names:
            raise ValueError(f"there is no column {asked!r}; the columns are {', '.join(map(str, names))}")
        return asked
    column = next((name for name in usual if name in names), None)
    if column is None and required:
        raise ValueError(
            f"none of the columns {', '.join(map(str, names)) or '(none)'} is a usual length: say which with input=…"
        )
    return column


def _tidy(
    table: pd.DataFrame, input: str | None, output: _Output, tokenize: Any, rate: float, where: Callable[[int], str]
) -> pd.DataFrame:
    if not len(table):
        raise ValueError("an empty list of lengths: nothing to plan")
    chosen_in = _choose(table.columns, input, INPUT_COLUMNS)
    # labels that are no lists are classes
    usual = tuple(name for name in OUTPUT_COLUMNS if name != "labels" or (name in table and _are_lists(table[name])))
    chosen_out = None if output is False else _choose(table.columns, output, usual, required=False)
    chosen = {"input_length": chosen_in, "output_length": None if chosen_out == chosen_in else chosen_out}
    cells, attrs, offences = {}, {}, []
    for target, column in chosen.items():
        if column is None:
            continue
        cells[target], attrs[target.replace("length", "unit")] = _cells(table[column], column, tokenize, rate)
        if column == chosen_in and _MASK in table and _are_lists(table[column]) and np.ptp(cells[target]) == 0:
            rows = (np.array(table[name].tolist()) for name in (_MASK, column))
            cells[target] = real_cells(next(rows), rows).sum(axis=1).astype("float64")  # padded to one width
        bad = np.flatnonzero(~(np.isfinite(cells[target]) & (cells[target] > 0)))
        if len(bad):
            offences.append((int(bad[0]), column, len(bad)))
    if offences:
        row, column, count = min(offences, key=lambda offence: offence[0])
        value = table[column].iloc[row]
        value = value.item() if isinstance(value, np.generic) else value
        if column == chosen_out and (value is None or value == "" or value != value):
            raise ValueError(
                f"{where(row)}: {column} is {value!r}, an example without output ({count:,} such in all): drop "
                "them, or take inputs alone with output=False"
            )
        raise ValueError(
            f"{where(row)}: {column} is {value!r}; a length is a positive number ({count:,} such in all): mend or drop "
            "them"
        )
    frame = pd.DataFrame({target: np.ceil(values - 1e-9).astype("int64") for target, values in cells.items()})
    frame.attrs.update(attrs)
    return frame


def _cells(column: pd.Series[Any], name: str, tokenize: Any, rate: float) -> tuple[Any, str]:
    """The column as float cells (NaN where there is no number), and what a cell is."""
    present = column[column.notna()]
    if not pd.api.types.is_numeric_dtype(column) and len(present):
        if _are_lists(column):
            sizes = [(np.asarray(t) != IGNORED_LABEL).sum() if isinstance(t, _LISTS) else np.nan for t in column]
            return np.array(sizes, dtype="float64"), "tokens"
        if pd.to_numeric(present, errors="coerce").notna().mean() < 0.5:  # mostly words: text, not damaged numbers
            told = [(tokenize(t) if tokenize else t) if isinstance(t, str) else np.nan for t in column]
            counted = np.array([t if isinstance(t, (int, float)) else len(t) for t in told], dtype="float64")
            return counted, "tokens" if tokenize else "characters"
    values = pd.to_numeric(column, errors="coerce").to_numpy(dtype="float64", na_value=np.nan)
    seconds = name == "duration" or name.endswith("_s")
    return (values * rate, f"frames of {1000 / rate:g} ms") if seconds else (values, "cells")


def _are_lists(column: pd.Series[Any]) -> bool:
    return bool(column.dropna().head(1).map(lambda value: isinstance(value, _LISTS)).any())
