"""Networks for ranks, made on this machine: nodes that are namespaces, and the router between them.

What nodes send each other goes through one trunk of a rate. It carries both directions: two one-way limits were tried,
and TCP then settles at full or at half their rate, by chance, because acknowledgements wait behind the data of the
other direction.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

ADDRESS = "10.77.0.{}"  # of node number + 1
_MTU = "9000"  # with the usual 1500 and a deep bucket, small messages are distorted
_MAC = "02:00:00:00:00:01"  # of all interfaces: with one address, none has to ask for another's
_CLONE_NEWNET = 0x40000000


def node(number: int) -> int:
    """A namespace that is linked to the router's, this process's own; its file descriptor."""
    own = os.open("/proc/self/ns/net", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        sys.exit(f"unshare: {os.strerror(ctypes.get_errno())}")
    here = os.open("/proc/self/ns/net", os.O_RDONLY)
    enter(own)
    port = f"port{number}"
    # to the other nodes and nowhere else: who asks a name server then hears at once that there is none
    ip(
        f"link add eth0 address {_MAC} mtu {_MTU} type veth peer name {port} address {_MAC} mtu {_MTU} "
        f"netns {os.getpid()}",
        "link set lo up", f"address add {ADDRESS.format(number + 1)} dev eth0", "link set eth0 arp off up",
        f"route add {ADDRESS.format(0)}/24 dev eth0", within=f"/proc/{os.getpid()}/fd/{here}",
    )  # fmt: skip
    # what comes from a node goes through the trunk; what comes out of the trunk goes where it is addressed
    ip(f"link set {port} arp off up", f"route add {ADDRESS.format(number + 1)} dev {port}",
       f"rule add iif {port} table 100 priority 20")  # fmt: skip
    return here


def enter(namespace: int) -> None:
    """Go into a namespace."""
    if ctypes.CDLL(None, use_errno=True).setns(namespace, _CLONE_NEWNET):
        sys.exit(f"setns: {os.strerror(ctypes.get_errno())}")


def router(bytes_per_s: float) -> None:
    """In this process's own namespace: all that is not a node's."""
    for name, value in (("ip_forward", "1"), ("conf/all/rp_filter", "0"), ("conf/default/rp_filter", "0")):
        Path("/proc/sys/net/ipv4", name).write_text(value)
    ip("link set lo up")
    trunk("trunk", bytes_per_s, table=100)


def trunk(name: str, bytes_per_s: float, table: int, within: str = "") -> None:
    """A loop of two interfaces: what the table sends into one end comes out of the other, no faster than this."""
    ip(f"link add {name}0 address {_MAC} mtu {_MTU} type veth peer name {name}1 address {_MAC} mtu {_MTU}",
       f"link set {name}0 arp off up", f"link set {name}1 arp off up",
       f"route add default dev {name}0 table {table}", within=within)  # fmt: skip
    limit(name, bytes_per_s, within)


def limit(name: str, bytes_per_s: float, within: str = "") -> None:
    """The rate of a trunk, from now on."""
    shape = f"tc qdisc replace dev {name}0 root tbf rate {round(8 * bytes_per_s)}bit burst 16k latency 400ms"
    _run(shape.split(), within)


def ip(*commands: str, within: str = "") -> None:
    """What ``ip`` is to do one after another; in the namespace of this path, if one is given.

    A rank's parent process is in the router's: ``/proc/<process id>/ns/net``.
    """
    _run(["ip", "-batch", "-"], within, "\n".join(commands) + "\n")


def _run(command: list[str], within: str, lines: str = "") -> None:
    into = ["nsenter", f"--net={within}"] if within else []
    done = subprocess.run([*into, *command], input=lines, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
