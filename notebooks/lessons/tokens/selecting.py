"""Choosing documents by a weighted sum of quality scores, the weights learnt from proxy trainings (Meta-rater)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from lessons import corpora, meter
from lessons.tokens.next_letter import NextLetter, bits, draw, optimizer_of, step, train

_LENGTH, _KEEP_FRAC = 400, 0.25
_COMMON = (" the ", " of ", " and ", " to ", " is ", " in ", " for ", " that ", " it ", " be ", " with ", " as ",
           " if ", " not ")  # fmt: skip


def pool(kinds: Mapping[str, torch.Tensor], *, num_each: int = 300, seed: int = 0) -> pd.DataFrame:
    """Documents of 400 letters from texts of several kinds, shuffled: columns ``kind`` and ``text``.

    They are drawn from anywhere: two of one text may overlap.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = [
        (kind, bytes(piece.tolist()).decode("ascii"))
        for kind, ids in kinds.items()
        for piece in draw([ids], [1.0], num_each, _LENGTH, generator)
    ]
    order = torch.randperm(len(rows), generator=generator).tolist()
    return pd.DataFrame([rows[place] for place in order], columns=["kind", "text"])


def scores(texts: Sequence[str]) -> pd.DataFrame:
    """Four scores that need no model, each with mean 0 and deviation 1 over the documents.

    ``letters`` (share of letters and blanks), ``common_words`` (of English, per letter), ``variety`` (share of
    bytes that zlib leaves), ``long_lines`` (letters per line).
    """
    raw = pd.DataFrame(
        {
            "letters": [sum(one.isalpha() or one == " " for one in text) / len(text) for text in texts],
            "common_words": [sum(text.count(word) for word in _COMMON) / len(text) for text in texts],
            "variety": [len(zlib.compress(text.encode())) / len(text) for text in texts],
            "long_lines": [len(text) / (1 + text.count("\n")) for text in texts],
        }
    )
    return (raw - raw.mean()) / raw.std(ddof=0)


def selected(score_table: pd.DataFrame, weights: Sequence[float]) -> np.ndarray:
    """Places of the quarter of documents whose weighted sum of scores is highest, best first.

    Raises
    ------
    ValueError
        When there are not as many weights as scores.
    """
    if len(weights) != score_table.shape[1]:
        raise ValueError(f"{len(weights)} weights for {score_table.shape[1]} scores, expected one for each")
    total = score_table.to_numpy() @ np.asarray(weights, float)
    return np.argsort(-total, kind="stable")[: max(1, round(_KEEP_FRAC * len(total)))]


def joined(texts: Sequence[str]) -> torch.Tensor:
    """Documents end to end, as letters."""
    return corpora.encode("\n".join(texts))


def proxies(
    documents: pd.DataFrame,
    score_table: pd.DataFrame,
    target: Sequence[torch.Tensor],
    *,
    num: int = 24,
    num_steps: int = 60,
    seed: int = 0,
) -> pd.DataFrame:
    """Small trainings on what random weightings select.

    Weights that are chosen by them have seen ``target``: a run that is judged by the same text is no clean test.

    Returns
    -------
    DataFrame
        A row per proxy: the weight of each score (they sum to 1), and ``bits`` per letter, the mean of the targets.
    """
    random = np.random.default_rng(seed)
    rows = []
    for number in range(num):
        weights = random.dirichlet(np.ones(score_table.shape[1]))
        text = joined(documents["text"].iloc[selected(score_table, weights.tolist())].tolist())
        torch.manual_seed(seed)
        model = train(NextLetter(), [text], num_steps=num_steps, seed=seed + number)
        rows.append([*weights, np.mean([bits(model, held_out) for held_out in target])])
    return pd.DataFrame(rows, columns=[*score_table.columns, "bits"])


def best_weights(proxy_table: pd.DataFrame, *, seed: int = 0) -> pd.Series:
    """The weighting with the lowest loss by a regression on the proxies: squares and products of weights, ridge.

    The paper fits boosted trees to 256 proxies (arXiv 2504.14194, by pages about it); for a few dozen a polynomial has
    to do. The mean of the best hundredth of many random weightings is taken.
    """
    num_tried, ridge = 4000, 1e-3
    weights = proxy_table.drop(columns="bits")
    tried = np.random.default_rng(seed).dirichlet(np.ones(weights.shape[1]), num_tried)
    design = _squares(weights.to_numpy())
    loss = proxy_table["bits"].to_numpy()
    solution = np.linalg.solve(design.T @ design + ridge * np.eye(design.shape[1]), design.T @ (loss - loss.mean()))
    order = np.argsort(_squares(tried) @ solution)[: num_tried // 100]
    return pd.Series(tried[order].mean(axis=0), index=weights.columns, name="weight")


def _squares(weights: np.ndarray) -> np.ndarray:
    """Weights that sum to 1 and all their products; no column of ones, which their sum already is."""
    first, second = np.triu_indices(weights.shape[1])
    return np.concatenate([weights, weights[:, first] * weights[:, second]], axis=1)


class OnDocuments:
    """A training on chosen documents, for the meter."""

    def __init__(self, text: torch.Tensor, target: Sequence[torch.Tensor], seed: int) -> None:
        self.phase, self.num_tokens = "training", 128
        self._generator = meter.reproducible(seed)
        self._text, self._target = text, target
        self._model = NextLetter()
        self._optimizer = optimizer_of(self._model, 1e-2)  # as the proxies

    def step(self) -> None:
        """One update of 128 next letters."""
        step(self._model, self._optimizer,
             draw([self._text], [1.0], self.num_tokens, self._model.context + 1, self._generator))  # fmt: skip

    def loss(self) -> float:
        """Bits per letter of the target texts, their mean."""
        return float(np.mean([bits(self._model, held_out) for held_out in self._target]))
