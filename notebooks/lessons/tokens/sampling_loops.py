"""Which examples to label or to train on next: around errors (LoopTool), or by how often they are passed (Agentar)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import nn
from torch.nn import functional

from lessons.tokens.linear import fitted

WAYS = ("uniform", "around errors", "kinds of errors", "least margin")
_BUCKETS, _PIECE_LETTERS = 512, 200


def letter_triples(texts: Sequence[str]) -> torch.Tensor:
    """Hashed counts of three letters in a row, square roots of them, length 1, shape (texts, 512)."""
    rows = torch.zeros(len(texts), _BUCKETS)
    for row, text in zip(rows, texts, strict=True):
        places = [zlib.crc32(text[start : start + 3].encode()) % _BUCKETS for start in range(len(text) - 2)]
        row += torch.bincount(torch.tensor(places, dtype=torch.long), minlength=_BUCKETS)
    return functional.normalize(rows.sqrt(), dim=1)


@dataclass(frozen=True)
class Pool:
    """Examples whose labels cost something, and held-out ones.

    Shapes: ``x`` (examples, features), ``y`` (examples,), and the same held out.
    """

    x: torch.Tensor
    y: torch.Tensor
    held_out_x: torch.Tensor
    held_out_y: torch.Tensor


def by_module(sources: Mapping[str, str]) -> Pool:
    """Which file does a piece of program text come from? 200 letters each, no overlap, the last third held out.

    Every file gives what it has to the pool, so that long files are frequent there; of the rest 40 pieces each.
    """
    pieces, labels, later, later_labels = [], [], [], []
    for number, text in enumerate(sources.values()):
        starts = range(0, len(text) - _PIECE_LETTERS, _PIECE_LETTERS)
        border = 2 * len(starts) // 3
        pieces += [text[start : start + _PIECE_LETTERS] for start in starts[:border]]
        labels += [number] * border
        held_out = np.linspace(border, len(starts) - 1, 40).round().astype(int)
        later += [text[starts[place] : starts[place] + _PIECE_LETTERS] for place in held_out]
        later_labels += [number] * len(held_out)
    return Pool(letter_triples(pieces), torch.tensor(labels), letter_triples(later), torch.tensor(later_labels))


def accuracies(
    pool: Pool, way: str, *, num_first: int = 60, num_more: int = 50, num_rounds: int = 10, seed: int = 0
) -> pd.Series[float]:
    """Label some, fit a softmax regression, look where to label next, and again.

    What the model gets wrong among a round's labels, before it learns them, are the errors; probing so costs nothing.
    ``around errors``: half of the next round are the nearest free neighbours of errors, one each. ``kinds of errors``:
    half are new examples of classes in which errors were made, as often as they were. The other half, or what errors
    do not fill, is uniform. ``least margin`` has no errors in view: it asks where the two best classes are closest.

    Returns
    -------
    Series
        Accuracy held out, indexed by ``num_labels``.

    Raises
    ------
    ValueError
        For another way, or when the pool runs out.
    """
    if way not in WAYS:
        raise ValueError(f"way is {way!r}, expected one of {', '.join(WAYS)}")
    if num_first + num_rounds * num_more > len(pool.y):
        raise ValueError(
            f"{num_rounds} rounds need {num_first + num_rounds * num_more} examples, there are {len(pool.y)}"
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(pool.y), generator=generator)
    labelled, wrong, found = order[:num_first], order[:0], {}
    num_classes = int(torch.cat([pool.y, pool.held_out_y]).max()) + 1
    for number in range(num_rounds + 1):
        model = fitted(pool.x[labelled], pool.y[labelled], num_classes, num_steps=30, learning_rate=0.2, decay=1e-4)
        with torch.no_grad():
            found[len(labelled)] = float((model(pool.held_out_x).argmax(1) == pool.held_out_y).float().mean())
            if number < num_rounds:
                more = _more(pool, model, way, order[~torch.isin(order, labelled)], wrong, num_more)
                wrong = more[model(pool.x[more]).argmax(1) != pool.y[more]]
                labelled = torch.cat([labelled, more])
    return pd.Series(found, name=way).rename_axis("num_labels")


def _more(pool: Pool, model: nn.Linear, way: str, free: torch.Tensor, wrong: torch.Tensor, num: int) -> torch.Tensor:
    """The next examples to label, of those that are free, in the order in which chance has put them."""
    if way == "least margin":
        best = model(pool.x[free]).softmax(1).topk(2, dim=1).values
        return free[(best[:, 0] - best[:, 1]).argsort(stable=True)[:num]]
    chosen: list[int] = []
    if way != "uniform":
        for error in wrong[: num // 2]:
            left = free[~torch.isin(free, torch.tensor(chosen, dtype=torch.long))]
            if way == "around errors":
                chosen.append(int(left[(pool.x[left] @ pool.x[error]).argmax()]))
            else:
                chosen += left[pool.y[left] == pool.y[error]][:1].tolist()
    taken = torch.tensor(chosen, dtype=torch.long)
    return torch.cat([taken, free[~torch.isin(free, taken)][: num - len(taken)]])


def labels_to(curve: pd.Series[float], target: float) -> float:
    """Labels until the accuracy is reached, between two looks by a straight line; the last count if it is not."""
    best = curve.cummax()
    if best.iloc[-1] < target:
        return float(best.index[-1])
    if best.iloc[0] >= target:
        return float(best.index[0])
    place = int((best >= target).to_numpy().argmax())
    low, high = best.iloc[place - 1], best.iloc[place]
    first, second = best.index[place - 1], best.index[place]
    return float(first + (second - first) * (target - low) / (high - low))


def pass_rates(num_items: int = 20_000, *, seed: int = 0) -> np.ndarray:
    """Invented: how often a model passes each item. Beta(0.4, 0.4), mostly near never or always, shape (items,)."""
    return np.random.default_rng(seed).beta(0.4, 0.4, num_items)


def teaches(rates: np.ndarray, group: int = 8) -> np.ndarray:
    """Chance that a group of answers to an item is neither all right nor all wrong: 1 - p^G - (1 - p)^G.

    Otherwise rewards relative to the group are all zero, and nothing is learnt.

    Raises
    ------
    ValueError
        For a group of less than 2, or a rate that is no probability.
    """
    if group < 2:
        raise ValueError(f"group is {group}, expected at least 2 answers to compare")
    if len(rates) and (rates.min() < 0 or rates.max() > 1):
        raise ValueError(f"pass rates go from {rates.min():.3g} to {rates.max():.3g}, expected 0 to 1")
    return 1 - rates**group - (1 - rates) ** group


def weighted(rates: np.ndarray, *, num_probes: int = 4, group: int = 8, seed: int = 0) -> pd.DataFrame:
    """Items drawn in proportion to their estimated difficulty p (1 - p), against all alike.

    Returns
    -------
    DataFrame
        Indexed by ``sampling``: ``uniform``; ``estimated``, from a few answers each, (passes + 1/2) / (probes + 1);
        ``known``, the rates themselves. ``teaching_frac`` of the drawn items; ``distinct_frac``, the items that the
        sampling amounts to ((sum of weights)² / sum of squares) over all; ``probes``, answers per item spent on it.
    """
    passed = np.random.default_rng(seed + 1).binomial(num_probes, rates)
    estimate = (passed + 0.5) / (num_probes + 1)
    weights = {"uniform": np.ones(len(rates)), "estimated": estimate * (1 - estimate), "known": rates * (1 - rates)}
    useful = teaches(rates, group)
    rows = {
        name: {
            "teaching_frac": float((weight * useful).sum() / weight.sum()),
            "distinct_frac": float(weight.sum() ** 2 / (weight**2).sum() / len(rates)),
            "probes": {"estimated": num_probes}.get(name, 0),
        }
        for name, weight in weights.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("sampling")
