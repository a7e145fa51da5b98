"""What each rank of a run does: ``run.json`` in a folder says what, ``rank<r>.json`` what rank r saw.

:mod:`effkit.moe.forking` forks ranks on this machine. On a cluster: ``torchrun … -m effkit.moe.rank FOLDER`` on every
node, with a folder that all can reach.
"""

from __future__ import annotations

import datetime
import json
import os
import sys
import time
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effkit.device import provenance, synchronize
from effkit.moe import routing
from effkit.moe.layers import layer_of
from effkit.moe.netns import ask_for
from effkit.moe.setting import Setting
from effkit.recording import trace_of
from effkit.whole_files import replacing

_LINK_SIZES = tuple(2**power for power in range(10, 23))  # bytes to each other rank
_SMALL_SIZES = _LINK_SIZES[:7]  # they scatter more, and cost less to repeat
_PING_REPEATS = 20
_READY_NS = 300_000  # until every rank has heard when to begin


class Job:
    """One setting on this rank: the layer, and its tokens and routing of every step."""

    def __init__(self, job: dict[str, Any], num_steps: int, device: torch.device, travels_on: torch.device,
                 ahead_ns: int) -> None:  # fmt: skip
        self.travels_on, self.ahead_ns = travels_on, ahead_ns
        setting = Setting.of(job["setting"])
        rank, num_ranks = dist.get_rank(), dist.get_world_size()
        dtype = getattr(torch, setting.dtype)
        self.setting, self.barriers = setting, bool(job.get("barriers"))
        self.layer = layer_of(
            setting, owner=routing.owners(setting, num_ranks).tolist(), group=dist.group.WORLD, barriers=self.barriers,
            device=str(device),
        )  # fmt: skip
        self.batches = [
            (torch.from_numpy(routing.tokens(setting, rank, step)).to(device, dtype).requires_grad_(setting.backward),
             torch.from_numpy(routing.scores(setting, rank, step)).to(device))
            for step in range(num_steps)
        ]  # fmt: skip
        self.grad = torch.ones(setting.num_tokens, setting.hidden, device=device, dtype=dtype)

    def run(self, step: int, *, check: bool = False) -> dict[str, Any]:
        """One step, from the moment when all ranks are ready; times in ns on this rank's clock.

        With ``check``, also what came out, to compare with what one rank alone computes.
        """
        layer, marks = self.layer, self.layer.marks
        x, scores = self.batches[step]
        layer.zero_grad(set_to_none=True)
        x.grad = None
        synchronize()
        marks.begin()
        begin = self._together()
        with torch.set_grad_enabled(self.setting.backward):
            y = layer(x, scores)
        turn = marks.now()
        if self.setting.backward:
            marks.enter("unpermute")
            y.backward(self.grad)
        marks.leave()
        synchronize()
        end = time.perf_counter_ns()
        return {
            "step": step, "begin_ns": begin, "turn_ns": marks.read(turn), "end_ns": end,
            "phases": [[name, marks.read(stamp)] for name, stamp in marks.phases],
            "calls": [[call.kind, marks.read(call.start), marks.read(call.end), call.sent_bytes, call.received_bytes]
                      for call in marks.calls],
            "kept": layer.kept_counts.tolist(), "sent": layer.sent_counts.tolist(), "dropped": layer.num_dropped,
            **({"check": self._check(x, y)} if check else {}),
        }  # fmt: skip

    def _check(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
        inner, outer = self.layer.inner, self.layer.outer
        gradients = {e: projection(inner[e].grad) + projection(outer[e].grad)
                     for e in (inner if self.setting.backward else ())}  # fmt: skip
        return {"output": projection(y), "input_gradient": projection(x.grad) if x.grad is not None else 0.0,
                "expert_gradients": gradients}  # fmt: skip

    def _together(self) -> int:
        """Wait for a moment that the first rank names, so that no rank has a start; returns when it came [ns]."""
        go = torch.tensor([time.perf_counter_ns() + _READY_NS - self.ahead_ns]).to(self.travels_on)
        dist.broadcast(go, 0)
        at = int(go) + self.ahead_ns
        while (now := time.perf_counter_ns()) < at:
            pass
        return now


def projection(values: torch.Tensor) -> float:
    """One number that tells a tensor from another, and from itself in another order: its product with cosines."""
    flat = values.detach().double().cpu().reshape(-1)
    return float(flat @ torch.arange(len(flat), dtype=torch.float64).cos())


def clock_offset(device: torch.device) -> tuple[int, int, int]:
    """Now, how far this rank's clock is ahead of the first one's, and the quickest round trip that says so [ns].

    Of several round trips the quickest is the one that was disturbed least (as NTP does). NCCL's calls return before a
    message has arrived: each is waited for.
    """
    rank, best = dist.get_rank(), (0, 2**62)
    stamp = torch.zeros(1, dtype=torch.int64, device=device)
    for other in range(1, dist.get_world_size()):
        for _ in range(_PING_REPEATS):
            if rank == 0:
                dist.recv(stamp, other)
                synchronize()
                stamp[0] = time.perf_counter_ns()
                dist.send(stamp, other)
            elif rank == other:
                before = time.perf_counter_ns()
                dist.send(stamp, 0)
                dist.recv(stamp, 0)
                synchronize()
                after = time.perf_counter_ns()
                if after - before < best[1]:
                    best = ((before + after) // 2 - int(stamp[0]), after - before)
    return time.perf_counter_ns(), best[0], best[1] if rank else 0


def probe_links(repeats: int, device: torch.device) -> list[list[Any]]:
    """All-to-alls of equal messages, all sizes in turn: bytes to each rank, when this rank came and left [ns]."""
    num_ranks, times = dist.get_world_size(), []
    for repeat in range(-1, repeats):  # the first one warms up
        for size in sorted([*_LINK_SIZES, *_SMALL_SIZES, *_SMALL_SIZES]):
            out = torch.zeros(num_ranks, size, dtype=torch.uint8, device=device)
            back = torch.zeros_like(out)
            dist.barrier()
            start = time.perf_counter_ns()
            dist.all_to_all_single(back, out)
            synchronize()
            if repeat >= 0:
                times.append([size, start, time.perf_counter_ns()])
    return times


def probe_delays(run: dict[str, Any], folder: Path, device: torch.device) -> list[list[Any]]:
    """Times [ns] of one message from every rank to every other, as its receiver sees it: round, sender, delay.

    Only one pair talks at a time. The sender's clock stands in the message. As many rounds for each entry of ``slow``,
    if that has several; the router changes the links between them.
    """
    rank, delays, rounds = dist.get_rank(), [], int(run["delays"])
    message = torch.zeros(int(run.get("delay_bytes", 2**16)) // 8, dtype=torch.int64, device=device)
    pairs = list(permutations(range(dist.get_world_size()), 2))
    for window in range(max(1, len(run.get("slow", ())))):
        dist.barrier()
        if window and rank == 0:
            ask_for(folder.parent, window, float(run["timeout_s"]))
        for around in range(-1, rounds):  # the first one warms up
            for sender, receiver in pairs:
                dist.barrier()
                if rank == sender:
                    message[0] = time.perf_counter_ns()
                    dist.send(message, receiver)
                elif rank == receiver:
                    dist.recv(message, sender)
                    synchronize()
                    arrived = time.perf_counter_ns()
                    if around >= 0:
                        delays.append([window * rounds + around, sender, int(message[0]), arrived])
    return delays


def chosen(backend: str) -> tuple[str, torch.device]:
    """The backend, and this rank's device: NCCL with a GPU for each rank of this node, gloo otherwise.

    ValueError when NCCL is asked for and the GPUs are not there.
    """
    num_gpus, num_local, local = torch.cuda.device_count(), _local("WORLD_SIZE", 1), _local("RANK", 0)
    if backend == "nccl" and num_gpus < num_local:
        raise ValueError(f"nccl needs a GPU for each of the {num_local} ranks; there are {num_gpus}. Use gloo")
    if backend != "gloo" and num_gpus >= num_local:
        return "nccl", torch.device("cuda", local)
    return "gloo", torch.device("cuda", local % num_gpus) if num_gpus else torch.device("cpu")


def _local(name: str, default: int) -> int:
    """What torchrun says of this node."""
    return int(os.environ.get(f"LOCAL_{name}", default))


def main(folder: Path, met: Path | None = None) -> None:
    """Run what stands in the folder; ``met`` is the file by which the ranks find each other, unless torchrun does."""
    try:
        _run(folder, met)
    except Exception as error:  # what ended this rank, where whoever started it looks
        why = {"time": time.time(), "said": f"ended the run with {type(error).__name__}: {error}"}
        (folder / f"rank{os.environ.get('RANK', '0')}.error").write_text(json.dumps(why))
        raise


def _run(folder: Path, met: Path | None) -> None:
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
    rank = dist.get_rank()
    travels_on = device if backend == "nccl" else torch.device("cpu")
    recorded: dict[str, Any] = {
        "rank": rank, "num_ranks": dist.get_world_size(), "local_world_size": _local("WORLD_SIZE", 1),
        "backend": backend, "where": device.type, "machine": _machine(), "provenance": provenance(),
        "jobs": run["jobs"], "clock": [clock_offset(travels_on)], "steps": [], "checks": [],
    }  # fmt: skip
    if run.get("links"):
        recorded["links"] = probe_links(int(run["links"]), travels_on)
    if run.get("delays"):
        recorded["delays"] = probe_delays(run, folder, travels_on)
    num_steps, checks = int(run["num_steps"]), bool(run.get("check"))
    jobs = [Job(job, num_steps, device, travels_on, recorded["clock"][0][1]) for job in run["jobs"]]
    for round_ in range(-1, int(run["num_rounds"]) if jobs else -1):
        for number, job in enumerate(jobs):
            for step in range(num_steps if round_ >= 0 or checks else 1):
                measured = job.run(step, check=round_ < 0 and checks)
                if round_ >= 0:
                    recorded["steps"].append({"job": number, "round": round_, **measured})
                elif checks:  # the first round warms up
                    recorded["checks"].append({"job": number, "step": step, **measured["check"]})
            if rank == 0:
                with (folder / "progress").open("a") as progress:
                    progress.write(".")
    recorded["clock"].append(clock_offset(travels_on))
    if run.get("profile") and jobs:
        turns = iter([0, *range(num_steps)])  # the first is for the profiler to warm up
        trace = trace_of(lambda: jobs[0].run(next(turns)), warmup=1, steps=num_steps, shapes=True)
        (folder / f"trace{rank}.json").write_bytes(trace)
    with replacing(folder / f"rank{rank}.json") as part:
        part.write_text(json.dumps(recorded))
    dist.barrier()
    for job in jobs:
        job.layer.exchange.close()
    dist.destroy_process_group()


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


if __name__ == "__main__":
    main(Path(sys.argv[1]))
