"""A linear classifier on hashed words in the place of a language model that scores documents (Ultra-FineWeb)."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from lessons import corpora

BUCKETS = 2**15


def hashed(text: str) -> list[int]:
    """Words and pairs of neighbours as numbers of buckets: features as fastText's (arXiv 1607.01759)."""
    found = [zlib.crc32(word.encode()) for word in text.split()]
    pairs = [first * 31 + second for first, second in itertools.pairwise(found)]
    return [one % BUCKETS for one in (*found, *pairs)]


class HashedClassifier(nn.Module):
    """The mean of a document's feature vectors, and a linear layer: good or not."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, 16, mode="mean")
        self.output = nn.Linear(16, 1)

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Documents -> scores (documents,); above 0 is good."""
        numbers = [hashed(text) for text in texts]
        starts = np.cumsum([0, *map(len, numbers[:-1])])
        flat = torch.tensor([one for document in numbers for one in document], dtype=torch.long)
        return self.output(self.bag(flat, torch.from_numpy(starts))).squeeze(-1)


def classifier(texts: Sequence[str], good: Sequence[bool], *, seed: int = 0) -> HashedClassifier:
    """Train it for 30 epochs on documents that somebody else has judged."""
    torch.manual_seed(seed)
    model = HashedClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    truth = torch.tensor(good, dtype=torch.float32)
    for _ in range(30):
        for places in torch.randperm(len(texts)).split(64):
            optimizer.zero_grad()
            made = model([texts[place] for place in places.tolist()])
            functional.binary_cross_entropy_with_logits(made, truth[places]).backward()
            optimizer.step()
    return model


@torch.no_grad()
def perplexity_scores(model: Any, texts: Sequence[str]) -> torch.Tensor:
    """Minus the loss of each document under a language model [nats per letter], shape (documents,); higher is better.

    Documents are as long as the shortest of them.
    """
    length = min(map(len, texts))
    ids = torch.stack([corpora.encode(text)[:length] for text in texts])
    logits = model(input_ids=ids).logits[:, :-1]
    return -functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(dim=1)


def in_batches(score: Callable[[Sequence[str]], torch.Tensor], texts: Sequence[str], size: int = 64) -> torch.Tensor:
    """Scores of many documents, some at a time, shape (documents,)."""
    with torch.no_grad():
        return torch.cat([score(texts[start : start + size]) for start in range(0, len(texts), size)])


def documents_per_s(
    scorers: dict[str, Callable[[Sequence[str]], torch.Tensor]], texts: Sequence[str], *, num_repeats: int = 5
) -> pd.Series[float]:
    """Rate of each scorer, from text to score, by the median of interleaved repeats."""
    times: dict[str, list[int]] = {name: [] for name in scorers}
    for _ in range(num_repeats):
        for name, score in scorers.items():
            begin = time.perf_counter_ns()
            in_batches(score, texts)
            times[name].append(time.perf_counter_ns() - begin)
    return pd.Series({name: 1e9 * len(texts) / float(np.median(one)) for name, one in times.items()}, name="per_s")


def agreement_frac(first: torch.Tensor, second: torch.Tensor) -> float:
    """Share of documents on which two scorers decide alike when each keeps its better half; one half by chance."""
    num = round(0.5 * len(first))
    kept = [torch.zeros(len(one), dtype=torch.bool).index_fill(0, one.argsort(descending=True)[:num], True)
            for one in (first, second)]  # fmt: skip
    return float((kept[0] == kept[1]).float().mean())


class Replaced(NamedTuple):
    """A classifier in the place of a language model: decisions that are the same, and rates [documents/s]."""

    alike_frac: float
    per_s: pd.Series[float]


def replaced(model: Any, documents: Sequence[str], *, num_judged: int = 200, num_repeats: int = 3) -> Replaced:
    """Let the model judge the first documents, a classifier learn from them, and both read the rest."""

    def judge(texts: Sequence[str]) -> torch.Tensor:
        return perplexity_scores(model, texts)

    judged = in_batches(judge, documents)
    first, rest = documents[:num_judged], documents[num_judged:]
    quick = classifier(first, (judged[:num_judged] > judged[:num_judged].median()).tolist())
    alike = agreement_frac(judged[num_judged:], in_batches(quick, rest))
    rates = documents_per_s({"language model": judge, "classifier": quick}, rest, num_repeats=num_repeats)
    return Replaced(alike, rates)
