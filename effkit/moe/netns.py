"""The machines that ranks run on, made on this one: processes that end with the one that starts them.

Run by its path, as a script of the standard library alone, with a JSON plan as its only argument. It starts
``num_ranks`` ranks (:mod:`effkit.moe.rank`) of the ``folder``, passes each line on its standard input to all of them,
and ends them and itself when that closes, or when one of them ends. In the plan:

* ``per_node``, ``num_nodes``: with ``bytes_per_s`` or ``slow``, every node is a network namespace of its own, and what
  they send each other goes through one trunk of that rate.
* ``slow``, a list of what is slow one after another; ranks ask for the next in the folder (:func:`ask_for`).
  ``{"sender": s, "receiver": r, "bytes_per_s": ...}``: what node s sends to node r takes a slower trunk. Without
  ``receiver``, all that s sends does; without ``sender``, all that r receives; ``{"rank": r, ...}``: both. ``null``:
  nothing is slow.

The trunk carries both directions. Two one-way limits were tried: TCP then settles at full or at half their rate, by
chance, because acknowledgements wait behind the data of the other direction.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from itertools import permutations
from pathlib import Path
from typing import Any

ADDRESS = "10.77.0.{}"
_MTU = "9000"  # with the usual 1500 and a deep bucket, small messages are distorted
_MAC = "02:00:00:00:00:01"  # of all interfaces: with one address, none has to ask for another's
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 2.0
_POLL_S = 0.02
_ASKED, _MADE = "slow.asked", "slow.made"  # files in the folder, each with a number in it


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
    (folder / _ASKED).write_text(str(number))
    limit = time.monotonic() + timeout_s
    while _number_in(folder / _MADE) != number:
        if time.monotonic() > limit:
            raise RuntimeError(f"the router did not make link change {number} within {timeout_s:g} s")
        time.sleep(_POLL_S)


def cluster(plan: dict[str, Any]) -> None:
    """All nodes and their ranks, and the router between them."""
    slow, folder, made = plan["slow"], Path(plan["folder"]), 0
    apart = bool(plan["bytes_per_s"] or slow)
    if apart:
        _router(plan["bytes_per_s"], slow)
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(plan["num_ranks"]):
            ranks.append(_started(plan, rank, ranks[rank // plan["per_node"] * plan["per_node"] :] if apart else None))
        if apart:
            _detour(None, slow[0] if slow else None, plan["num_nodes"])
        while not _ended(ranks, folder):
            if select.select([0], [], [], _POLL_S)[0]:
                if not (line := os.read(0, 4096)):  # who started us is done, or is no more
                    break
                for process in ranks:
                    with suppress(OSError):  # it has ended; the next look says so
                        os.write(process.stdin.fileno(), line)  # type: ignore[union-attr]
            if slow and (asked := _number_in(folder / _ASKED)) not in (made, -1):
                _detour(slow[made], slow[asked], plan["num_nodes"])
                made = asked
                (folder / _MADE).write_text(str(made))
    finally:
        for process in ranks:
            process.kill()
        for process in ranks:
            process.wait()


def _started(plan: dict[str, Any], rank: int, on_its_node: list[subprocess.Popen[bytes]] | None) -> Any:
    """The process of a rank. Where nodes are apart, in the namespace of those before it on its node, or in a new one
    that is linked to the router's; it comes to talk to others only when a line has told it what to run."""
    node, local = divmod(rank, plan["per_node"])
    environment = {"RANK": rank, "WORLD_SIZE": plan["num_ranks"], "LOCAL_RANK": local, "GROUP_RANK": node,
                   "LOCAL_WORLD_SIZE": plan["per_node"]}  # fmt: skip
    command = [sys.executable, "-u", "-m", "effkit.moe.rank", plan["folder"], "stay"]
    if on_its_node is not None:
        environment |= {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
        inside = f"--net=/proc/{on_its_node[0].pid}/ns/net" if on_its_node else ""
        command = [*(["nsenter", inside] if inside else ["unshare", "--net"]), *command]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=os.environ | {name: str(value) for name, value in environment.items()},
        preexec_fn=partial(end_with_parent, os.getpid()),
    )  # fmt: skip
    if on_its_node == []:
        _link(process, node)
    return process


def _link(process: subprocess.Popen[bytes], node: int) -> None:
    """Link the namespace that a process has made to the router's."""
    with suppress(OSError):  # it has ended; what we ask of it next says so
        while process.poll() is None and os.path.samefile(f"/proc/{process.pid}/ns/net", "/proc/self/ns/net"):
            time.sleep(0.002)
    port = f"port{node}"
    # what comes from a node goes through the trunk; what comes out of the trunk goes where it is addressed
    _ip(
        f"link add {port} address {_MAC} mtu {_MTU} type veth peer name eth0 address {_MAC} mtu {_MTU} "
        f"netns {process.pid}",
        f"link set {port} arp off up", f"route add {ADDRESS.format(node + 1)} dev {port}",
        f"rule add iif {port} table 100 priority 20",
    )  # fmt: skip
    # to the other nodes and nowhere else: who asks a name server then hears at once that there is none
    _ip("link set lo up", f"address add {ADDRESS.format(node + 1)} dev eth0", "link set eth0 arp off up",
        f"route add {ADDRESS.format(0)}/24 dev eth0", within=process.pid)  # fmt: skip


def _ended(ranks: list[subprocess.Popen[bytes]], folder: Path) -> bool:
    """Whether a rank has ended. Then the others notice, and say so themselves; one that was killed cannot."""
    if all(process.poll() is None for process in ranks):
        return False
    for rank, process in enumerate(ranks):
        if process.returncode is not None and process.returncode < 0:
            name = signal.Signals(-process.returncode).name
            why = {"time": 0.0, "said": f"was ended by signal {-process.returncode} ({name})"}
            (folder / f"rank{rank}.error").write_text(json.dumps(why))
    limit = time.monotonic() + _LAST_WORDS_S
    while any(process.poll() is None for process in ranks) and time.monotonic() < limit:
        time.sleep(_POLL_S)
    return True


def _router(bytes_per_s: float, slow: list[dict[str, Any] | None]) -> None:
    """In this process's own namespace: all that is not a node's."""
    for name, value in (("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")):
        Path("/proc/sys/net/ipv4", name).write_text(value)
    _ip("link set lo up")
    _trunk("trunk", bytes_per_s, table=100)
    if any(slow):
        _trunk("slow", max(entry["bytes_per_s"] for entry in filter(None, slow)), table=200)


def _detour(before: dict[str, Any] | None, after: dict[str, Any] | None, num_nodes: int) -> None:
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
    """What ``ip`` is to do one after another; in the network namespace of another process, if one is given."""
    enter = ["nsenter", f"--net=/proc/{within}/ns/net"] if within else []
    if commands:
        _run([*enter, "ip", "-batch", "-"], "\n".join(commands) + "\n")


def _run(command: list[str], lines: str = "") -> None:
    done = subprocess.run(command, input=lines, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _number_in(path: Path) -> int:
    """-1 where there is none, or not yet."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return -1


if __name__ == "__main__":
    cluster(json.loads(sys.argv[1]))
