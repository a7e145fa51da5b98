"""A small vocabulary in place of a large one (TinyHelen), with what is left out paid for, so that bits compare."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import torch

from lessons.tokens.next_letter import NextLetter, bits, train

CONTEXT, EMBEDDING, HIDDEN = 4, 32, 64
_ENDINGS = ("ing", "ed", "ly", "tion", "s", "er")


def words(text: str) -> list[str]:
    """A text cut into words, marks and stretches of white space; joined again it is the text."""
    return re.findall(r"\w+|[^\w\s]|\s+", text)


def kind(word: str) -> str:
    """What stands for a word that is left out: its outer form."""
    if word.isspace():
        return "<space>"
    if word.isdigit():
        return "<number>"
    if not word.isalpha():
        return "<name>"
    if not word.islower():
        return "<Capital>"
    return next((f"<{ending}>" for ending in _ENDINGS if word.endswith(ending)), "<word>")


@dataclass(frozen=True)
class Reduced:
    """A text of fewer different words, and the bits that say which ones they were.

    Attributes
    ----------
    train_ids, held_out_ids
        Words as numbers, shape (words,).
    vocabulary
        Different ones, kinds included.
    naming_bits
        What it takes to name the words of the held-out text that kinds stand for.
    held_out_letters
        Letters of the held-out text, as it was.
    """

    train_ids: torch.Tensor
    held_out_ids: torch.Tensor
    vocabulary: int
    naming_bits: float
    held_out_letters: int


def reduced(train_text: str, held_out_text: str, num_words: int | None = None) -> Reduced:
    """Keep the most frequent words; all others become their kind.

    A word that a kind stands for costs minus the logarithm of its share among the training words of that kind, where it
    was seen, and otherwise an escape and its letters one by one, by their frequency. With these bits the original text
    can be restored: a code in two parts, and bits per letter of different vocabularies compare.

    Parameters
    ----------
    num_words
        How many to keep; all that occur twice or more, unless given.

    Raises
    ------
    ValueError
        When fewer than one is to be kept.
    """
    if num_words is not None and num_words < 1:
        raise ValueError(f"num_words is {num_words}, expected at least 1")
    seen, later = words(train_text), words(held_out_text)
    frequent = [word for word, count in Counter(seen).most_common() if count > 1][:num_words]
    kept = set(frequent)
    of_kind: dict[str, Counter[str]] = defaultdict(Counter)
    for word in seen:
        if word not in kept:
            of_kind[kind(word)][word] += 1
    kinds = sorted({*of_kind, *(kind(word) for word in later if word not in kept)})
    numbers = {word: number for number, word in enumerate([*frequent, *kinds])}
    letters = Counter(train_text)
    num_letters = len(train_text) + 256
    naming = 0.0
    for word in later:
        if word in kept:
            continue
        group = of_kind[kind(word)]
        # Witten and Bell's escape: as many new words as there were different ones
        total = group.total() + max(len(group), 1)
        if word in group:
            naming -= math.log2(group[word] / total)
        else:
            naming -= math.log2(max(len(group), 1) / total)
            naming -= sum(math.log2((letters[letter] + 1) / num_letters) for letter in f"{word} ")

    def numbered(tokens: Sequence[str]) -> torch.Tensor:
        return torch.tensor([numbers[word if word in kept else kind(word)] for word in tokens])

    return Reduced(numbered(seen), numbered(later), len(numbers), naming, len(held_out_text))


def shares(vocabulary: int) -> pd.DataFrame:
    """Parameters and training FLOPs per word (6 per weight of a product) of the model, part by part.

    Returns
    -------
    DataFrame
        Indexed by ``part`` (embedding, hidden layer, softmax): ``parameters``, ``flops``; a look-up costs no product.
    """
    inside = CONTEXT * EMBEDDING * HIDDEN
    return pd.DataFrame(
        {
            "parameters": [vocabulary * EMBEDDING, inside + HIDDEN, vocabulary * (HIDDEN + 1)],
            "flops": [0, 6 * inside, 6 * vocabulary * HIDDEN],
        },
        index=pd.Index(["embedding", "hidden layer", "softmax"], name="part"),
    )


def trained(
    text: Reduced, budget_flops: float, *, learning_rate: float = 3e-3, batch_size: int = 64, seed: int = 0
) -> pd.Series[float]:
    """A model trained on a text for as many steps as the FLOPs allow.

    Returns
    -------
    Series
        ``vocabulary, num_steps``; ``seeming_bits`` per letter, of the reduced text alone; ``naming_bits`` per letter;
        ``bits`` per letter of the original text, their sum.
    """
    flops = int(shares(text.vocabulary)["flops"].sum()) * batch_size
    num_steps = max(1, round(budget_flops / flops))
    torch.manual_seed(seed)
    model = NextLetter(text.vocabulary, CONTEXT, EMBEDDING, HIDDEN)
    train(model, [text.train_ids], num_steps=num_steps, learning_rate=learning_rate, batch_size=batch_size, seed=seed)
    seeming = bits(model, text.held_out_ids) * len(text.held_out_ids) / text.held_out_letters
    naming = text.naming_bits / text.held_out_letters
    return pd.Series({"vocabulary": text.vocabulary, "num_steps": num_steps, "seeming_bits": seeming,
                      "naming_bits": naming, "bits": seeming + naming})  # fmt: skip
