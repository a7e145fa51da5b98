"""The process that forks the ranks of every run, and ends them when it ends itself: ``python -m effkit.moe.forking``.

It imports what a rank needs, once. Each line on its standard input names a folder in the plan's ``folder``:
``num_ranks`` ranks (:mod:`effkit.moe.rank`) are forked to run what stands there. When the input closes, or a rank
fails, it ends them and itself. The plan is its argument, in JSON: with ``bytes_per_s`` or ``slow``, a list of what is
slow one after another, each of ``num_nodes`` nodes of ``per_node`` ranks is on a network of its own
(:mod:`effkit.moe.netns`); ranks ask in the folder for the next thing that is slow.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from effkit.moe import netns, rank

_LAST_WORDS_S = 2.0


def cluster(plan: dict[str, Any]) -> None:
    """All nodes and the router between them, and the ranks of each run."""
    slow, folder, made = plan["slow"], Path(plan["folder"]), 0
    run, nodes = folder, list[int]()
    if plan["bytes_per_s"] or slow:
        netns.router(plan["bytes_per_s"], slow)
        nodes = [netns.node(number) for number in range(plan["num_nodes"])]
        netns.detour(None, slow[0] if slow else None, plan["num_nodes"])
    gc.freeze()  # a fork that looked through all of it would have a copy of its own
    started = multiprocessing.get_context("fork").Process
    ranks: list[Any] = []
    try:
        while not _failed(ranks, run):
            if 0 in wait([0, *(process.sentinel for process in ranks if process.exitcode is None)], netns.POLL_S):
                if not (line := os.read(0, 4096)):  # who started us is done, or is no more
                    break
                _end(ranks)  # they have written what they saw
                run = folder / line.decode().strip()
                ranks = [started(target=_be, args=(number, plan, nodes, run))
                         for number in range(plan["num_ranks"])]  # fmt: skip
                for process in ranks:
                    process.start()
            if slow and (asked := netns.number_in(folder / netns.ASKED)) not in (made, -1):
                netns.detour(slow[made], slow[asked], plan["num_nodes"])
                made = asked
                (folder / netns.MADE).write_text(str(made))
    finally:
        _end(ranks)


def _end(ranks: list[Any]) -> None:
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()


def _be(number: int, plan: dict[str, Any], nodes: list[int], folder: Path) -> None:
    """Be one of the ranks, on its node."""
    netns.end_with_parent(multiprocessing.parent_process().pid)  # type: ignore[union-attr, arg-type]
    node, local = divmod(number, plan["per_node"])
    environment = {"RANK": number, "WORLD_SIZE": plan["num_ranks"], "LOCAL_RANK": local,
                   "LOCAL_WORLD_SIZE": plan["per_node"], "GROUP_RANK": node}  # fmt: skip
    if nodes:
        netns.enter(nodes[node])
        environment |= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    rank.main(folder, folder / "met")


def _failed(ranks: list[Any], folder: Path) -> bool:
    """Whether a rank has. Then the others notice, and say so themselves; one that was killed cannot."""
    if not any(process.exitcode for process in ranks):
        return False
    for number, process in enumerate(ranks):
        if (process.exitcode or 0) < 0:
            name = signal.Signals(-process.exitcode).name
            why = {"time": 0.0, "said": f"was ended by signal {-process.exitcode} ({name})"}
            (folder / f"rank{number}.error").write_text(json.dumps(why))
    limit = time.monotonic() + _LAST_WORDS_S
    while any(process.exitcode is None for process in ranks) and time.monotonic() < limit:
        time.sleep(netns.POLL_S)
    return True


if __name__ == "__main__":
    cluster(json.loads(sys.argv[1]))
