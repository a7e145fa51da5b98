"""Being one of the ranks: its cores, its device, the group that it forms with the others, and what it leaves behind."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effkit.device import provenance
from effkit.whole_files import replacing


@dataclass(frozen=True)
class Member:
    """One rank of a group.

    Attributes
    ----------
    run
        What all ranks were told to do.
    device, travels_on
        Where this rank computes, and where what it sends to others has to be.
    """

    folder: Path
    run: Mapping[str, Any]
    rank: int
    num_ranks: int
    backend: str
    device: torch.device
    travels_on: torch.device

    def tick(self) -> None:
        """Tell whoever waits that the first rank has come one step further."""
        if self.rank == 0:
            with (self.folder / "progress").open("a") as progress:
                progress.write(".")

    def write(self, seen: Mapping[str, Any]) -> None:
        """Leave behind what this rank saw, in plain values, with who it was and where."""
        facts = {"rank": self.rank, "num_ranks": self.num_ranks, "local_world_size": _local("WORLD_SIZE", 1),
                 "backend": self.backend, "where": self.device.type, "machine": _machine(),
                 "provenance": provenance()}  # fmt: skip
        with replacing(self.folder / f"rank{self.rank}.json") as part:
            part.write_text(json.dumps({**facts, **seen}))


@contextmanager
def joined(folder: Path, met: Path | None = None) -> Iterator[Member]:
    """Form a group with the other ranks of the run in ``folder``, and part from them at the end.

    ``met`` is the file by which they find each other, unless torchrun does. ValueError when the run asks for NCCL and
    the GPUs are not there.
    """
    run = json.loads((folder / "run.json").read_text())
    _pin(int(run.get("nodes_here", 1)))
    torch.set_num_threads(int(run.get("num_threads", 1)))
    backend, device = chosen(run.get("backend", "auto"))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    how: dict[str, Any] = {}  # as torchrun says, in the environment
    if met is not None:
        how = {"rank": int(os.environ["RANK"]), "world_size": int(os.environ["WORLD_SIZE"])}
        how["store"] = dist.FileStore(str(met), how["world_size"])  # type: ignore[attr-defined]
    dist.init_process_group(backend, timeout=datetime.timedelta(seconds=float(run.get("timeout_s", 60))), **how)
    travels_on = device if backend == "nccl" else torch.device("cpu")
    yield Member(folder, run, dist.get_rank(), dist.get_world_size(), backend, device, travels_on)
    dist.barrier()
    dist.destroy_process_group()


def chosen(backend: str) -> tuple[str, torch.device]:
    """The backend, and this rank's device: NCCL with a GPU for each rank of this node, gloo otherwise.

    ValueError when NCCL is asked for and the GPUs are not there.
    """
    num_gpus, num_local, local = torch.cuda.device_count(), _local("WORLD_SIZE", 1), _local("RANK", 0)
    if backend == "nccl":
        check_gpus(num_local)
    if backend != "gloo" and num_gpus >= num_local:
        return "nccl", torch.device("cuda", local)
    return "gloo", torch.device("cuda", local % num_gpus) if num_gpus else torch.device("cpu")


def check_gpus(num_ranks: int) -> None:
    """Raise ValueError unless there is a GPU for each of these ranks."""
    if (num_gpus := torch.cuda.device_count()) < num_ranks:
        raise ValueError(f"nccl needs a GPU for each of the {num_ranks} ranks; there are {num_gpus}. Use gloo")


def _local(name: str, default: int) -> int:
    """What torchrun says of this node."""
    return int(os.environ.get(f"LOCAL_{name}", default))


def _pin(nodes_here: int) -> None:
    """Keep to an equal share of the machine's cores, as launchers of clusters do: ranks that wander disturb each other
    differently in every run."""
    if not hasattr(os, "sched_setaffinity"):
        return
    cores, ranks = sorted(os.sched_getaffinity(0)), _local("WORLD_SIZE", 1)
    node = int(os.environ.get("GROUP_RANK", "0")) % nodes_here
    if share := len(cores) // (ranks * nodes_here):
        first = share * (node * ranks + _local("RANK", 0))
        os.sched_setaffinity(0, cores[first : first + share])


def _machine() -> str:
    """Which running kernel this is: its ranks share one clock."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""
