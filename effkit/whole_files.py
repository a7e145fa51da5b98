"""Files that appear whole or not at all, and lines that are appended whole or not at all."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path in the same folder to write to. It takes the place of ``path`` at the end, and is removed on any error.

    >>> with replacing(Path("report.html")) as part:    # doctest: +SKIP
    ...     part.write_text("<p>all of it</p>")
    """
    part = path.parent / f".{uuid.uuid4().hex}.part"  # of this call alone, whoever else writes the same file
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def checked_place(path: Path, example: str) -> None:
    """IsADirectoryError or FileNotFoundError unless a file can be written there; ``example`` names one."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: give the name of the file to write, {path / example} say")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} for {path.name}: make it, or give another path")


def write_text(path: Path, text: str, example: str) -> Path:
    """Write a file, whole or not at all; errors of :func:`checked_place`."""
    checked_place(path, example)
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def append(path: Path, content: bytes) -> None:
    """Add to the end of a file. On any error nothing of it stays, and a file that was absent is absent again."""
    absent, written = not path.exists(), 0
    with path.open("ab", buffering=0) as file:  # unbuffered: one write, which no other process can come between
        try:
            while written < len(content):  # a full disk takes a part, and refuses the rest
                written += file.write(content[written:])
        except BaseException:
            if written:
                file.truncate(file.tell() - written)
            if absent and not path.stat().st_size:
                path.unlink()
            raise
