"""The text of a trace becomes lists of decoded events, and what the trace says of itself.

A trace may be larger than memory, so it is cut between two events and decoded piece by piece. Where it may be cut is
not to be known without parsing, but a wrong cut cannot be decoded: a piece that decodes was cut right.
"""

from __future__ import annotations

import codecs
import gzip
import os
import re
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import IO, Any, TypeAlias

import msgspec

from effkit.progress_bar import advance

Stream: TypeAlias = "IO[bytes] | Unpacked"
_PIECE = 2**20
_FEW = 64
_EXACT_US = 2**43  # up to here a double holds microseconds with three decimals; those since 1970 are beyond
_LARGEST_HEAD = 2**26  # metadata before the events: real ones stay below a few hundred kB
_LONGEST_EVENT = 2**28
_SMALL_UNPACKED = 2**24  # bytes; a small trace may be of one event repeated
_DENSEST = 200  # times that gzip may unpack beyond that; real traces stay below 50
_ARRAY = re.compile(rb'"traceEvents"\s*:\s*\[')
_KEY = rb'"(?:ph|name|cat|pid|tid|ts|dur|args|id|s|bp)"\s*:'  # of an event
# inside a string the quotation marks would be escaped; a list of dicts within an event seldom begins with these keys
_BETWEEN = re.compile(rb"\}\s*,\s*(?=\{\s*" + _KEY + rb")")

# What old or unlucky profilers write that is no JSON, and what stands for it
_CONTROL = bytes.maketrans(bytes(range(32)), b" " * 32)
_ESCAPE = re.compile(rb'(\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))|\\')
_STRING = rb'[^"\\]*+(?:\\.[^"\\]*+)*+"'  # behind its first quotation mark
_NO_NUMBER = re.compile(rb'((?:"' + _STRING + rb'|[^"NIni-])++)|-?(?:NaN|nan|Infinity|inf|N/A)')
# Where torch's writer ends a name, that may hold quotation marks: of an event, and of the file
_EVENT, _NAME, _FILE = b'"ph": "', b'"name": "', b'"traceName": "'
_WHOLE_NAME = re.compile(_STRING + rb"\s*(?:,\s*" + _KEY + rb"|\}\s*[\],}])")
_END_OF_NAME, _END_OF_FILE = re.compile(rb'",\s*"pid": '), re.compile(rb'"\s*\}\s*\Z')
_QUOTATION_MARK = re.compile(rb'(?<!\\)"')


class Metadata(msgspec.Struct, gc=False):
    """What a trace says of itself, beside its events; None where it says nothing."""

    distributedInfo: dict[str, Any] | None = None
    deviceProperties: list[dict[str, Any]] | None = None
    baseTimeNanoseconds: int | None = None
    host_name: str | None = None

    def said(self) -> dict[str, Any]:
        return {field: value for field in Metadata.__struct_fields__ if (value := getattr(self, field)) is not None}


_METADATA = msgspec.json.Decoder(Metadata)


class Decoder:
    """Decodes one trace into lists of ``event`` structs; ``metadata`` is complete when all pieces have been taken.

    From the first time ``ts`` on that a double is too coarse for, they are ``exact`` structs, where these are given.
    """

    def __init__(self, event: Any, exact: Any = None) -> None:
        self.metadata: dict[str, Any] = {}
        self._exact = exact
        self._events, self._whole = _decoders(event)

    def pieces(self, stream: Stream) -> Iterator[list[Any]]:
        """Lists of events, in the order of the file; msgspec.DecodeError or ValueError where it is no trace."""
        head, buffer = _opened(stream)
        self.metadata |= _metadata(head)
        wanted = _PIECE
        while block := stream.read(wanted):
            buffer += block
            cut = _last_between(buffer)
            events = self._piece(buffer, cut[0] + 1) if cut else None
            if cut and events is not None:
                yield events
                buffer = buffer[cut[1] :]
                wanted = _PIECE
            # the cut was inside an event, or behind the last one: more of the stream will tell
            elif (wanted := len(buffer)) > _LONGEST_EVENT:
                raise ValueError(f"it holds an event or an error within {wanted:,} bytes")
        rest = decoded(self._whole, text := b'{"traceEvents":[' + buffer + (b"" if head else b"}"))
        self.metadata |= rest.said()
        yield decoded(self._whole, text).traceEvents if self._too_coarse(rest.traceEvents) else rest.traceEvents

    def _too_coarse(self, events: list[Any]) -> bool:
        """Whether to decode these again, as ``exact`` ones; all that follow are decoded so at once."""
        # all times of a trace are of one clock: its first events tell
        if self._exact is None or not any(event.ts > _EXACT_US for event in events[:_FEW]):
            return False
        self._events, self._whole = _decoders(self._exact)
        self._exact = None
        return True

    def _piece(self, buffer: bytes, end: int) -> list[Any] | None:
        text = b"[" + buffer[:end] + b"]"
        try:
            events: list[Any] = decoded(self._events, text)
            return decoded(self._events, text) if self._too_coarse(events) else events
        except msgspec.ValidationError:
            raise
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None


@cache
def _decoders(event: Any) -> tuple[Any, Any]:
    """Of a list of such events, and of a trace that holds one."""
    whole = msgspec.defstruct("_Whole", [("traceEvents", list[event])], bases=(Metadata,), gc=False, kw_only=True)
    return msgspec.json.Decoder(list[event]), msgspec.json.Decoder(whole)


def _opened(stream: Stream) -> tuple[bytes, bytes]:
    """Everything up to the bracket that opens the events, and the beginning of what follows."""
    buffer = b""
    while len(buffer) <= _LARGEST_HEAD and (block := stream.read(_PIECE if buffer else 2**16)):
        buffer += block.removeprefix(codecs.BOM_UTF8) if not buffer else block
        if opening := _ARRAY.search(buffer):
            return buffer[: opening.end()], buffer[opening.end() :]
        if re.match(rb"\s*\[\s*\{", buffer):  # Chrome's other form, that torch's older profiler writes
            return b"", buffer[buffer.index(b"[") + 1 :]
    raise ValueError("no traceEvents in it")


def _metadata(head: bytes) -> dict[str, Any]:
    return decoded(_METADATA, head + b"]}").said() if head else {}


class Unpacked:
    """The plain text of a trace file, compressed or not; refuses to grow beyond what an honest one grows to."""

    def __init__(self, packed: IO[bytes]) -> None:
        compressed = packed.read(2) == b"\x1f\x8b"
        packed.seek(0)
        self._packed, self._size = packed, os.fstat(packed.fileno()).st_size
        self._file = gzip.GzipFile(fileobj=packed) if compressed else packed
        self._taken = 0

    def read(self, size: int) -> bytes:
        try:
            block = self._file.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise ValueError(f"its compression is damaged ({error})") from error
        self._taken += len(block)
        advance(self._packed.tell(), self._size)
        if self._taken > _SMALL_UNPACKED + _DENSEST * self._packed.tell():
            raise ValueError(f"it unpacks to more than {_DENSEST} times its size")
        return block


def head(path: Path) -> Mapping[str, Any]:
    """The metadata before the events, without reading these; empty where there is none."""
    with path.open("rb") as file:
        return _metadata(_opened(Unpacked(file))[0])


def _last_between(buffer: bytes) -> tuple[int, int] | None:
    """Where the last event that is surely whole ends, and where the next begins."""
    for reach in (2**12, 2**15, 2**18, len(buffer)):
        if gaps := deque(_BETWEEN.finditer(buffer, max(0, len(buffer) - reach)), maxlen=1):
            return gaps[0].span()
    return None


def decoded(decoder: Any, text: bytes) -> Any:
    try:
        return decoder.decode(text)
    except msgspec.ValidationError:
        raise
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        try:
            return decoder.decode(_repaired(text))
        except msgspec.ValidationError:
            raise
        except msgspec.DecodeError:
            raise error from None


def _escaped(text: bytes, key: bytes, end: re.Pattern[bytes]) -> bytes:
    """The same with the quotation marks in the first value of this key escaped; each byte is looked at once."""
    start = text.find(key) + len(key)
    if start < len(key) or _WHOLE_NAME.match(text, start) or not (found := end.search(text, start)):
        return text
    return text[:start] + _QUOTATION_MARK.sub(rb"\\\g<0>", text[start : found.start()]) + text[found.start() :]


def _repaired(text: bytes) -> bytes:
    """The same with control characters, bad escapes, bad UTF-8, NaN and quotation marks in names made harmless."""
    text = text.translate(_CONTROL).decode("utf-8", "replace").encode()
    text = _EVENT.join(_escaped(event, _NAME, _END_OF_NAME) for event in text.split(_EVENT))
    before, mark, file = text.rpartition(_FILE)
    text = before + _escaped(mark + file, _FILE, _END_OF_FILE) if mark else text
    text = _ESCAPE.sub(lambda escape: escape[1] or rb"\\", text)
    return _NO_NUMBER.sub(lambda found: found[1] or b"null", text)
