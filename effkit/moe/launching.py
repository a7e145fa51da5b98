"""Start ranks on this machine with torch's elastic launcher, and never leave one behind."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from effkit.arguments import checked_number, checked_whole
from effkit.lab import Progress, tell
from effkit.moe import netns, routing
from effkit.moe.recorded import Run, read
from effkit.moe.setting import Setting

Slow = Mapping[str, Any]
MOST_RANKS = 8
_PORT = 29411  # in namespaces of their own, every run has all ports to itself
_POLL_S = 0.05
_GOODBYE_S = 5.0
_ERROR = re.compile(r"^(?:\[\w+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$", re.MULTILINE)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "PYTHONWARNINGS": "ignore",
    # keep freed memory, as the caching allocator does on a GPU: fresh pages would cost more than what we time
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip


def launch(
    settings: Sequence[Setting], num_ranks: int, *, num_rounds: int = 3, num_steps: int = 4, barriers: bool = False,
    link_bytes_per_s: float = 0.0, ranks_per_node: int = 0, slow: Slow | Sequence[Slow | None] | None = None,
    links: int = 0, delays: int = 0, delay_bytes: int = 2**16, profile: str | Path | None = None, backend: str = "auto",
    timeout_s: float = 120.0, progress: Progress | None = None,
) -> Run:  # fmt: skip
    """Run these settings in turn, ``num_rounds`` times ``num_steps`` steps of each, on ranks of their own.

    ValueError for a number of ranks that cannot be or cannot share the experts, or a link that this system does not let
    us make. RuntimeError when a rank ends or hangs: its own error, and where the log is.

    Parameters
    ----------
    link_bytes_per_s
        Every node (``ranks_per_node`` ranks, 1 unless given) is a network namespace whose interface sends no faster
        than this; 0: all ranks share this machine's loopback.
    slow
        What takes a trunk of its own, slower or not, of ``bytes_per_s``: all that the node ``sender`` sends, or the
        node ``receiver`` is sent, or with both what one sends the other, or with ``rank`` all that a node does. Nodes
        are numbered; each is one rank, unless ``ranks_per_node`` says otherwise. Several of these, or None, are made
        one after another, and ``delays`` measured under each.
    barriers
        Let ranks meet before every exchange.
    links, delays
        Also time all-to-alls of several sizes; single messages of ``delay_bytes`` between all pairs; so many times.
    profile
        A folder for the traces of one more round of the first setting, a file per rank.
    timeout_s
        After this, the run is ended.
    progress
        ``progress(done, total)``; may raise, which ends the run.
    """
    check(num_ranks, link_bytes_per_s, ranks_per_node, backend)
    per_node = ranks_per_node or (1 if link_bytes_per_s or slow else num_ranks)
    for setting in settings:
        routing.owners(setting, num_ranks)
    detours = [slow] if isinstance(slow, Mapping) else list(slow or ())
    _check_detours(detours, num_ranks // per_node)
    jobs = [{"setting": setting.plain(), "barriers": barriers} for setting in settings]
    run = {"jobs": jobs, "num_rounds": num_rounds, "num_steps": num_steps, "links": int(links), "delays": delays,
           "delay_bytes": delay_bytes, "slow": [dict(entry) if entry else None for entry in detours],
           "profile": profile is not None, "backend": backend, "timeout_s": timeout_s,
           "num_threads": max(1, len(os.sched_getaffinity(0)) // num_ranks) if hasattr(os, "sched_getaffinity") else 1,
           "nodes_here": num_ranks // per_node, "ranks_per_node": per_node,
           "link_bytes_per_s": link_bytes_per_s}  # fmt: skip
    with _own_folder() as folder:
        (folder / "run.json").write_text(json.dumps(run))
        _watch(_command(folder, num_ranks, run), folder, num_ranks, timeout_s, progress, (num_rounds + 1) * len(jobs))
        recorded = read(folder)
        if profile is not None:
            Path(profile).mkdir(parents=True, exist_ok=True)
            for trace in folder.glob("trace*.json"):
                shutil.move(trace, Path(profile) / trace.name)
        return recorded


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder that goes when this run ends, or when this process is killed; after a RuntimeError it stays, for those
    who read the log in it."""
    folder = Path(tempfile.mkdtemp(prefix="effkit-moe-"))
    # what it reads ends with this process, whose ranks then need a moment to end
    command = ["sh", "-c", 'read -r done || { sleep 1; rm -rf "$0"; }', str(folder)]
    after_us = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) if os.name == "posix" else None
    failed = False
    try:
        yield folder
    except RuntimeError:
        failed = True
        raise
    finally:
        if after_us is not None:
            after_us.communicate(b"done\n")
        if not failed:
            shutil.rmtree(folder, ignore_errors=True)


def check(num_ranks: int, link_bytes_per_s: float, ranks_per_node: int, backend: str) -> None:
    """Raise ValueError unless such ranks can be started here."""
    if not 2 <= checked_whole("num_ranks", num_ranks, 1) <= MOST_RANKS:
        raise ValueError(f"num_ranks is 2 to {MOST_RANKS} on one machine; given: {num_ranks}. On a cluster, start "
                         "effkit.moe.rank with torchrun")  # fmt: skip
    checked_number("link_bytes_per_s", link_bytes_per_s, said="a rate, or 0 for this machine's own")
    if checked_whole("ranks_per_node", ranks_per_node, 0) and num_ranks % ranks_per_node:
        raise ValueError(f"ranks_per_node divides num_ranks; given: {ranks_per_node} and {num_ranks}")
    if backend not in ("auto", "gloo", "nccl"):
        raise ValueError(f"backend is one of auto, gloo, nccl; given: {backend!r}")
    if backend == "nccl":
        import torch

        if torch.cuda.device_count() < num_ranks:
            raise ValueError(f"nccl needs a GPU for each of the {num_ranks} ranks; there are "
                             f"{torch.cuda.device_count()}. Use gloo")  # fmt: skip
    if link_bytes_per_s and (why := why_no_links()):
        raise ValueError(f"no slower link can be made here: {why}. Leave link_bytes_per_s at 0 and model it: "
                         "predict(base, link_bytes_per_s=...)")  # fmt: skip


@functools.cache
def why_no_links() -> str:
    """Why this system does not let us limit a link's rate; empty where it does."""
    for tool in ("unshare", "ip", "tc"):
        if shutil.which(tool) is None:
            return f"the program {tool} is not installed"
    trial = ("ip link add port0 type veth peer name port1 && ip link add bridge0 type bridge && ip link set port0 up "
             "&& tc qdisc add dev port0 root tbf rate 1mbit burst 16k latency 400ms")  # fmt: skip
    done = subprocess.run([*_unshare(), "sh", "-c", trial], capture_output=True, text=True)
    return (done.stderr.strip().splitlines() or ["not permitted"])[-1] if done.returncode else ""


@functools.cache
def _unshare() -> tuple[str, ...]:
    """A network namespace of one's own: as root, or as a user who is root in it."""
    rooted = subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode == 0
    return ("unshare", "--net") if rooted else ("unshare", "--user", "--map-root-user", "--net")


def _check_detours(detours: Sequence[Slow | None], num_nodes: int) -> None:
    for slow in filter(None, detours):
        names = set(slow) - {"bytes_per_s"}
        if "bytes_per_s" not in slow or names not in ({"sender"}, {"receiver"}, {"sender", "receiver"}, {"rank"}):
            raise ValueError(f"slow has bytes_per_s, and sender, receiver, both or rank; given: {', '.join(slow)}")
        nodes = {int(slow[name]) for name in names}
        if len(nodes) < len(names) or not nodes <= set(range(num_nodes)):
            raise ValueError(f"slow names nodes 0 to {num_nodes - 1}, two different ones for a link; given: "
                             f"{dict(slow)}")  # fmt: skip
        if not slow["bytes_per_s"] > 0:
            raise ValueError(f"bytes_per_s of what is slow is a rate above 0; given: {slow['bytes_per_s']}")
    if detours and (why := why_no_links()):
        raise ValueError(f"no slow link can be made here: {why}. Leave slow out")


def _command(folder: Path, num_ranks: int, run: Mapping[str, Any]) -> list[str]:
    """A process that ends with this one, and that all others end with (:func:`netns.end_with_parent`)."""
    per_node = run["ranks_per_node"]
    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(per_node)]
    rank = [netns.__file__, json.dumps({"folder": str(folder), "parent": "{pid}"})]
    plan: dict[str, Any] = {"parent": os.getpid()}
    if not run["link_bytes_per_s"] and not run["slow"]:
        plan["command"] = [*start, "--standalone", *rank]
        return [sys.executable, netns.__file__, json.dumps(plan)]
    num_nodes = num_ranks // per_node
    start += ["--nnodes", str(num_nodes), "--node-rank", "{node}", "--master-addr", "{master}"]
    plan |= {"command": [*start, "--master-port", str(_PORT), *rank], "num_nodes": num_nodes, "folder": str(folder),
             "bytes_per_s": run["link_bytes_per_s"], "slow": run["slow"]}  # fmt: skip
    return [*_unshare(), sys.executable, netns.__file__, json.dumps(plan)]


def _watch(
    command: list[str], folder: Path, num_ranks: int, timeout_s: float, progress: Progress | None, total: int
) -> None:
    """Run it to its end, or end it, and whatever it started. Ranks that have written all they saw are done, whether
    they then end well, badly, or not at all: the launcher waits for them at a barrier of its own, up to five
    minutes."""
    path = os.pathsep.join(filter(None, [str(Path(netns.__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    # the launcher leaves folders of its own behind: they go with ours
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, "TMPDIR": str(folder)}
    log, limit, done_by = folder / "log.txt", time.monotonic() + timeout_s, 0.0
    with log.open("wb") as out:
        # a session of its own: an interrupt from the terminal reaches us alone, and we end the ranks
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
                                   env=environment, start_new_session=True)  # fmt: skip
        try:
            while process.poll() is None and (not done_by or time.monotonic() < done_by):
                if not done_by and _num_written(folder) == num_ranks:
                    done_by = time.monotonic() + _GOODBYE_S
                if not done_by and time.monotonic() > limit:
                    raise RuntimeError(f"the ranks were not done after {timeout_s:g} s and were ended; the log is "
                                       f"{log}")  # fmt: skip
                done = folder / "progress"
                tell(progress, done.stat().st_size if done.exists() else 0, total)
                time.sleep(_POLL_S)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
            _end_all(folder)
    if _num_written(folder) < num_ranks:
        raise RuntimeError(f"{_why(folder, log)}; the log is {log}")


def _num_written(folder: Path) -> int:
    return len(list(folder.glob("rank*.json")))


def _end_all(folder: Path) -> None:
    """Wait until no process of this run is left; where the system lists them, after a moment end them ourselves."""
    patience = time.monotonic() + _GOODBYE_S / 2
    while left := _left(folder):
        if time.monotonic() > patience:
            for process_id in left:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(process_id, signal.SIGKILL)
            if time.monotonic() > patience + _GOODBYE_S:
                return
        time.sleep(_POLL_S)


def _left(folder: Path) -> list[int]:
    """Processes of this run: the folder's name is its alone, and stands in the command line of each."""
    process_ids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            words = path.read_bytes()
            ours = b"effkit.moe.rank" in words or os.fsencode(netns.__file__) in words
            if ours and os.fsencode(folder.name) in words and int(path.parent.name) != os.getpid():
                process_ids.append(int(path.parent.name))
    return process_ids


def _why(folder: Path, log: Path) -> str:
    """Which rank ended the run, in its own words: one that was killed left none, one that hangs neither."""
    text = log.read_text(errors="replace")
    for rank, number in re.findall(r"rank\s*: (\d+) \(.*?\n\s*exitcode\s*: -(\d+)", text):
        if int(number) not in (signal.SIGTERM, signal.SIGABRT):  # those end a rank because another one failed
            return f"rank {rank} was ended by signal {number} ({signal.Signals(int(number)).name})"
    errors = []
    for path in folder.glob("rank*.error"):
        with suppress(ValueError):
            said = json.loads(path.read_text())
            errors.append((said["time"], path.stem.removeprefix("rank"), said["error"]))
    if errors:
        _, rank, error = min(errors)
        return f"rank {rank} ended the run with {error}"
    # one that did not come as far as that: what it said, before its launcher's lines about it
    said = _ERROR.findall(text) or text.strip().splitlines()[-1:] or ["no word"]
    return f"the ranks could not be started: {said[0]}"
