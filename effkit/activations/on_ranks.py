"""A training step on real ranks of this machine: what they are sent, do and send, and the account of what they saw.

Each rank runs :func:`main`, as :mod:`effkit.ranks` says.
"""

from __future__ import annotations

import json
import math
import pickle
import tempfile
from collections import Counter
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from effkit.account import Account
from effkit.activations import stepping
from effkit.activations.levers import Levers
from effkit.activations.real_step import observe
from effkit.activations.sharding import spread
from effkit.activations.timeline import PEAK, Timeline
from effkit.lab import Progress
from effkit.ranks.group import joined
from effkit.ranks.launching import MOST_RANKS, Ranks
from effkit.training import Loss, MakeOptimizer, residents, still

TIME, BY_RANK, SENT_BYTES = "Time of one step", "Peak memory by rank", "Communication of one step"
_COLLECTIVES = {  # which of the operator's tensors is whole: the one that no rank has only a part of
    "c10d::_allgather_base_": ("all-gather", 0), "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::allreduce_": ("all-reduce", 0), "c10d::broadcast_": ("broadcast", 0),
    "_c10d_functional::all_reduce": ("all-reduce", 0), "_c10d_functional::all_reduce_": ("all-reduce", 0),
    "_c10d_functional::reduce_scatter_tensor": ("reduce-scatter", 0), "_c10d_functional::broadcast": ("broadcast", 0),
}  # fmt: skip
_TIMEOUT_S = 600.0


def measured(
    model: torch.nn.Module, batch: Any, levers: Levers, setting: dict[str, Any], *, loss: Loss,
    optimizer: MakeOptimizer | None, plan: Any, repeats: int, progress: Progress | None, calibration: Any,
    ranks: Ranks | None = None,
) -> Account:  # fmt: skip
    """The peak of the rank where it is highest, and what all ranks saw; ValueError for what cannot be sent to them.

    They are started for this, unless there are ``ranks`` whose work this module is.
    """
    if levers.world_size > MOST_RANKS:
        raise ValueError(f"measure() starts at most {MOST_RANKS} ranks; given: {levers.world_size}. Ask forecast()")
    job = {"model": model, "batch": batch, "levers": levers, "loss": loss, "optimizer": optimizer, "plan": plan}
    with ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="effkit-job-"))) / "job"
        path.write_bytes(_packed(job))
        ranks = ranks or stack.enter_context(Ranks(levers.world_size, __name__))
        run = {"job": str(path), "repeats": repeats}
        seen = ranks.run(run, timeout_s=_TIMEOUT_S, progress=progress, total=1 + repeats)
        records = [json.loads((seen / f"rank{rank}.json").read_text()) for rank in range(levers.world_size)]
    fullest = max(records, key=lambda record: int(record["peak_bytes"]))
    slowest = [max(step, key=lambda phases: sum(phases.values()))
               for step in zip(*(record["phases"] for record in records), strict=True)]  # fmt: skip
    phases = min(slowest, key=lambda phases: sum(phases.values()))
    peaks = {f"rank {record['rank']}": record["peak_bytes"] for record in records}
    where = f"rank {fullest['rank']}, the fullest of {len(records)} on {fullest['where']}, {fullest['backend']}"
    return Account.of(
        PEAK, "bytes", fullest["rows"], total=fullest["peak_bytes"], source=f"{fullest['source']}; {where}",
        setting=setting, calibration=calibration,
        companions=(
            Account.of(TIME, "ns", phases, total=sum(phases.values()), setting=setting,
                       source=f"wall time of the slowest rank, fastest of {repeats}"),
            sent_account(fullest["sent"]),
            Account.of(BY_RANK, "bytes", peaks, total=sum(peaks.values()), source=fullest["source"]),
        ),
    )  # fmt: skip


def sent_account(sent: dict[str, int], **more: Any) -> Account:
    """What :func:`collective_bytes` says of a step."""
    return Account.of(SENT_BYTES, "bytes", sent, total=sum(sent.values()), source="the collectives of the step", **more)


def collective_bytes(timeline: Timeline, micro_batches: int = 1) -> dict[str, int]:
    """Bytes of the whole tensors of all collectives in a step, by kind, the largest first.

    On a ring of n ranks each sends (n - 1) / n of that in an all-gather and in a reduce-scatter, twice as much in an
    all-reduce.
    """
    amounts: Counter[str] = Counter()
    for signature, count in zip(timeline.signatures, timeline.times_run(micro_batches), strict=True):
        if signature.name in _COLLECTIVES:
            kind, whole = _COLLECTIVES[signature.name]
            shape, _, dtype = signature.given[whole]
            amounts[kind] += int(count) * math.prod(shape) * getattr(torch, dtype.removeprefix("torch.")).itemsize
    return dict(amounts.most_common())


def _packed(job: dict[str, Any]) -> bytes:
    """What is sent to the ranks, with functions and classes of a notebook as they are."""
    import cloudpickle

    try:
        packed: bytes = cloudpickle.dumps(job)
    except (TypeError, pickle.PicklingError) as error:
        raise ValueError("ranks are processes of their own, to which model, batch, loss and optimizer are sent, and "
                         f"one of these cannot be: {error}") from error  # fmt: skip
    return packed


def main(folder: Path, met: Path | None = None) -> None:
    """Be one of the ranks."""
    with joined(folder, met) as member:
        job = pickle.loads(Path(member.run["job"]).read_bytes())  # of the process that started this one
        levers: Levers = job["levers"]
        batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(member.device), job["batch"])
        model, make = spread(
            job["model"].to(member.device), levers, levers.optimizer(job["optimizer"]), plan=job["plan"]
        )
        alone = levers.within_a_rank
        update = still(model.parameters(), make)
        step = partial(stepping.run, model, batch, job["loss"], update, alone)
        for _ in range(2):  # the first makes the optimizer's state, and wrappers learn the order of layers
            step()
        seen = observe(step, model, lambda: residents(model, update, batch))
        member.tick()
        phases = []
        for _ in range(int(member.run["repeats"])):
            dist.barrier()
            phases.append(stepping.phases_ns(model, batch, job["loss"], update, alone))
            member.tick()
        member.write({"rows": seen.rows, "peak_bytes": seen.peak_bytes, "source": seen.source, "phases": phases,
                      "sent": collective_bytes(seen.timeline)})  # fmt: skip
