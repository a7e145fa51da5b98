"""Which prediction answers for which object: one-to-one as in DETR, one-to-many as in the heads of Co-DETR."""

from __future__ import annotations

from functools import cache
from itertools import permutations

import torch

MOST_WAYS = 50_000  # to try for one image


@cache
def _ways(num_queries: int, num_objects: int) -> torch.Tensor:
    return torch.tensor(list(permutations(range(num_queries), num_objects)))


def one_to_one(cost: torch.Tensor) -> torch.Tensor:
    """The cheapest way to give each object a query of its own, found by trying all of them.

    DETR uses the Hungarian algorithm (Carion et al., arXiv 2005.12872). With a handful of objects the same
    optimum comes from looking at every way at once, for a whole batch.

    Parameters
    ----------
    cost
        Shape (batch, queries, objects).

    Returns
    -------
    Tensor
        Shape (batch, objects): the query of each object.

    Raises
    ------
    ValueError
        When there are fewer queries than objects, or too many ways to try.

    Examples
    --------
    >>> one_to_one(torch.tensor([[[1.0, 2.0], [1.5, 9.0], [9.0, 9.0]]]))  # object 0 yields query 0 to object 1
    tensor([[1, 0]])
    """
    _, num_queries, num_objects = cost.shape
    if num_queries < num_objects:
        raise ValueError(f"{num_objects} objects cannot each have one of {num_queries} queries; give at least as many")
    num_ways = 1
    for taken in range(num_objects):
        num_ways *= num_queries - taken
    if num_ways > MOST_WAYS:
        raise ValueError(f"{num_queries} queries and {num_objects} objects make {num_ways} ways, at most {MOST_WAYS}")
    ways = _ways(num_queries, num_objects)
    totals = sum(cost[:, ways[:, one], one] for one in range(num_objects))
    assert isinstance(totals, torch.Tensor)
    return ways[totals.argmin(1)]


def one_to_many(centres: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Every place inside a box answers for it; inside several, for the smallest (as in FCOS, arXiv 1904.01355).

    Parameters
    ----------
    centres
        Of the places, shape (places, 2): x, y.
    boxes
        Shape (batch, objects, 4): centre x, centre y, width, height.

    Returns
    -------
    Tensor
        Shape (batch, places): the object's number, or -1 for background.
    """
    away = (centres[None, :, None] - boxes[:, None, :, :2]).abs()  # batch, places, objects, 2
    inside = (away <= boxes[:, None, :, 2:] / 2).all(-1)
    area = (boxes[..., 2] * boxes[..., 3])[:, None].expand(inside.shape).masked_fill(~inside, torch.inf)
    return torch.where(inside.any(-1), area.argmin(-1), -1)
