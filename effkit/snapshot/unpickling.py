"""A pickle that somebody else made becomes plain dicts, lists, text and numbers, or is refused. Nothing in it runs.

That no global can be found is not enough: a few damaged bytes make the unpickler of CPython reserve tens of gigabytes
(a memo index, a length), or hash for ever (tuples within tuples as keys). So every instruction is looked at first.
"""

from __future__ import annotations

import re
from io import BytesIO
from pathlib import Path
from pickle import Unpickler
from typing import Any, NoReturn

from effkit.gc_disabled import gc_disabled

_ADVICE = "expected a file of torch.cuda.memory._dump_snapshot(); record or copy it again"

# Tuples are admitted as torch writes them, flat and of small integers (the id of a memory pool): hashing them is quick.
_SMALL = rb"(?:K.|M..|J.{4})"
_LONG = rb"\x8a(?:" + b"|".join(b"\\x%02x.{%d}" % (size, size) for size in range(10)) + b")"
_HARMLESS = re.compile(
    rb"(?:[}\](aesu\x94)N\x88\x89]++"  # containers, their items, the memo; None and booleans
    rb"|h.|j.{4}"  # what the memo holds
    rb"|" + _SMALL + rb"(?:\x85|" + _SMALL + rb"(?:[\x85\x86]|" + _SMALL + rb"++[\x85-\x87]?+)?+)?+"
    rb"|" + _LONG + rb"|q.|G.{8}|\x95.{8}|\x80.)*+",
    re.DOTALL,
)  # fmt: skip
_LENGTH_BYTES = {0x8C: 1, ord("X"): 4, 0x8D: 8}  # the three kinds of text, by the size of their length
_STOP, _LONG_BINPUT, _GLOBAL, _STACK_GLOBAL = ord("."), ord("r"), ord("c"), 0x93
_BUILDS = frozenset(b"RbioQP\x81\x82\x83\x84\x92")  # reduce, build, new objects, extensions, persistent ids

_SMALL_FILE_BYTES = 2**20
_BYTES_PER_CONTAINER = 8  # torch writes one per 20 bytes or more; an empty one takes 72 bytes of memory


class _Plain(Unpickler):
    def find_class(self, module: str, name: str) -> NoReturn:
        raise ValueError(f"it asks for {module}.{name}, and a snapshot needs no code")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise ValueError("it refers to objects outside the file, and a snapshot does not")


def unpickle(source: bytes | Path) -> Any:
    r"""The plain data in a pickle of protocol 2 to 5; takes memory in proportion to the file.

    ValueError when the pickle is damaged, or asks for anything but plain data.

    >>> unpickle(b"\x80\x04}.")
    {}
    """
    try:
        _check(source.read_bytes() if isinstance(source, Path) else source)  # and let go of it
        # the collector would look through millions of fresh objects over and over; none is garbage yet
        with source.open("rb") if isinstance(source, Path) else BytesIO(source) as file, gc_disabled():
            return _Plain(file).load()
    except Exception as error:  # the unpickler raises almost anything on damaged bytes
        raise ValueError(f"not a memory snapshot: {str(error) or type(error).__name__}; {_ADVICE}") from error


def _check(content: bytes) -> None:
    """Look at every instruction before any of them is followed."""
    size = len(content)
    if content[:1] != b"\x80":
        raise ValueError(f"it {'does not begin as a pickle does' if content else 'is empty'}")
    if size > _SMALL_FILE_BYTES and content.count(b"}") + content.count(b"]") > size // _BYTES_PER_CONTAINER:
        raise ValueError("it holds more containers than a snapshot of its size can")
    skip, position = _HARMLESS.match, 0
    texts = [b"?", b"?"]  # the last two: what a global by name refers to
    while True:
        position = skip(content, position).end()  # type: ignore[union-attr]  # it matches nothing, too
        if position >= size:
            raise ValueError("it breaks off before its end")
        code = content[position]
        if width := _LENGTH_BYTES.get(code):
            start = position + 1 + width
            end = start + int.from_bytes(content[position + 1 : start], "little")
            if end > size:
                raise ValueError("it breaks off within a text")
            texts = [texts[1], content[start : min(end, start + 99)]]
            position = end
        elif code == _LONG_BINPUT:
            # an object and its place in the memo take 3 bytes at least, so honest places stay far below this
            if int.from_bytes(content[position + 1 : position + 5], "little") > position:
                raise ValueError("it counts more objects than it holds")
            position += 5
        elif code == _STOP:
            return
        else:
            raise ValueError(_refusal(content, position, texts))


def _refusal(content: bytes, position: int, texts: list[bytes]) -> str:
    code = content[position]
    if code in (_GLOBAL, _STACK_GLOBAL):
        names = content[position + 1 : position + 200].split(b"\n")[:2] if code == _GLOBAL else texts
        return f"it asks for {b'.'.join(names).decode('utf-8', 'replace')!r}, and a snapshot needs no code"
    if code in _BUILDS:
        return "it holds an instruction that builds objects, and a snapshot is plain data"
    return f"byte {position:,} ({code:#04x}) is no instruction that a snapshot uses"
