"""The process that forks the ranks of every run, and ends them when it ends itself: ``python -m effkit.ranks.forking``.

It imports the module that ranks run, once, and the plan's ``imports``. Each line on its
standard input names a folder in the plan's ``folder``: ``num_ranks`` ranks are forked to run what stands there. When
the input closes, or a rank fails, it ends them and itself. The plan is its argument, in JSON: with ``bytes_per_s``,
each of ``num_nodes`` nodes of ``per_node`` ranks is on a network of its own (:mod:`effkit.ranks.netns`).
"""

from __future__ import annotations

import ctypes
import gc
import json
import multiprocessing
import os
import signal
import sys
import time
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from effkit.ranks import netns

_LAST_WORDS_S = 2.0
_PR_SET_PDEATHSIG = 1


def cluster(plan: dict[str, Any]) -> None:
    """All nodes and the router between them, and the ranks of each run."""
    folder, modules = Path(plan["folder"]), [import_module(name) for name in (plan["work"], *plan["imports"])]
    run, nodes = folder, list[int]()
    if plan["bytes_per_s"]:
        netns.router(plan["bytes_per_s"])
        nodes = [netns.node(number) for number in range(plan["num_nodes"])]
    started = multiprocessing.get_context("fork").Process
    ranks: list[Any] = []
    try:
        while not _failed(ranks, run):
            # one that has failed since we looked is waited for, too: its end wakes us at once
            if 0 in wait([0, *(process.sentinel for process in ranks if process.exitcode != 0)]):
                if not (line := os.read(0, 4096)):  # who started us is done, or is no more
                    break
                _end(ranks)  # they have written what they saw
                run = folder / line.decode().strip()
                gc.freeze()  # a fork that looked through all of it would have a copy of its own
                ranks = [started(target=_be, args=(number, plan, nodes, run, modules[0].main))
                         for number in range(plan["num_ranks"])]  # fmt: skip
                for process in ranks:
                    process.start()
    finally:
        _end(ranks)


def end_with_parent(parent: int = 0) -> None:
    """Let the kernel end this process when its parent ends, however that happens. Linux only; elsewhere nothing.

    ``parent`` is its process id where it is known: it may have ended before we could look.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = parent or os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGKILL)


def _end(ranks: list[Any]) -> None:
    for process in ranks:
        process.kill()
    for process in ranks:
        process.join()


def _be(number: int, plan: dict[str, Any], nodes: list[int], folder: Path, main: Any) -> None:
    end_with_parent(multiprocessing.parent_process().pid)  # type: ignore[union-attr, arg-type]
    node, local = divmod(number, plan["per_node"])
    environment = {"RANK": number, "WORLD_SIZE": plan["num_ranks"], "LOCAL_RANK": local,
                   "LOCAL_WORLD_SIZE": plan["per_node"], "GROUP_RANK": node}  # fmt: skip
    if nodes:
        netns.enter(nodes[node])
        environment |= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    os.environ.update({name: str(value) for name, value in environment.items()})
    try:
        main(folder, folder / "met")
    except Exception as error:  # what ended this rank, where whoever started it looks
        _say(folder, number, time.time(), f"ended the run with {type(error).__name__}: {error}")
        raise


def _failed(ranks: list[Any], folder: Path) -> bool:
    """Whether a rank has. Then the others notice, and say so themselves; one that was killed cannot."""
    if not any(process.exitcode for process in ranks):
        return False
    limit = time.monotonic() + _LAST_WORDS_S
    for process in ranks:
        process.join(max(0.0, limit - time.monotonic()))
    for number, process in enumerate(ranks):  # now: others may have noticed its end before it is over
        if (process.exitcode or 0) < 0:
            name = signal.Signals(-process.exitcode).name
            _say(folder, number, 0.0, f"was ended by signal {-process.exitcode} ({name})")
    return True


def _say(folder: Path, number: int, moment: float, words: str) -> None:
    (folder / f"rank{number}.error").write_text(json.dumps({"time": moment, "said": words}))


if __name__ == "__main__":
    cluster(json.loads(sys.argv[1]))
