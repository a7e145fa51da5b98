"""A training step on real ranks of this machine: what they are sent, do and send, and the account of what they saw.

Each rank runs :func:`main`, as :mod:`effkit.ranks` says.
"""

from __future__ import annotations

import json
import pickle
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map_only

from effkit.account import Account
from effkit.activations import stepping
from effkit.activations.collectives import RanksClock, RanksRun, collective_bytes
from effkit.activations.forecasting import Forecaster
from effkit.activations.levers import Levers
from effkit.activations.real_step import observe
from effkit.activations.sharding import DDP, FSDP2, MODEL, ZERO1, ZERO2, spread
from effkit.activations.time_model import Clock
from effkit.activations.timeline import PEAK
from effkit.lab import Progress
from effkit.ranks.group import joined
from effkit.ranks.launching import MOST_RANKS, Ranks
from effkit.ranks.links import Link
from effkit.training import Loss, MakeOptimizer, residents, still

TIME, BY_RANK, SENT_BYTES = "Time of one step", "Peak memory by rank", "Communication of one step"
_TIMEOUT_S = 600.0
_IMPORTS = "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.optim"  # in every rank, seconds each
_QUIET = "effkit.", "transformers."  # modules whose import starts no thread, which no fork would survive
Records = list[dict[str, Any]]  # of each rank


def measured(
    model: torch.nn.Module, batch: Any, levers: Levers, setting: dict[str, Any], *, calibration: Any, ranks: Ranks,
    repeats: int, **job: Any,
) -> Account:  # fmt: skip
    """The peak of the rank where it is highest, and what all ranks saw; see :func:`run`."""
    (records,) = run(model, [(batch, levers)], ranks, repeats, **job)
    fullest = max(records, key=lambda record: int(record["peak_bytes"]))
    phases = min(_slowest(records), key=lambda phases: sum(phases.values()))
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


def steps_ns(records: Records) -> list[int]:
    """Each repeat of one setting, on the rank that took longest."""
    return [sum(phases.values()) for phases in _slowest(records)]


def clock_of_ranks(
    model: torch.nn.Module, forecaster: Forecaster, clock: Clock, links: Mapping[str, Link], repeats: int, **job: Any
) -> RanksClock:
    """From a step of each wrapper on ranks that are connected as the links are, and others that check it."""
    size, link = forecaster.size, next(iter(links.values()))
    on = partial(Levers, world_size=link.num_ranks)
    fitted = [(size, levers) for levers in (Levers(), on(shard=FSDP2), on(shard=DDP), on(shard=ZERO1))]
    other = replace(size, num_rows=size.num_rows // 2 or 2)
    checks = [(other, on(shard=DDP)), (size if size.num_rows > 1 else other, on(shard=ZERO2, micro_batches=2))]
    if clock.knows(recomputed := on(checkpoint_every=1)):  # it has blocks
        checks += [(size, recomputed), (size, on(wrap=MODEL))]
    steps = [*fitted, *checks]
    with of_one_step(link.num_ranks, **link.between) as ranks:
        start(ranks, model)
        timelines = [forecaster.timeline(rows, levers) for rows, levers in steps]  # while the ranks' modules are loaded
        seen = run(model, [(forecaster.batch(rows), levers) for rows, levers in steps], ranks, repeats, **job)
    runs = [RanksRun(levers, timeline, steps_ns(records), forecaster.growth(rows))
            for (rows, levers), timeline, records in zip(steps, timelines, seen, strict=True)]  # fmt: skip
    return RanksClock.fit(clock, links, runs[: len(fitted)], runs[len(fitted) :])


def _slowest(records: Records) -> list[dict[str, int]]:
    return [max(step, key=lambda phases: sum(phases.values()))
            for step in zip(*(record["phases"] for record in records), strict=True)]  # fmt: skip


def run(
    model: torch.nn.Module, steps: Sequence[tuple[Any, Levers]], ranks: Ranks, repeats: int, *, loss: Loss,
    optimizer: MakeOptimizer | None, plan: Any, progress: Progress | None,
) -> list[Records]:  # fmt: skip
    """What each rank saw of each of these steps: of a batch, with levers, all repeated in turn.

    A step whose levers are of one process is run by every rank at once, and nothing is sent. ValueError for what cannot
    be sent to the ranks.
    """
    start(ranks, model)
    job = {"model": model, "steps": steps, "loss": loss, "optimizer": optimizer, "plan": plan}
    with tempfile.TemporaryDirectory(prefix="effkit-job-") as folder:
        path = Path(folder) / "job"
        path.write_bytes(_packed(job))
        told = {"job": str(path), "num_steps": len(steps), "repeats": repeats}
        total = len(steps) * (1 + repeats)
        seen = ranks.run(told, timeout_s=_TIMEOUT_S, progress=progress, total=total)
        records = [json.loads((seen / f"rank{rank}.json").read_text()) for rank in range(ranks.num_ranks)]
    return [[{**record, **record["steps"][number]} for record in records] for number in range(len(steps))]


def of_one_step(num_ranks: int, **on: Any) -> Ranks:
    """Ranks that do this module's work; ValueError for more than are started here."""
    if num_ranks > MOST_RANKS:
        raise ValueError(f"measure() starts at most {MOST_RANKS} ranks; given: {num_ranks}. Ask forecast()")
    return Ranks(num_ranks, __name__, **on)


def start(ranks: Ranks, model: torch.nn.Module) -> None:
    """Have what these ranks need for a step of this model be imported."""
    of_model = type(model).__module__
    ranks.start([*_IMPORTS, *([of_model] if of_model.startswith(_QUIET) else ())])


def sent_account(sent: dict[str, int], **more: Any) -> Account:
    """What :func:`collective_bytes` says of a step."""
    return Account.of(SENT_BYTES, "bytes", sent, total=sum(sent.values()), source="the collectives of the step", **more)


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
        packed = Path(member.run["job"]).read_bytes()
        steps: list[tuple[Any, ...]] = []
        seen: list[dict[str, Any]] = []
        for number in range(int(member.run["num_steps"])):
            job = pickle.loads(packed)  # of the process that started this one; spreading a model changes it
            batch, levers = job["steps"][number]
            batch = tree_map_only(torch.Tensor, lambda tensor: tensor.to(member.device), batch)
            model, make = job["model"].to(member.device), levers.optimizer(job["optimizer"])
            if levers.world_size > 1:
                model, make = spread(model, levers, make, plan=job["plan"])
            update = still(model.parameters(), make)
            step = model, batch, job["loss"], update, levers.within_a_rank
            for _ in range(2):  # the first makes the optimizer's state, and wrappers learn the order of layers
                stepping.run(*step)
            now = observe(partial(stepping.run, *step), model, partial(residents, model, update, batch))
            steps.append(step)
            seen.append({"rows": now.rows, "peak_bytes": now.peak_bytes, "source": now.source, "phases": [],
                         "sent": collective_bytes(now.timeline, levers.within_a_rank)})  # fmt: skip
            member.tick()
        for _ in range(int(member.run["repeats"])):
            for of_one, step in zip(seen, steps, strict=True):
                dist.barrier()
                of_one["phases"].append(stepping.phases_ns(*step))
                member.tick()
        member.write({"steps": seen})
