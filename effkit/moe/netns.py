"""The machines that ranks run on, made on this one: a process tree that ends with its parent.

Run by its path, as a script of the standard library alone, with a JSON plan as its only argument:

* ``{"command": [...]}``: this process becomes the command.
* ``{"command": [...], "num_nodes": 2, "bytes_per_s": 1e8}``: every node is a network namespace of its own, and what
  they send each other goes through one trunk of that rate.
* ``slow`` (optional), a list of what is slow one after another, with ``folder``, where ranks ask for the next
  (:func:`ask_for`). ``{"sender": s, "receiver": r, "bytes_per_s": ...}``: what node s sends to node r takes a slower
  trunk. Without ``receiver``, all that s sends does; without ``sender``, all that r receives; ``{"rank": r, ...}``:
  both. ``null``: nothing is slow.
* ``{"folder": ...}`` alone: this process becomes a rank of the run in that folder.
* ``parent`` (optional): the process that this one is to end with, if it is no longer there when we look.

In the command, ``{node}`` and ``{master}`` stand for the node's number and the first node's address, ``{pid}`` for the
process that becomes it.

The trunk carries both directions. Two one-way limits were tried: TCP then settles at full or at half their rate, by
chance, because acknowledgements wait behind the data of the other direction.
"""

from __future__ import annotations

import ctypes
import json
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
_PR_SET_PDEATHSIG = 1
_LAST_WORDS_S = 2.0
_POLL_S = 0.02
_ASKED, _MADE = "slow.asked", "slow.made"  # files in the run's folder, each with a number in it


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


def node(plan: dict[str, Any], number: int) -> None:
    """One node, in its own namespace: set up the interface that was moved here, and become the command."""
    sys.stdin.readline()  # it is here
    _run("ip", "link", "set", "lo", "up")
    _run("ip", "address", "add", ADDRESS.format(number + 1), "dev", "eth0")
    _run("ip", "link", "set", "eth0", "arp", "off", "up")
    # to the other nodes and nowhere else: who asks a name server then hears at once that there is none
    _run("ip", "route", "add", ADDRESS.format(0) + "/24", "dev", "eth0")
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = "eth0"
    _become(plan["command"], number)


def cluster(plan: dict[str, Any]) -> int:
    """All nodes and the router between them; the first exit code that is not 0."""
    slow, num_nodes = plan.get("slow") or [], plan["num_nodes"]
    _run("ip", "link", "set", "lo", "up")
    for name, value in (("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")):
        Path("/proc/sys/net/ipv4", name).write_text(value)
    _trunk("trunk", plan["bytes_per_s"], table=100)
    if any(slow):
        _trunk("slow", max(entry["bytes_per_s"] for entry in filter(None, slow)), table=200)
    nodes = [_started(plan, number) for number in range(num_nodes)]
    made = 0
    _detour(None, slow[0] if slow else None, num_nodes)
    for process in nodes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.close()
    while any(process.poll() is None for process in nodes):
        if failed := _exit_code(nodes):
            time.sleep(_LAST_WORDS_S)  # the others notice, and say so themselves
            for process in nodes:
                process.kill()
            return failed
        if slow and (asked := _number_in(Path(plan["folder"], _ASKED))) not in (made, -1):
            _detour(slow[made], slow[asked], num_nodes)
            made = asked
            Path(plan["folder"], _MADE).write_text(str(made))
        time.sleep(_POLL_S)
    return _exit_code(nodes)


def _started(plan: dict[str, Any], number: int) -> subprocess.Popen[str]:
    """The process of a node, in a network namespace of its own that is linked to the router's."""
    own_plan = json.dumps(plan | {"node": number, "parent": os.getpid()})
    process = subprocess.Popen(["unshare", "--net", sys.executable, __file__, own_plan], stdin=subprocess.PIPE,
                               text=True)  # fmt: skip
    with suppress(OSError):  # it has ended; what we ask of it next says so
        while process.poll() is None and os.path.samefile(f"/proc/{process.pid}/ns/net", "/proc/self/ns/net"):
            time.sleep(0.002)
    port = f"port{number}"
    _run("ip", "link", "add", port, "address", _MAC, "mtu", _MTU, "type", "veth", "peer", "name", "eth0",
         "address", _MAC, "mtu", _MTU, "netns", str(process.pid))  # fmt: skip
    _run("ip", "link", "set", port, "arp", "off", "up")
    _run("ip", "route", "add", ADDRESS.format(number + 1), "dev", port)
    # what comes from a node goes through the trunk; what comes out of the trunk goes where it is addressed
    _run("ip", "rule", "add", "iif", port, "table", "100", "priority", "20")
    return process


def _exit_code(nodes: list[subprocess.Popen[str]]) -> int:
    return next((process.returncode for process in nodes if process.returncode), 0)


def _detour(before: dict[str, Any] | None, after: dict[str, Any] | None, num_nodes: int) -> None:
    """Send what is slow now over the slow trunk, and what was slow before no more."""
    for sender, receiver in _slow_pairs(before, num_nodes):
        _run("ip", "rule", "delete", *_rule(sender, receiver))
    if after:
        _rate("change", "slow", after["bytes_per_s"])
    for sender, receiver in _slow_pairs(after, num_nodes):
        _run("ip", "rule", "add", *_rule(sender, receiver))


def _rule(sender: int, receiver: int) -> tuple[str, ...]:
    return ("iif", f"port{sender}", "to", ADDRESS.format(receiver + 1), "table", "200", "priority", "10")


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
    _run("ip", "link", "add", f"{name}0", "address", _MAC, "mtu", _MTU, "type", "veth", "peer", "name", f"{name}1",
         "address", _MAC, "mtu", _MTU)  # fmt: skip
    for end in ("0", "1"):
        _run("ip", "link", "set", name + end, "arp", "off", "up")
    if bytes_per_s:
        _rate("add", name, bytes_per_s)
    _run("ip", "route", "add", "default", "dev", f"{name}0", "table", str(table))


def _rate(verb: str, name: str, bytes_per_s: float) -> None:
    _run("tc", "qdisc", verb, "dev", f"{name}0", "root", "tbf", "rate", f"{round(8 * bytes_per_s)}bit",
         "burst", "16k", "latency", "400ms")  # fmt: skip


def _number_in(path: Path) -> int:
    """-1 where there is none, or not yet."""
    with suppress(OSError, ValueError):
        return int(path.read_text())
    return -1


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


def _become(command: list[str], number: int) -> None:
    for sign, value in (("{node}", number), ("{master}", ADDRESS.format(1)), ("{pid}", os.getpid())):
        command = [part.replace(sign, str(value)) for part in command]
    os.execvp(command[0], command)


def main() -> None:
    plan = json.loads(sys.argv[1])
    end_with_parent(int(plan.get("parent", 0)))
    if "node" in plan:
        node(plan, plan["node"])
    if "num_nodes" in plan:
        sys.exit(cluster(plan))
    rank = [sys.executable, "-u", "-m", "effkit.moe.rank", plan.get("folder", "")]
    _become(plan.get("command", rank), 0)


if __name__ == "__main__":
    main()
