"""Steps on ranks of several nodes, between which the link is slow: all ranks share one model, or each node has its own.

Frontier's partitioning (arXiv 2501.04266) gathers parameters where links are quick, and pays for it with memory. And
several settings measured on ranks that are started once, where :func:`effkit.activations.measure` starts them for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from effkit.account import Account
from effkit.activations import on_ranks
from effkit.activations.levers import Levers, complete, parted
from effkit.training import own_loss


def steps_ns(
    model: nn.Module, batch: Any, ways: Mapping[str, Mapping[str, Any]], *, link_bytes_per_s: float = 0.0,
    num_nodes: int = 2, ranks_per_node: int = 2, repeats: int = 5,
) -> dict[str, int]:  # fmt: skip
    """The fastest of the steps of each way, knobs of :class:`effkit.activations.Levers`, all repeated in turn."""
    num_ranks = num_nodes * ranks_per_node
    steps = [(batch, Levers(world_size=num_ranks, **how)) for how in ways.values()]
    with on_ranks.of_one_step(num_ranks, link_bytes_per_s=link_bytes_per_s, ranks_per_node=ranks_per_node) as ranks:
        seen = on_ranks.run(model, steps, ranks, repeats, loss=own_loss, optimizer=None, plan=None, progress=None)
    return {name: min(on_ranks.steps_ns(records)) for name, records in zip(ways, seen, strict=True)}


def measured(
    model: nn.Module, batch: Any, base: Account, settings: Mapping[str, Mapping[str, Any]], *, num_ranks: int = 2,
    repeats: int = 3,
) -> dict[str, Account]:  # fmt: skip
    """What :func:`effkit.activations.measure` says of each setting, on ranks that start once.

    Ranks are connected as those of ``base`` were, which was measured with links; all settings are of its size.
    """
    taken = {}
    with on_ranks.of_one_step(num_ranks, **base.calibration.of_ranks.link.between) as ranks:
        for name, how in settings.items():
            setting = complete(base.setting, {"world_size": num_ranks, **how})
            taken[name] = on_ranks.measured(
                model, batch, parted(setting)[1], setting, calibration=None, ranks=ranks, repeats=repeats,
                loss=own_loss, optimizer=None, plan=None, progress=None,
            )  # fmt: skip
    return taken
