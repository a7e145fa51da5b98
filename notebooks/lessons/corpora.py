"""Text that every machine with Python has, for small language models: English documentation and program source."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

VOCABULARY = 128  # ASCII
_MODULES = ("argparse", "ast", "configparser", "datetime", "difflib", "doctest", "inspect", "ipaddress", "locale",
            "mailbox", "optparse", "pickletools", "pydoc", "statistics", "subprocess", "tarfile", "threading", "typing",
            "uuid", "zipfile")  # fmt: skip


@cache
def english() -> str:
    """The language reference that comes with Python for its ``help()``: half a million letters of technical English."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


@cache
def code() -> str:
    """Source of some modules of the standard library: over a million letters of another domain.

    Raises
    ------
    RuntimeError
        On a Python that comes without its sources.
    """
    texts = []
    for name in _MODULES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin is not None and spec.origin.endswith("__init__.py"):
            texts += [path.read_text("utf-8") for path in sorted(Path(spec.origin).parent.glob("*.py"))]
        elif spec is not None and spec.origin is not None and spec.origin.endswith(".py"):
            texts.append(Path(spec.origin).read_text("utf-8"))
    if not texts:
        raise RuntimeError("this Python comes without the source of its library; use one that has it")
    return "\n".join(texts)


def encode(text: str) -> torch.Tensor:
    """One number in [0, 128) per letter, shape (letters,): its ASCII code, or that of a question mark."""
    return torch.frombuffer(bytearray(text.encode("ascii", "replace")), dtype=torch.uint8).long()


def split(ids: torch.Tensor, *, held_out_frac: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Training text and held-out text: the end of it."""
    border = round(len(ids) * (1 - held_out_frac))
    return ids[:border], ids[border:]


def windows(ids: torch.Tensor, num: int, length: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Pieces of a text, shape (num, length): at random, or evenly spread when no generator is given.

    Raises
    ------
    ValueError
        When the text is shorter than one piece.
    """
    last = len(ids) - length
    if last < 0:
        raise ValueError(f"the text has {len(ids)} letters, expected at least the {length} of one piece")
    starts: torch.Tensor | Sequence[int]
    if generator is None:
        starts = torch.linspace(0, last, num).long()
    else:
        starts = torch.randint(0, last + 1, (num,), generator=generator)
    return torch.stack([ids[start : start + length] for start in starts])
