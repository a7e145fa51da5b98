"""Which ranks form a group when attention and experts are mapped apart: Parallel Folding (arXiv 2504.14960)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd

ATTENTION = ("tp", "cp", "dp", "pp")
EXPERTS = ("etp", "ep", "edp", "pp")


def groups(
    world_size: int, *, tp: int = 1, cp: int = 1, ep: int = 1, etp: int = 1, pp: int = 1, folded: bool = True
) -> pd.DataFrame:
    """The groups of every rank, in Megatron's order: tensor parallelism varies fastest, pipeline stages slowest.

    * Attention: rank = tp + TP (cp + CP (dp + DP pp)), where DP = world / (TP CP PP).
    * Experts, folded: rank = etp + ETP (ep + EP (edp + EDP pp)), where EDP = world / (ETP EP PP). A mapping of its own
      over the ranks of a stage: a group of experts may lie across attention's tensor and context parallelism.
    * Experts, not folded: cut as attention is, EP a part of DP; what is left of DP, and all of CP, hold copies: rank =
      tp + TP (cp + CP (ep + EP (d + DP / EP pp))).

    Parameters
    ----------
    world_size
        Number of ranks.
    tp, cp, pp
        Sizes of attention's tensor, context and pipeline parallelism.
    ep, etp
        Sizes of the experts' own parallelism: expert, and tensor within an expert.
    folded
        Whether experts have a mapping of their own.

    Returns
    -------
    Indexed by ``rank``: under ``attention`` the columns ``tp``, ``cp``, ``dp``, ``pp``, under ``experts`` ``etp``,
    ``ep``, ``edp``, ``pp``: the ranks of its group, a tuple in ascending order.

    Raises
    ------
    ValueError
        When a size is below 1 or they do not divide; when not folded, also when ``etp`` is not ``tp`` or ``ep`` does
        not divide attention's data parallelism.
    """
    _check_sizes(world_size=world_size, tp=tp, cp=cp, ep=ep, etp=etp, pp=pp)
    dp = _rest(world_size, tp=tp, cp=cp, pp=pp)
    edp = _rest(world_size, etp=etp, ep=ep, pp=pp)
    # Axes from the slowest to the fastest.
    attention = np.arange(world_size).reshape(pp, dp, cp, tp)
    table = {("attention", name): _members(attention, axes) for name, axes in _axes("pp", "dp", "cp", "tp").items()}
    if folded:
        experts = np.arange(world_size).reshape(pp, edp, ep, etp)
        own = {name: _members(experts, axes) for name, axes in _axes("pp", "edp", "ep", "etp").items()}
    else:
        if etp != tp:
            raise ValueError(f"etp is {etp} and tp {tp}, expected the same without folding; fold, or make them equal.")
        if dp % ep:
            raise ValueError(f"ep is {ep}, expected a divisor of dp = {dp} without folding; fold, or use a smaller ep.")
        experts = np.arange(world_size).reshape(pp, dp // ep, ep, cp, tp)
        own = {
            name: _members(experts, axes) for name, axes in {"etp": (4,), "ep": (2,), "edp": (1, 3), "pp": (0,)}.items()
        }
    table |= {("experts", name): own[name] for name in EXPERTS}
    ordered = [*(("attention", name) for name in ATTENTION), *(("experts", name) for name in EXPERTS)]
    return pd.DataFrame(table, index=pd.RangeIndex(world_size, name="rank"))[ordered]


def crossing(
    world_size: int,
    *,
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
    etp: int = 1,
    pp: int = 1,
    node_size: int = 8,
    num_tokens: int,
    hidden: int,
    top_k: int,
    bytes_per_value: int = 2,
) -> pd.DataFrame:
    """Bytes of one expert-parallel layer per stage, forward, within nodes and across them: folded against not.

    Every rank holds ``num_tokens`` tokens; each goes to ``top_k`` experts, evenly over the group. Dispatch and combine
    send top_k x num_tokens x hidden values a rank, 1 / EP to every member, itself included. With ETP > 1 what a
    rank received is gathered by all that share its experts, and their results are scattered back: a copy to every other
    member (a ring sends as much in all, over other pairs). Not folded, ETP is TP.

    Parameters
    ----------
    world_size, tp, cp, ep, etp, pp
        As for :func:`groups`.
    node_size
        Ranks of a node, which have consecutive numbers.
    num_tokens
        Tokens that a rank holds when it comes to the layer, after sequence and context parallelism.
    hidden, top_k
        Width of the model; experts per token.
    bytes_per_value
        2 for bfloat16.

    Returns
    -------
    Indexed by ``mapping`` (``folded``, ``unfolded``) and ``exchange`` (``dispatch``, ``combine``, ``all_gather``,
    ``reduce_scatter``): ``own_bytes`` (to itself), ``within_bytes``, ``across_bytes``, summed over all ranks of all
    stages; ``across_frac`` of all that travels, NaN where nothing does. A mapping that these sizes do not admit has no
    numbers, and ``attrs["impossible"]`` says why.

    Raises
    ------
    ValueError
        As :func:`groups` when folded; when ``node_size`` does not divide ``world_size``, ``ep`` does not divide
        ``num_tokens * top_k``, or a size is below 1.
    """
    _check_sizes(
        node_size=node_size, num_tokens=num_tokens, hidden=hidden, top_k=top_k, bytes_per_value=bytes_per_value
    )
    if world_size % node_size:
        raise ValueError(f"node_size is {node_size}, expected a divisor of world_size = {world_size}; use whole nodes.")
    mappings: dict[str, pd.DataFrame | str] = {"folded": groups(world_size, tp=tp, cp=cp, ep=ep, etp=etp, pp=pp)}
    if num_tokens * top_k % ep:
        raise ValueError(
            f"num_tokens * top_k is {num_tokens * top_k}, expected a multiple of ep = {ep}; change num_tokens."
        )
    try:
        mappings["unfolded"] = groups(world_size, tp=tp, cp=cp, ep=ep, etp=tp, pp=pp, folded=False)
    except ValueError as impossible:
        mappings["unfolded"] = str(impossible)
    routed_bytes = num_tokens * top_k * hidden * bytes_per_value
    sent = {"dispatch": ("ep", routed_bytes // ep), "combine": ("ep", routed_bytes // ep)}
    sent |= {"all_gather": ("etp", routed_bytes), "reduce_scatter": ("etp", routed_bytes)}
    rows = {}
    for mapping, table in mappings.items():
        for exchange, (name, pair_bytes) in sent.items():
            if isinstance(table, str):
                rows[mapping, exchange] = (pd.NA, pd.NA, pd.NA)
                continue
            within, across = _pairs(table["experts", name], node_size)
            own = world_size if name == "ep" else 0  # a rank gathers nothing from itself
            rows[mapping, exchange] = (own * pair_bytes, within * pair_bytes, across * pair_bytes)
    result = pd.DataFrame.from_dict(rows, orient="index", columns=["own_bytes", "within_bytes", "across_bytes"])
    result = result.astype("Int64")
    result.index = pd.MultiIndex.from_tuples(list(rows), names=["mapping", "exchange"])
    travelling = (result["within_bytes"] + result["across_bytes"]).astype("Float64")
    result["across_frac"] = result["across_bytes"] / travelling.where(travelling > 0)
    result.attrs["impossible"] = {name: why for name, why in mappings.items() if isinstance(why, str)}
    return result


def _axes(*names: str) -> Mapping[str, tuple[int]]:
    return {name: (axis,) for axis, name in enumerate(names)}


def _members(ranks: np.ndarray, axes: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Per rank, the ranks that differ from it along these axes alone."""
    last = range(ranks.ndim - len(axes), ranks.ndim)
    size = int(np.prod([ranks.shape[axis] for axis in axes]))
    by_group = np.sort(np.moveaxis(ranks, axes, last).reshape(-1, size), axis=1)
    of_rank: list[tuple[int, ...]] = [()] * ranks.size
    for row in by_group.tolist():
        members = tuple(row)
        for rank in members:
            of_rank[rank] = members
    return of_rank


def _pairs(members: pd.Series, node_size: int) -> tuple[int, int]:
    """Ordered pairs of different ranks that share a group: in one node, and in two."""
    within = across = 0
    for ranks in set(members):
        nodes = np.unique(np.asarray(ranks) // node_size, return_counts=True)[1]
        inside = int((nodes * nodes).sum())
        within += inside - len(ranks)
        across += len(ranks) ** 2 - inside
    return within, across


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name} is {size!r}, expected a whole number of at least 1; correct it.")


def _rest(world_size: int, **sizes: int) -> int:
    product = int(np.prod(list(sizes.values())))
    if world_size % product:
        names = " * ".join(sizes)
        raise ValueError(f"{names} is {product}, expected a divisor of world_size = {world_size}; change one of them.")
    return world_size // product
