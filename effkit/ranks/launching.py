"""Start ranks on this machine, let them do what is asked, and never leave one behind."""

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
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from effkit.arguments import checked_number, checked_whole
from effkit.lab import Progress, tell

MOST_RANKS = 8
_POLL_S = 0.05
_GOODBYE_S = 5.0
_ERROR = re.compile(r"^(?:\[\w+\]:\s*)?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)$", re.MULTILINE)
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99", "PYTHONWARNINGS": "ignore",
    # keep freed memory, as the caching allocator does on a GPU: fresh pages would cost more than what we time
    "MALLOC_MMAP_THRESHOLD_": str(2**30), "MALLOC_TRIM_THRESHOLD_": str(2**30), "MALLOC_TOP_PAD_": str(2**26),
}  # fmt: skip


class Ranks(AbstractContextManager["Ranks", None]):
    """Ranks on this machine, which start with the first run and stay up for the next.

    They end when this is closed, when a run fails, and with this process, however it ends.

    Parameters
    ----------
    work
        The name of the module that they run, as :mod:`effkit.ranks` says.
    link_bytes_per_s
        Every node (``ranks_per_node`` ranks, 1 unless given) is a network namespace whose interface sends no faster
        than this; 0: all ranks share this machine's loopback.
    """

    def __init__(
        self, num_ranks: int, work: str, *, link_bytes_per_s: float = 0.0, ranks_per_node: int = 0,
        backend: str = "auto",
    ) -> None:  # fmt: skip
        self.num_ranks, self._work, self._backend = num_ranks, work, backend
        self._link, self._per_node = link_bytes_per_s, ranks_per_node
        self._up, self._num_runs = ExitStack(), 0
        self._process: Any = None

    def start(self, imports: Sequence[str] = ()) -> None:
        """Have what the ranks need, and these modules, be imported while this process does something else; the first
        run does it otherwise. ValueError as of :meth:`run`."""
        self.check()
        if self._process is None:
            atexit.register(self.close)
            self._folder = self._up.enter_context(_own_folder())
            per_node = self._per_node or (1 if self._link else self.num_ranks)
            self._plan = {"work": self._work, "folder": str(self._folder), "num_ranks": self.num_ranks,
                          "per_node": per_node, "num_nodes": self.num_ranks // per_node, "bytes_per_s": self._link,
                          "imports": list(imports)}  # fmt: skip
            self._process = self._up.enter_context(_started(self._plan))

    def run(
        self, run: Mapping[str, Any], *, timeout_s: float = 120.0, progress: Progress | None = None, before: int = 0,
        total: int = 0,
    ) -> Path:  # fmt: skip
        """Let every rank do what ``run`` says, in plain values; the folder of what they wrote, until this is closed.

        ValueError for ranks that cannot be, or a link that this system does not let us make. RuntimeError when a rank
        ends or hangs: its own error, and where the log is.

        Parameters
        ----------
        timeout_s
            After this, the run is ended.
        progress
            ``progress(done, total)``: ``before`` and what the first rank has told since; may raise, which ends the run.
        """
        self.start()
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        on = {"backend": self._backend, "num_threads": max(1, num_cores // self.num_ranks), "timeout_s": timeout_s,
              "nodes_here": self._plan["num_nodes"], "ranks_per_node": self._plan["per_node"],
              "link_bytes_per_s": self._link}  # fmt: skip
        try:
            folder = self._folder / str(self._num_runs)
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps({**run, **on}))
            self._num_runs += 1
            self._watch(folder, timeout_s, progress, before, total)
            return folder
        except BaseException:
            self._end(*sys.exc_info())
            raise

    def check(self) -> None:
        """Raise ValueError unless such ranks can be started here."""
        num_ranks, per_node, backend = self.num_ranks, self._per_node, self._backend
        if not 2 <= checked_whole("num_ranks", num_ranks, 1) <= MOST_RANKS:
            raise ValueError(f"num_ranks is 2 to {MOST_RANKS} on one machine; given: {num_ranks}. On a cluster, start "
                             f"{self._work} with torchrun")  # fmt: skip
        checked_number("link_bytes_per_s", self._link, said="a rate, or 0 for this machine's own")
        if checked_whole("ranks_per_node", per_node, 0) and num_ranks % per_node:
            raise ValueError(f"ranks_per_node divides num_ranks; given: {per_node} and {num_ranks}")
        if backend not in ("auto", "gloo", "nccl"):
            raise ValueError(f"backend is one of auto, gloo, nccl; given: {backend!r}")
        if backend == "nccl":
            from effkit.ranks.group import check_gpus

            check_gpus(num_ranks)
        if self._link and (why := why_no_links()):
            raise ValueError(f"no slower link can be made here: {why}. Leave link_bytes_per_s at 0 and model it: "
                             "predict(base, link_bytes_per_s=...)")  # fmt: skip

    def _watch(self, folder: Path, timeout_s: float, progress: Progress | None, before: int, total: int) -> None:
        """Have the ranks run what stands in the folder, until all have written what they saw."""
        process, log, done = self._process, folder.parent / "log.txt", folder / "progress"
        limit = time.monotonic() + timeout_s
        with suppress(OSError):  # it has ended; the log says why
            process.stdin.write(f"{folder.name}\n".encode())
        while len(list(folder.glob("rank*.json"))) < self.num_ranks:
            if process.poll() is not None:
                raise RuntimeError(f"{_why(folder, log)}; the log is {log}")
            if time.monotonic() > limit:
                raise RuntimeError(f"the ranks were not done after {timeout_s:g} s and were ended; the log is {log}")
            tell(progress, before + (done.stat().st_size if done.exists() else 0), total)
            time.sleep(_POLL_S)

    def close(self) -> None:
        """End the ranks; another run starts others."""
        self._end(None, None, None)

    def _end(self, *error: Any) -> None:
        atexit.unregister(self.close)
        self._num_runs, self._process = 0, None
        self._up.__exit__(*error)

    def __exit__(self, *_: object) -> None:
        self.close()


@contextmanager
def _own_folder() -> Iterator[Path]:
    """A folder that goes when this run ends, or when this process is killed; after a RuntimeError it stays, for those
    who read the log in it."""
    folder = Path(tempfile.mkdtemp(prefix="effkit-ranks-"))
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


@contextmanager
def _started(plan: Mapping[str, Any]) -> Iterator[subprocess.Popen[bytes]]:
    """The process that starts the ranks, and ends them when its standard input closes: with this process, at the
    latest."""
    folder, apart = Path(plan["folder"]), _unshare() if plan["bytes_per_s"] else ()
    # what can be imported here can be imported there
    environment = {**os.environ, **_ENVIRONMENT, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
                   "TMPDIR": str(folder)}  # fmt: skip
    with (folder / "log.txt").open("wb") as log:
        # a session of its own: an interrupt from the terminal reaches us alone, and we end the ranks
        process = subprocess.Popen([*apart, sys.executable, "-m", "effkit.ranks.forking", json.dumps(plan)], bufsize=0,
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
