"""Networks for ranks, made on this machine: nodes that are namespaces, and the router between them.

What nodes send each other goes through one trunk of a rate. It carries both directions: two one-way limits were tried,
and TCP then settles at full or at half their rate, by chance, because acknowledgements wait behind the data of the
other direction. What is slow takes a trunk of its own: ``{"sender": s, "receiver": r, "bytes_per_s": ...}``, what s
sends to r; without ``receiver``, all that s sends; without ``sender``, all that r receives; ``{"rank": r, ...}``: both.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from itertools import permutations
from pathlib import Path
from typing import Any

ADDRESS = "10.77.0.{}"
_MTU = "9000"  # with the usual 1500 and a deep bucket, small messages are distorted
_MAC = "02:00:00:00:00:01"  # of all interfaces: with one address, none has to ask for another's
_PR_SET_PDEATHSIG, _CLONE_NEWNET = 1, 0x40000000
POLL_S = 0.02
ASKED, MADE = "slow.asked", "slow.made"  # files in the folder, each with a number in it


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


def ask_for(folder: Path, number: int, timeout_s: float) -> None:
    """On a rank: have the ``number``-th entry of ``slow`` made, and wait; RuntimeError when nobody answers."""
    (folder / ASKED).write_text(str(number))
    limit = time.monotonic() + timeout_s
    while number_in(folder / MADE) != number:
        if time.monotonic() > limit:
            raise RuntimeError(f"the router did not make link change {number} within {timeout_s:g} s")
        time.sleep(POLL_S)


def node(number: int) -> int:
    """A namespace that is linked to the router's, this process's own; its file descriptor."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter(own)
    port = f"port{number}"
    # to the other nodes and nowhere else: who asks a name server then hears at once that there is none
    _ip(
        f"link add eth0 address {_MAC} mtu {_MTU} type veth peer name {port} address {_MAC} mtu {_MTU} "
        f"netns {os.getpid()}",
        "link set lo up", f"address add {ADDRESS.format(number + 1)} dev eth0", "link set eth0 arp off up",
        f"route add {ADDRESS.format(0)}/24 dev eth0", within=here,
    )  # fmt: skip
    # what comes from a node goes through the trunk; what comes out of the trunk goes where it is addressed
    _ip(f"link set {port} arp off up", f"route add {ADDRESS.format(number + 1)} dev {port}",
        f"rule add iif {port} table 100 priority 20")  # fmt: skip
    return here


def enter(namespace: int) -> None:
    """Go into a namespace."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")


def router(bytes_per_s: float, slow: list[dict[str, Any] | None]) -> None:
    """In this process's own namespace: all that is not a node's."""
    for name, value in (("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")):
        Path("/proc/sys/net/ipv4", name).write_text(value)
    _ip("link set lo up")
    _trunk("trunk", bytes_per_s, table=100)
    if any(slow):
        _trunk("slow", max(entry["bytes_per_s"] for entry in filter(None, slow)), table=200)


def detour(before: dict[str, Any] | None, after: dict[str, Any] | None, num_nodes: int) -> None:
    """Send what is slow now over the slow trunk, and what was slow before no more."""
    if after:
        _rate("change", "slow", after["bytes_per_s"])
    _ip(*(f"rule {verb} iif port{sender} to {ADDRESS.format(receiver + 1)} table 200 priority 10"
          for verb, slow in (("delete", before), ("add", after))
          for sender, receiver in _slow_pairs(slow, num_nodes)))  # fmt: skip


def _slow_pairs(slow: dict[str, Any] | None, num_nodes: int) -> list[tuple[int, int]]:
    pairs = permutations(range(num_nodes), 2)
    if not slow:
        return []
    if "rank" in slow:
        return [pair for pair in pairs if slow["rank"] in pair]
    return [(sender, receiver) for sender, receiver in pairs
            if sender == slow.get("sender", sender) and receiver == slow.get("receiver", receiver)]  # fmt: skip


def _trunk(name: str, bytes_per_s: float, table: int) -> None:
    """A loop of two interfaces: what the table sends into one end comes out of the other, no faster than this."""
    _ip(f"link add {name}0 address {_MAC} mtu {_MTU} type veth peer name {name}1 address {_MAC} mtu {_MTU}",
        f"link set {name}0 arp off up", f"link set {name}1 arp off up",
        f"route add default dev {name}0 table {table}")  # fmt: skip
    if bytes_per_s:
        _rate("add", name, bytes_per_s)


def _rate(verb: str, name: str, bytes_per_s: float) -> None:
    _run(f"tc qdisc {verb} dev {name}0 root tbf rate {round(8 * bytes_per_s)}bit burst 16k latency 400ms".split())


def _ip(*commands: str, within: int = 0) -> None:
    """What ``ip`` is to do one after another; in a namespace, if one is given."""
    enter = ["nsenter", f"--net=/proc/{os.getpid()}/fd/{within}"] if within else []
    if commands:
        _run([*enter, "ip", "-batch", "-"], "\n".join(commands) + "\n")


def _run(command: list[str], lines: str = "") -> None:
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def number_in(path: Path) -> int:
    """-1 where there is none, or not yet."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return -1
