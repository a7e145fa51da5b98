"""What each rank of a run does: ``run.json`` in a folder says what, ``rank<r>.json`` what rank r saw.

:mod:`effkit.ranks` starts ranks on this machine. On a cluster: ``torchrun … -m effkit.moe.rank FOLDER`` on every node,
with a folder that all can reach.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from effkit.device import synchronize
from effkit.moe import routing
from effkit.moe.layers import layer_of
from effkit.moe.setting import Setting
from effkit.ranks.group import Member, joined
from effkit.recording import trace_of

_LINK_SIZES = tuple(2**power for power in range(10, 23))  # bytes to each other rank
_SMALL_SIZES = _LINK_SIZES[:7]  # they scatter more, and cost less to repeat
_PING_REPEATS = 20
_READY_NS = 300_000  # until every rank has heard when to begin


class Job:
    """One setting on this rank: the layer, and its tokens and routing of every step."""

    def __init__(self, job: dict[str, Any], num_steps: int, member: Member, ahead_ns: int) -> None:
        self.travels_on, self.ahead_ns = member.travels_on, ahead_ns
        setting, rank, device = Setting.of(job["setting"]), member.rank, member.device
        dtype = getattr(torch, setting.dtype)
        self.setting, self.barriers = setting, bool(job.get("barriers"))
        self.layer = layer_of(
            setting, owner=routing.owners(setting, member.num_ranks).tolist(), group=dist.group.WORLD,
            barriers=self.barriers, device=str(device),
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


def main(folder: Path, met: Path | None = None) -> None:
    """Run what stands in the folder; ``met`` is the file by which the ranks find each other, unless torchrun does."""
    with joined(folder, met) as member:
        run = member.run
        recorded: dict[str, Any] = {"jobs": run["jobs"], "clock": [clock_offset(member.travels_on)], "steps": [],
                                    "checks": []}  # fmt: skip
        if run.get("links"):
            recorded["links"] = probe_links(int(run["links"]), member.travels_on)
        num_steps, checks = int(run["num_steps"]), bool(run.get("check"))
        jobs = [Job(job, num_steps, member, recorded["clock"][0][1]) for job in run["jobs"]]
        for round_ in range(-1, int(run["num_rounds"]) if jobs else -1):
            for number, job in enumerate(jobs):
                for step in range(num_steps if round_ >= 0 or checks else 1):
                    measured = job.run(step, check=round_ < 0 and checks)
                    if round_ >= 0:
                        recorded["steps"].append({"job": number, "round": round_, **measured})
                    elif checks:  # the first round warms up
                        recorded["checks"].append({"job": number, "step": step, **measured["check"]})
                member.tick()
        recorded["clock"].append(clock_offset(member.travels_on))
        if run.get("profile") and jobs:
            turns = iter([0, *range(num_steps)])  # the first is for the profiler to warm up
            trace = trace_of(lambda: jobs[0].run(next(turns)), warmup=1, steps=num_steps, shapes=True)
            (folder / f"trace{member.rank}.json").write_bytes(trace)
        member.write(recorded)
        for job in jobs:
            job.layer.exchange.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
