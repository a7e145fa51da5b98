"""Steps on ranks of several nodes, between which the link is slow: all ranks share one model, or each node has its own.

Frontier's partitioning (arXiv 2501.04266) gathers parameters where links are quick, and pays for it with memory. And
several settings measured on ranks that are started once, where :func:`effkit.activations.measure` starts them for each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# This module is the ranks' work, and imported before they fork: what each rank of a Llama needs is imported once.
import torch._dynamo
import torch.distributed.fsdp
import torch.distributed.optim  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from torch import nn

from effkit.account import Account
from effkit.activations import on_ranks
from effkit.activations.levers import Levers, complete, parted
from effkit.activations.on_ranks import main  # noqa: F401
from effkit.activations.timeline import PEAK
from effkit.ranks.launching import Ranks
from effkit.training import own_loss


def steps_ns(
    model: nn.Module, batch: Any, ways: Mapping[str, Mapping[str, Any]], *, link_bytes_per_s: float = 0.0,
    num_nodes: int = 2, ranks_per_node: int = 2, repeats: int = 5,
) -> dict[str, int]:  # fmt: skip
    """The fastest of the steps of each way, knobs of :class:`effkit.activations.Levers`, all repeated in turn."""
    num_ranks = num_nodes * ranks_per_node
    steps = [(batch, Levers(world_size=num_ranks, **how)) for how in ways.values()]
    with Ranks(num_ranks, __name__, link_bytes_per_s=link_bytes_per_s, ranks_per_node=ranks_per_node) as ranks:
        seen = on_ranks.run(model, steps, ranks, repeats, loss=own_loss, optimizer=None, plan=None, progress=None)
    return {name: min(on_ranks.steps_ns(records)) for name, records in zip(ways, seen, strict=True)}


def measured(
    model: nn.Module, batch: Any, base: Account, settings: Mapping[str, Mapping[str, Any]], *, num_ranks: int = 2,
    repeats: int = 3,
) -> dict[str, Account]:  # fmt: skip
    """The peak of the fullest rank under each setting, with the step's time and what it sends as companions.

    Ranks are connected as those of ``base`` were, which was measured with links; all settings are of its size.
    """
    knobs = {name: complete(base.setting, {"world_size": num_ranks, **how}) for name, how in settings.items()}
    steps = [(batch, parted(one)[1]) for one in knobs.values()]
    with Ranks(num_ranks, __name__, **base.calibration.of_ranks.link.between) as ranks:
        seen = on_ranks.run(model, steps, ranks, repeats, loss=own_loss, optimizer=None, plan=None, progress=None)
    return {name: _account(records, knobs[name]) for name, records in zip(knobs, seen, strict=True)}


def _account(records: on_ranks.Records, setting: dict[str, Any]) -> Account:
    fullest, time_ns = max(records, key=lambda record: int(record["peak_bytes"])), min(on_ranks.steps_ns(records))
    time = Account.of(
        on_ranks.TIME, "ns", {"step": time_ns}, total=time_ns, source="the fastest step of the slowest rank"
    )
    return Account.of(
        PEAK, "bytes", fullest["rows"], total=fullest["peak_bytes"], source=fullest["source"], setting=setting,
        companions=(time, on_ranks.sent_account(fullest["sent"])),
    )  # fmt: skip
