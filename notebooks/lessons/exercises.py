"""What the exercises accept: the right answer alone. A check raises an AssertionError that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Collection

import pandas as pd

from effkit import padding


def largest(answer: int, holds: Callable[[int], bool], *, most: int, what: str) -> None:
    """Accept the largest whole number up to ``most`` for which ``holds``, and nothing else."""
    _whole(answer, 1, most, what)
    assert holds(answer), f"{answer} {what} are too many"
    assert not any(map(holds, range(answer + 1, most + 1))), f"more than {answer} {what} would do: ask for the most"


def smallest(answer: int, holds: Callable[[int], bool], *, most: int, what: str) -> None:
    """Accept the smallest whole number from 1 for which ``holds``, and nothing else."""
    _whole(answer, 1, most, what)
    assert holds(answer), f"{answer} {what} are too few"
    assert not any(map(holds, range(1, answer))), f"fewer than {answer} {what} would do: ask for the fewest"


def exactly(answer: Collection[str], expected: Collection[str], what: str) -> None:
    """Accept the same names in any order, and nothing else."""
    extra, missing = set(answer) - set(expected), set(expected) - set(answer)
    assert not extra, f"{len(extra)} too many {what}, {sorted(extra)[0]} among them"
    assert not missing, f"{len(missing)} {what} are missing"


def near(answer: float, expected: float, what: str, *, rel: float = 1e-3) -> None:
    """Accept a number within ``rel`` of the expected one."""
    assert isinstance(answer, int | float), f"{what} is {answer!r}, expected a number"
    assert abs(answer - expected) <= rel * abs(expected), f"{what} is not {answer:,.4g}"


def little_padding(plan: padding.Plan, lengths: pd.DataFrame) -> None:
    """Accept a plan of all these examples with less than 10% padding in at most 20 batches."""
    assert len(plan.lengths) == len(lengths), f"the plan has {len(plan.lengths)} of {len(lengths)} examples"
    share = plan.account().share["padding"]
    assert share < 0.10, f"{share:.1%} of the cells are still padding: more buckets, or another rule for their edges?"
    assert len(plan.batches) <= 20, f"{len(plan.batches)} batches: fewer buckets leave fewer ragged ends"


def even_placement(placement: Collection[int], popularity: pd.Series[float], *, most_frac: float = 0.53) -> None:
    """Accept a rank, 0 or 1, for every expert, such that neither rank has more than its share of the load."""
    ranks = pd.Series(list(placement))
    assert len(ranks) == len(popularity), f"{len(ranks)} ranks for {len(popularity)} experts"
    assert set(ranks) <= {0, 1}, "there are two ranks, 0 and 1"
    share = popularity.groupby(ranks.to_numpy()).sum().max() / popularity.sum()
    assert share < most_frac, f"one rank has {share:.1%} of the load"


def _whole(answer: int, least: int, most: int, what: str) -> None:
    assert isinstance(answer, int), f"{answer!r} {what}: expected a whole number"
    assert least <= answer <= most, f"{answer} {what}: expected {least} to {most}"
