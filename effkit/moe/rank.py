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
from effkit.moe.setting import Setting
from effkit.ranks.group import Member, joined
from effkit.recording import trace_of

_PING_REPEATS = 20
_READY_NS = 300_000  # until every rank has heard when to begin


class Job:
    """One setting on this rank: the layer, and its tokens and routing of every step."""

    def __init__(self, job: dict[str, Any], num_steps: int, member: Member, ahead_ns: int) -> None:
        self.travels_on, self.ahead_ns = member.travels_on, ahead_ns
        setting, rank, device = Setting.of(job["setting"]), member.rank, member.device
        dtype = getattr(torch, setting.dtype)
        self.setting = setting
        self.layer = setting.layer(owner=routing.owners(setting, member.num_ranks).tolist(), group=dist.group.WORLD,
                                   barriers=bool(job.get("barriers")), device=str(device))  # fmt: skip
        self.batches = [
            (torch.from_numpy(routing.tokens(setting, rank, step)).to(device, dtype).requires_grad_(setting.backward),
             torch.from_numpy(routing.scores(setting, rank, step)).to(device))
            for step in range(num_steps)
        ]  # fmt: skip
        self.grad = torch.ones(setting.num_tokens, setting.hidden, device=device, dtype=dtype)

    def run(self, step: int) -> dict[str, Any]:
        """One step, from the moment when all ranks are ready; times in ns on this rank's clock."""
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
            "kept": layer.kept_counts.tolist(), "dropped": layer.num_dropped,
        }  # fmt: skip

    def _together(self) -> int:
        """Wait for a moment that the first rank names, so that no rank has a start; returns when it came [ns]."""
        go = torch.tensor([time.perf_counter_ns() + _READY_NS - self.ahead_ns]).to(self.travels_on)
        dist.broadcast(go, 0)
        at = int(go) + self.ahead_ns
        while (now := time.perf_counter_ns()) < at:
            pass
        return now


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


def main(folder: Path, met: Path | None = None) -> None:
    """Run what stands in the folder; ``met`` is the file by which the ranks find each other, unless torchrun does."""
    with joined(folder, met) as member:
        run = member.run
        clock, steps = [clock_offset(member.travels_on)], []
        num_steps = int(run["num_steps"])
        jobs = [Job(job, num_steps, member, clock[0][1]) for job in run["jobs"]]
        for round_ in range(-1, int(run["num_rounds"])):
            for number, job in enumerate(jobs):
                for step in range(num_steps if round_ >= 0 else 1):
                    measured = job.run(step)
                    if round_ >= 0:  # the first round warms up
                        steps.append({"job": number, "round": round_, **measured})
                member.tick()
        clock.append(clock_offset(member.travels_on))
        if run.get("profile"):
            turns = iter([0, *range(num_steps)])  # the first is for the profiler to warm up
            trace = trace_of(lambda: jobs[0].run(next(turns)), warmup=1, steps=num_steps, shapes=True)
            (folder / f"trace{member.rank}.json").write_bytes(trace)
        member.write({"jobs": run["jobs"], "clock": clock, "steps": steps})
        for job in jobs:
            job.layer.exchange.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
