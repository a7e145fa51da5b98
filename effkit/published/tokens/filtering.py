"""A linear classifier on hashed words in the place of a language model that scores documents (Ultra-FineWeb)."""

from __future__ import annotations

import itertools
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from effkit.account import Account
from effkit.published import corpora

BUCKETS = 2**15


def hashed(text: str) -> list[int]:
    """Words and pairs of neighbours as numbers of buckets: features as fastText's (arXiv 1607.01759)."""
    found = [zlib.crc32(word.encode()) for word in text.split()]
    pairs = [first * 31 + second for first, second in itertools.pairwise(found)]
    return [one % BUCKETS for one in (*found, *pairs)]


class HashedClassifier(nn.Module):
    """The mean of a document's feature vectors, and a linear layer: good or not."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(BUCKETS, width, mode="mean")
        self.output = nn.Linear(width, 1)

    def forward(self, texts: Sequence[str]) -> torch.Tensor:
        """Documents -> scores (documents,); above 0 is good."""
        numbers = [hashed(text) for text in texts]
        starts = np.cumsum([0, *map(len, numbers[:-1])])
        flat = torch.tensor([one for document in numbers for one in document], dtype=torch.long)
        return self.output(self.bag(flat, torch.from_numpy(starts))).squeeze(-1)


def classifier(texts: Sequence[str], good: Sequence[bool], *, num_epochs: int = 30, seed: int = 0) -> HashedClassifier:
    """Train it on documents that somebody else has judged."""
    torch.manual_seed(seed)
    model = HashedClassifier()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    truth = torch.tensor(good, dtype=torch.float32)
    for _ in range(num_epochs):
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


def agreement_frac(first: torch.Tensor, second: torch.Tensor, keep_frac: float = 0.5) -> float:
    """Share of documents on which two scorers decide alike when each keeps its best; by chance k² + (1 - k)²."""
    num = round(keep_frac * len(first))
    kept = [torch.zeros(len(one), dtype=torch.bool).index_fill(0, one.argsort(descending=True)[:num], True)
            for one in (first, second)]  # fmt: skip
    return float((kept[0] == kept[1]).float().mean())


def hours(
    rates_per_s: pd.Series[float], *, num_tokens: float = 1e12, document_tokens: float = 100.0
) -> pd.Series[float]:
    """Hours of one core for a corpus, from rates in documents per second."""
    return (num_tokens / document_tokens / rates_per_s / 3600).rename("hours")


def bill(rates_per_s: pd.Series[float], *, num_documents: int, num_judged: int, training_ns: int) -> Account:
    """Time to filter a corpus when the slow scorer judges some documents and the quick one learns from them.

    Parameters
    ----------
    rates_per_s
        Documents per second, ``language model`` and ``classifier``.
    num_documents, num_judged
        Of the corpus, and how many of them the language model judges.
    training_ns
        Of the classifier.

    Raises
    ------
    ValueError
        When more are to be judged than there are.
    """
    if num_judged > num_documents:
        raise ValueError(f"{num_judged:,} judged documents of {num_documents:,}, expected no more than there are")
    rows = {
        "language model judges": round(1e9 * num_judged / rates_per_s["language model"]),
        "classifier learns": training_ns,
        "classifier reads all": round(1e9 * num_documents / rates_per_s["classifier"]),
    }
    return Account.of("Time of filtering", "ns", rows, total=sum(rows.values()), source="measured rates",
                      basis="derived")  # fmt: skip
