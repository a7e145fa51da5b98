"""How long a message takes from each rank to each other, while some of them are made slow for real."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from effkit.device import synchronize
from effkit.ranks import netns
from effkit.ranks.group import joined
from effkit.ranks.launching import Ranks

Array = np.ndarray[Any, np.dtype[Any]]
Slow = Mapping[str, Any]
DELAY_BYTES = 2**18  # 2.6 ms at 100 MB/s: what the machine's scheduler adds is small beside that


def delays(
    num_ranks: int = 4, *, num_rounds: int = 10, quickest_of: int = 3, slow: Slow | Sequence[Slow | None] | None = None,
    link_bytes_per_s: float = 100e6, size_bytes: int = DELAY_BYTES, timeout_s: float = 120.0,
) -> Array:  # fmt: skip
    """Times [ns] of one message from each rank to each other, live: rows are senders, columns receivers.

    One pair talks at a time, over its own way through a link that all ranks share, each on a node of its own.
    ValueError when such ranks or such a link cannot be had here. RuntimeError when a rank fails or hangs.

    Parameters
    ----------
    num_rounds
        Rounds that are returned.
    quickest_of
        In each round every pair is timed so often, all pairs in turn, and its quickest message counts: where ranks
        share cores a message may be held up for longer than it takes, but hardly three times in a row.
    slow
        What to make slow, for real: ``{"sender": 1, "receiver": 2, "bytes_per_s": 25e6}`` (what 1 sends to 2),
        ``{"sender": 1, …}`` (all that 1 sends), ``{"receiver": 2, …}`` (all that 2 is sent), ``{"rank": 1, …}`` (both).
        Or several of these, or None, one after another while the ranks go on: starting ranks takes longer than that.
    link_bytes_per_s
        What the others may send; 0: this machine's loopback, without ``slow``.
    size_bytes
        Of a message. Where it takes a millisecond or less, delays tell more of the scheduler than of the link.

    Returns
    -------
    numpy.ndarray
        [num_rounds, num_ranks (sender), num_ranks (receiver)], NaN on the diagonal; where ``slow`` is a sequence
        [len(slow), num_rounds, num_ranks, num_ranks].
    """
    for name, value, least in (("num_rounds", num_rounds, 1), ("quickest_of", quickest_of, 1),
                               ("size_bytes", size_bytes, 8)):  # fmt: skip
        if value < least:
            raise ValueError(f"{name} is at least {least}; given: {value}")
    windows = [slow] if slow is None or isinstance(slow, Mapping) else list(slow)
    _check(windows, num_ranks, link_bytes_per_s)
    run = {"num_rounds": num_rounds * quickest_of, "size_bytes": size_bytes,
           "windows": [dict(window) if window else None for window in windows]}  # fmt: skip
    times = np.full((len(windows), num_rounds * quickest_of, num_ranks, num_ranks), np.nan)
    with Ranks(num_ranks, __name__, link_bytes_per_s=link_bytes_per_s) as ranks:
        for path in ranks.run(run, timeout_s=timeout_s).glob("rank*.json"):
            seen = json.loads(path.read_text())
            for window, around, sender, time_ns in seen["delays"]:
                times[window, around, sender, seen["rank"]] = time_ns
    quickest = times.reshape(len(windows), num_rounds, quickest_of, num_ranks, num_ranks).min(axis=2)
    return quickest[0] if slow is None or isinstance(slow, Mapping) else quickest


def _check(windows: Sequence[Slow | None], num_ranks: int, link_bytes_per_s: float) -> None:
    """Raise ValueError unless these can be made slow."""
    if not windows:
        raise ValueError("slow is None, one dictionary or several; given: an empty one")
    for slow in (window for window in windows if window is not None):
        names = set(slow) - {"bytes_per_s"}
        if "bytes_per_s" not in slow or names not in ({"sender"}, {"receiver"}, {"sender", "receiver"}, {"rank"}):
            raise ValueError(f"slow has bytes_per_s, and sender, receiver, both or rank; given: {', '.join(slow)}")
        nodes = {int(slow[name]) for name in names}
        if len(nodes) < len(names) or not nodes <= set(range(num_ranks)):
            raise ValueError(f"slow names ranks 0 to {num_ranks - 1}, two different ones for a link; given: "
                             f"{dict(slow)}")  # fmt: skip
        if not slow["bytes_per_s"] > 0:
            raise ValueError(f"bytes_per_s of what is slow is a rate above 0; given: {slow['bytes_per_s']}")
        if not link_bytes_per_s > 0:
            raise ValueError("what is slow is slower than a link: give link_bytes_per_s, above 0, or leave slow out")


def main(folder: Path, met: Path) -> None:
    """On each rank: what :func:`between_pairs` says, window after window of what is slow."""
    with joined(folder, met) as member:
        windows, seen, before = member.run["windows"], [], None
        message = torch.zeros(member.run["size_bytes"] // 8, dtype=torch.int64, device=member.travels_on)
        if member.rank == 0 and any(windows):
            fastest = max(window["bytes_per_s"] for window in windows if window)
            netns.trunk("slow", fastest, table=200, within=_router())
        for number, slow in enumerate(windows):
            if member.rank == 0:
                _detour(before, slow, member.num_ranks)
            seen += [[number, *delay] for delay in between_pairs(member.run["num_rounds"], message)]
            before = slow
        member.write({"delays": seen})


def between_pairs(num_rounds: int, message: torch.Tensor) -> list[list[int]]:
    """Round, sender, and time [ns] of one message from every rank to every other, as its receiver sees it.

    Only one pair talks at a time. The sender's clock, which is the receiver's too, stands in the message.
    """
    rank, delays = dist.get_rank(), []
    for around in range(-1, num_rounds):  # the first one warms up
        for sender, receiver in permutations(range(dist.get_world_size()), 2):
            dist.barrier()
            if rank == sender:
                message[0] = time.perf_counter_ns()
                dist.send(message, receiver)
            elif rank == receiver:
                dist.recv(message, sender)
                synchronize()
                arrived = time.perf_counter_ns()
                if around >= 0:
                    delays.append([around, sender, arrived - int(message[0])])
    dist.barrier()
    return delays


def _router() -> str:
    """The namespace of the ranks' parent process, through which all nodes send."""
    return f"/proc/{os.getppid()}/ns/net"


def _detour(before: Slow | None, slow: Slow | None, num_ranks: int) -> None:
    """Send what is slow now over a trunk of its own, and what was slow before no more."""
    if slow:
        netns.limit("slow", slow["bytes_per_s"], within=_router())
    rules = [f"rule {verb} iif port{sender} to {netns.ADDRESS.format(receiver + 1)} table 200 priority 10"
             for verb, what in (("delete", before), ("add", slow))
             for sender, receiver in _slow_pairs(what, num_ranks)]  # fmt: skip
    if rules:
        netns.ip(*rules, within=_router())


def _slow_pairs(slow: Slow | None, num_ranks: int) -> list[tuple[int, int]]:
    """Whose messages to whom are slow."""
    pairs = permutations(range(num_ranks), 2)
    if not slow:
        return []
    if "rank" in slow:
        return [pair for pair in pairs if slow["rank"] in pair]
    return [(sender, receiver) for sender, receiver in pairs
            if sender == slow.get("sender", sender) and receiver == slow.get("receiver", receiver)]  # fmt: skip
