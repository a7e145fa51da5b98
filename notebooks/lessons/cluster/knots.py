"""Untie the Knots (arXiv 2409.04774): documents cut into chunks that are interleaved within a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from effkit import Account


@dataclass(frozen=True, eq=False)
class Context:
    """One packed context: chunks in their order.

    Attributes
    ----------
    chunks
        One row per chunk: ``document`` it is of, ``part`` of the document (0, 1, ...), ``num_tokens``.
    size
        Tokens that fit; what the chunks leave is padding.
    num_markers
        Tokens that mark a chunk, before each.
    """

    chunks: pd.DataFrame
    size: int
    num_markers: int = 0

    def account(self) -> Account:
        """What the context's tokens are [tokens]."""
        real, markers = int(self.chunks["num_tokens"].sum()), self.num_markers * len(self.chunks)
        rows = {"real": real, "markers": markers, "padding": self.size - real - markers}
        return Account.of("One packed context", "tokens", rows, total=self.size, source="its size", basis="assumed")

    def positions(self) -> tuple[Any, Any]:
        """Where every real token stands and which document it is of, two integer arrays of shape (num_real,)."""
        sizes = self.chunks["num_tokens"].to_numpy()
        starts = np.cumsum(sizes + self.num_markers) - sizes
        place = np.concatenate([np.arange(start, start + size) for start, size in zip(starts, sizes, strict=True)])
        return place, np.repeat(self.chunks["document"].to_numpy(), sizes)


def packed(size: int, *, mean_tokens: int = 4096, seed: int = 0) -> Context:
    """Documents one after the other until the context is full; the last is cut. Lengths are log-normal, of that mean.

    Raises
    ------
    ValueError
        When the context or the mean is not positive.
    """
    if size < 1 or mean_tokens < 1:
        raise ValueError(f"a context of {size} tokens and documents of {mean_tokens}, expected at least 1 each")
    random, lengths, left = np.random.default_rng(seed), [], size
    while left:
        drawn = min(left, max(16, int(random.lognormal(np.log(mean_tokens) - 0.5, 1.0))))
        lengths.append(drawn)
        left -= drawn
    return Context(pd.DataFrame({"document": range(len(lengths)), "part": 0, "num_tokens": lengths}), size)


def knotted(context: Context, *, chunk_tokens: int = 1024, num_markers: int = 0, seed: int = 0) -> Context:
    """The same documents cut into chunks, and the chunks of all dealt at random; those of a document keep their order.

    Markers push the context's end out: what no longer fits is cut off, so that the size stays.

    Raises
    ------
    ValueError
        When a chunk has no tokens, or markers are fewer than none.
    """
    if chunk_tokens < 1 or num_markers < 0:
        raise ValueError(f"chunks of {chunk_tokens} tokens and {num_markers} markers, expected at least 1 and 0")
    rows = []
    for document, length in zip(context.chunks["document"], context.chunks["num_tokens"], strict=True):
        sizes = [chunk_tokens] * (length // chunk_tokens) + ([length % chunk_tokens] if length % chunk_tokens else [])
        rows += [(document, part, tokens) for part, tokens in enumerate(sizes)]
    cut = pd.DataFrame(rows, columns=["document", "part", "num_tokens"])
    turn = np.random.default_rng(seed).permutation(cut["document"].to_numpy())  # whose chunk comes next
    by_turn = pd.Series(
        np.arange(len(cut)), index=pd.MultiIndex.from_arrays([turn, pd.Series(turn).groupby(turn).cumcount()])
    )
    order = by_turn.reindex(pd.MultiIndex.from_frame(cut[["document", "part"]])).to_numpy()
    mixed = cut.iloc[np.argsort(order)].reset_index(drop=True)
    room = context.size - num_markers * np.arange(1, len(mixed) + 1) - mixed["num_tokens"].cumsum()
    mixed["num_tokens"] = (mixed["num_tokens"] + np.minimum(room, 0)).clip(lower=0)
    return Context(mixed[mixed["num_tokens"] > 0].reset_index(drop=True), context.size, num_markers)


def distances(context: Context, *, num_pairs: int = 200_000, seed: int = 0) -> Any:
    """How far apart in the context two random tokens of one document stand [tokens], integers of about that many pairs.

    Documents count by their tokens.
    """
    place, document = context.positions()
    random = np.random.default_rng(seed)
    grouped = np.argsort(document, kind="stable")
    start = np.searchsorted(document[grouped], document)  # of each token's document within the grouped tokens
    size = np.bincount(document)[document]
    one = random.integers(len(place), size=num_pairs)
    other = grouped[start[one] + random.integers(size[one])]
    far = np.abs(place[one] - place[other])
    return far[one != other]
