"""Start ranks on this machine, let them run what is asked, and never leave one behind."""

from __future__ import annotations

import atexit
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from effkit.arguments import checked_number, checked_whole
from effkit.lab import Progress, tell
from effkit.moe import routing
from effkit.moe.recorded import Run, read
from effkit.moe.setting import Setting

Slow = Mapping[str, Any]
MOST_RANKS = 8
_POLL_S = 0.05
_GOODBYE_S = 5.0
_ERROR = re.compile(r"^(?:\[\w+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$", re.MULTILINE)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "PYTHONWARNINGS": "ignore",
    # keep freed memory, as the caching allocator does on a GPU: fresh pages would cost more than what we time
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip


class Ranks:
    """Ranks on this machine, which start with the first run and stay up for the next.

    They end when this is closed, when a run fails, and with this process, however it ends.

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
    """

    def __init__(
        self, num_ranks: int, *, link_bytes_per_s: float = 0.0, ranks_per_node: int = 0,
        slow: Slow | Sequence[Slow | None] | None = None, backend: str = "auto",
    ) -> None:  # fmt: skip
        self.num_ranks, self._backend = num_ranks, backend
        self._link, self._per_node, self._slow = link_bytes_per_s, ranks_per_node, slow
        self._up, self._num_runs = ExitStack(), 0

    def run(
        self, settings: Sequence[Setting], *, num_rounds: int = 3, num_steps: int = 4, barriers: bool = False,
        check: bool = False, links: int = 0, delays: int = 0, delay_bytes: int = 2**16,
        profile: str | Path | None = None, timeout_s: float = 120.0, progress: Progress | None = None,
        of_runs: tuple[int, int] = (0, 1),
    ) -> Run:  # fmt: skip
        """Run these settings in turn, ``num_rounds`` times ``num_steps`` steps of each.

        ValueError for a number of ranks that cannot be or cannot share the experts, or a link that this system does not
        let us make. RuntimeError when a rank ends or hangs: its own error, and where the log is.

        Parameters
        ----------
        barriers
            Let ranks meet before every exchange.
        check
            Also keep what was computed.
        links, delays
            Also time all-to-alls of several sizes; single messages of ``delay_bytes`` between all pairs; so many times.
        profile
            A folder for the traces of one more round of the first setting, a file per rank.
        timeout_s
            After this, the run is ended.
        progress
            ``progress(done, total)``; may raise, which ends the run.
        of_runs
            How many runs came before, and how many there are in all: ``progress`` tells of all of them.
        """
        on = self._checked()
        for setting in settings:
            routing.owners(setting, self.num_ranks)
        jobs = [{"setting": setting.plain(), "barriers": barriers} for setting in settings]
        run = {**on, "jobs": jobs, "num_rounds": num_rounds, "num_steps": num_steps, "check": check,
               "links": int(links), "delays": delays, "delay_bytes": delay_bytes, "profile": profile is not None,
               "timeout_s": timeout_s}  # fmt: skip
        try:
            if not self._num_runs:
                atexit.register(self.close)
                self._folder = self._up.enter_context(_own_folder())
                self._process = self._up.enter_context(_started(self._folder, self.num_ranks, on))
            folder = self._folder / str(self._num_runs)
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps(run))
            self._num_runs += 1
            before, total = (number * (num_rounds + 1) * len(jobs) for number in of_runs)
            _watch(self._process, folder, self.num_ranks, timeout_s, progress, before, total)
            recorded = read(folder)
            if profile is not None:
                Path(profile).mkdir(parents=True, exist_ok=True)
                for trace in folder.glob("trace*.json"):
                    shutil.move(trace, Path(profile) / trace.name)
            return recorded
        except BaseException:
            self._end(*sys.exc_info())
            raise

    def _checked(self) -> dict[str, Any]:
        """What the ranks are to know of each other."""
        num_ranks, per_node, slow = self.num_ranks, self._per_node, self._slow
        check(num_ranks, self._link, per_node, self._backend)
        per_node = per_node or (1 if self._link or slow else num_ranks)
        detours = [slow] if isinstance(slow, Mapping) else list(slow or ())
        _check_detours(detours, num_ranks // per_node)
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        return {"slow": [dict(entry) if entry else None for entry in detours], "backend": self._backend,
                "num_threads": max(1, num_cores // num_ranks), "nodes_here": num_ranks // per_node,
                "ranks_per_node": per_node, "link_bytes_per_s": self._link}  # fmt: skip

    def close(self) -> None:
        """End the ranks; another run starts others."""
        self._end(None, None, None)

    def _end(self, *error: Any) -> None:
        atexit.unregister(self.close)
        self._num_runs = 0
        self._up.__exit__(*error)

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


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
    for tool in ("unshare", "nsenter", "ip", "tc"):
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


@contextmanager
def _started(folder: Path, num_ranks: int, on: Mapping[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The process that starts the ranks, and ends them when its standard input closes: with this process, at the
    latest."""
    plan = {"folder": str(folder), "num_ranks": num_ranks, "per_node": on["ranks_per_node"],
            "num_nodes": on["nodes_here"], "bytes_per_s": on["link_bytes_per_s"], "slow": on["slow"]}  # fmt: skip
    apart = _unshare() if plan["bytes_per_s"] or plan["slow"] else ()
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": path, "TMPDIR": str(folder)}
    with (folder / "log.txt").open("wb") as log:
        # a session of its own: an interrupt from the terminal reaches us alone, and we end the ranks
        process = subprocess.Popen([*apart, sys.executable, "-m", "effkit.moe.forking", json.dumps(plan)], bufsize=0,
                                   stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, env=environment,
                                   start_new_session=True)  # fmt: skip
    assert process.stdin is not None
    try:
        yield process
    finally:
        with suppress(OSError):
            process.stdin.close()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(_GOODBYE_S)
        finally:
            process.kill()
            process.wait()


def _watch(
    process: subprocess.Popen[bytes], folder: Path, num_ranks: int, timeout_s: float, progress: Progress | None,
    before: int, total: int,
) -> None:  # fmt: skip
    """Have the ranks run what stands in the folder, until all have written what they saw."""
    log, limit, done = folder.parent / "log.txt", time.monotonic() + timeout_s, folder / "progress"
    with suppress(OSError):  # it has ended; the log says why
        process.stdin.write(f"{folder.name}\n".encode())  # type: ignore[union-attr]
    while len(list(folder.glob("rank*.json"))) < num_ranks:
        if process.poll() is not None:
            raise RuntimeError(f"{_why(folder, log)}; the log is {log}")
        if time.monotonic() > limit:
            raise RuntimeError(f"the ranks were not done after {timeout_s:g} s and were ended; the log is {log}")
        tell(progress, before + (done.stat().st_size if done.exists() else 0), total)
        time.sleep(_POLL_S)


def _why(folder: Path, log: Path) -> str:
    """Which rank ended the run, in its own words: one that was killed left none, one that hangs neither."""
    errors = []
    for path in folder.glob("rank*.error"):
        with suppress(ValueError):
            why = json.loads(path.read_text())
            errors.append((why["time"], path.stem.removeprefix("rank"), why["said"]))
    if errors:
        _, rank, words = min(errors)
        return f"rank {rank} {words}"
    text = log.read_text(errors="replace")
    # one that did not come as far as that: what it said, before its launcher's lines about it
    said = _ERROR.findall(text) or text.strip().splitlines()[-1:] or ["no word"]
    return f"the ranks could not be started: {said[0]}"
