"""Feature density: does the share of different features in a preprocessed text say how well a classifier will do?"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch.nn import functional

from lessons.tokens.linear import Loss, fitted

Words = list[str]
_TRAIN_FRAC = 0.6
_LOSSES: Mapping[str, Loss] = {"logistic": functional.cross_entropy, "hinge": functional.multi_margin_loss}
_STOP = frozenset((
    "a", "an", "and", "are", "as", "at", "be", "been", "but", "by", "can", "do", "does", "for", "from", "has",
    "have", "if", "in", "into", "is", "it", "its", "may", "no", "not", "of", "on", "one", "or", "so", "such",
    "than", "that", "the", "their", "then", "there", "these", "they", "this", "to", "was", "when", "which",
    "will", "with", "you",
))  # fmt: skip
_ENDINGS = ("ations", "ation", "ingly", "ments", "ings", "ness", "ment", "ies", "ing", "ed", "es", "ly", "s")


def _tokens(text: str) -> Words:
    return re.findall(r"[A-Za-z_]+|\d+|[^\w\s]", text)


def _stem(word: str) -> str:
    for ending in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3:
            return word[: -len(ending)]
    return word


def _shape(word: str) -> str:
    return re.sub(r"\d+", "0", re.sub(r"[A-Z]+", "A", re.sub(r"[a-z]+", "a", word)))


def _only_words(words: Words) -> Words:
    return [word for word in words if word[0].isalpha() or word[0] == "_"]


def _without_stop_words(words: Words) -> Words:
    return [word for word in words if word.lower() not in _STOP]


def _lower(words: Words) -> Words:
    return [word.lower() for word in words]


def _parts(words: Words) -> Words:
    return [part for word in words for part in re.findall(r"[A-Z]?[a-z]+|[A-Z]+|[^A-Za-z_]+", word)]


def _pairs(words: Words) -> Words:
    return [f"{first} {second}" for first, second in itertools.pairwise(words)]


def _letters(words: Words) -> Words:
    line = " ".join(words)
    return [line[start : start + 3] for start in range(len(line) - 2)]


# Each is a chain of steps from tokens to features
PREPROCESSINGS: Mapping[str, Sequence[Callable[[Words], Words]]] = {
    "tokens": (),
    "lower case": (_lower,),
    "words only": (_only_words,),
    "words, lower case": (_only_words, _lower),
    "no stop words": (_only_words, _lower, _without_stop_words),
    "stems": (_only_words, _lower, lambda words: [_stem(word) for word in words]),
    "stems, no stop words": (_only_words, _lower, _without_stop_words, lambda words: [_stem(word) for word in words]),
    "parts of names": (_parts, _lower),
    "first four letters": (_only_words, _lower, lambda words: [word[:4] for word in words]),
    "shapes": (lambda words: [_shape(word) for word in words],),
    "stop words only": (_only_words, _lower, lambda words: [word for word in words if word in _STOP]),
    "pairs of words": (_only_words, _lower, _pairs),
    "pairs of tokens": (_pairs,),
    "three letters": (_lower, _letters),
}


def features(text: str, preprocessing: str) -> Words:
    """What a document becomes.

    Raises
    ------
    ValueError
        For a preprocessing that is not one of ``PREPROCESSINGS``.
    """
    if preprocessing not in PREPROCESSINGS:
        raise ValueError(f"preprocessing is {preprocessing!r}, expected one of {', '.join(PREPROCESSINGS)}")
    words = _tokens(text)
    for change in PREPROCESSINGS[preprocessing]:
        words = change(words)
    return words


def density(documents: Sequence[Sequence[str]]) -> float:
    """Different features over all features (arXiv 2111.01689), in [0, 1]; 0 where there are none."""
    total = sum(map(len, documents))
    return len({feature for document in documents for feature in document}) / total if total else 0.0


def linear_score(documents: Sequence[Sequence[str]], labels: Sequence[int], *, kind: str = "logistic") -> float:
    """Macro F1 on held-out documents of a linear classifier on counts of features, in [0, 1].

    Parameters
    ----------
    documents, labels
        Features and class of each; the first 60% of them are trained on, and only their features are known.
    kind
        ``"logistic"`` (cross-entropy) or ``"hinge"`` (as a support vector machine).

    Raises
    ------
    ValueError
        For another kind.
    """
    if kind not in _LOSSES:
        raise ValueError(f"kind is {kind!r}, expected 'logistic' or 'hinge'")
    border = round(_TRAIN_FRAC * len(documents))
    known = {feature: place for place, feature in enumerate(sorted({f for one in documents[:border] for f in one}))}
    counts = torch.zeros(len(documents), max(len(known), 1))
    for row, document in enumerate(documents):
        places = [known[feature] for feature in document if feature in known]
        counts[row] = torch.bincount(torch.tensor(places, dtype=torch.long), minlength=counts.shape[1]).float()
    counts = functional.normalize(counts.sqrt(), dim=1)
    truth = torch.tensor(labels)
    model = fitted(counts[:border], truth[:border], int(truth.max()) + 1, num_steps=40, learning_rate=0.1, decay=1e-3,
                   loss=_LOSSES[kind])  # fmt: skip
    with torch.no_grad():
        guess = model(counts[border:]).argmax(dim=1)
    return macro_f1(guess, truth[border:])


def macro_f1(guess: torch.Tensor, truth: torch.Tensor) -> float:
    """Mean over the classes that occur of 2 hits / (guesses + members), in [0, 1]."""
    found = []
    for one in truth.unique().tolist():
        hits = int(((guess == one) & (truth == one)).sum())
        found.append(2 * hits / (int((guess == one).sum()) + int((truth == one).sum())))
    return sum(found) / len(found)


def variants(texts: Sequence[str], labels: Sequence[int]) -> pd.DataFrame:
    """Density and score of every preprocessing.

    Returns
    -------
    DataFrame
        Indexed by ``preprocessing``: ``density`` of the training documents (nothing was trained for it), and the macro
        F1 of two classifiers, ``logistic`` and ``hinge``.
    """
    rows = {}
    for name in PREPROCESSINGS:
        documents = [features(text, name) for text in texts]
        rows[name] = {
            "density": density(documents[: round(_TRAIN_FRAC * len(documents))]),
            **{kind: linear_score(documents, labels, kind=kind) for kind in ("logistic", "hinge")},
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("preprocessing")


def spared(table: pd.DataFrame, by: str = "logistic") -> int:
    """How many trainings at each end of the densities could have been left out without losing the best variant."""
    place = int(table.sort_values("density")[by].to_numpy().argmax())
    return min(place, len(table) - 1 - place)
