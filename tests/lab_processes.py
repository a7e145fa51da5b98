"""Servers of a test, and the processes that descend from it: where they may write, how they end, and what is left."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

# Every cell is in the page, on the screen or not. The rest is JupyterLab as it comes.
TRACKER = ("@jupyterlab/notebook-extension/tracker.jupyterlab-settings", '{"windowingMode": "none"}')
PR_SET_PDEATHSIG = 1  # from <linux/prctl.h>


@contextmanager
def serving(command: list[str], folder: Path, home: Path, log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in `folder`, with `home` as its own and what it says in `log`; it ends with its kernels."""
    with log.open("wb") as said:
        server = subprocess.Popen(
            command,
            cwd=folder,
            env=_own_environment(home),
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_ended_with_its_parent(),
        )
    try:
        yield server
    finally:
        _end(server)


def started_by(pid: int) -> set[psutil.Process]:
    """All that descend from a process."""
    return set(psutil.Process(pid).children(recursive=True))


def still_there(processes: set[psutil.Process]) -> list[str]:
    """The commands of those that have not ended ten seconds from now; they are ended then, for the next test's sake.

    One that has ended but that its new parent has not yet buried has ended.
    """
    left = [p for p in psutil.wait_procs(processes, timeout=10)[1] if p.status() != psutil.STATUS_ZOMBIE]
    commands = [" ".join(process.cmdline()) for process in left]
    for process in left:
        process.kill()
    return commands


def left_by_a_killed_test(code: str, *arguments: str) -> list[str]:
    """Run a test that prints the id of its server and waits; kill it, and say what is still there."""
    # a killed test cannot remove its files; the folder's name is short because chromium puts a socket in it
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temp:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": temp}
        command = [sys.executable, "-c", code, *arguments]
        with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as test:
            try:
                server = int(test.stdout.readline())
                family = started_by(test.pid)
                assert psutil.Process(server) in family
                assert started_by(server), "no kernel was seen, so its end would prove nothing"
            finally:
                test.send_signal(signal.SIGKILL)
        return still_there(family)


def _own_environment(home: Path) -> dict[str, str]:
    """The environment in which Jupyter and IPython read and write in `home` and nowhere else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JUPYTER", "IPYTHON"))}
    folders = ["JUPYTER_CONFIG", "JUPYTER_DATA", "JUPYTER_RUNTIME", "JUPYTERLAB_SETTINGS", "JUPYTERLAB_WORKSPACES"]
    env |= {f"{name}_DIR": str(home / name) for name in folders} | {"IPYTHONDIR": str(home / "ipython")}
    setting = home / "JUPYTERLAB_SETTINGS" / TRACKER[0]
    setting.parent.mkdir(parents=True)
    setting.write_text(TRACKER[1])
    return env


def _ended_with_its_parent() -> Callable[[], None] | None:
    """What a child does first so that the system stops it when the test is killed outright."""
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None)
    return lambda: libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM) and None


def _end(server: subprocess.Popen[bytes]) -> None:
    """Ask the server to stop, which stops its kernels, then end by id what is still there."""
    try:
        family = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    server.terminate()
    try:
        server.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(server.pid, signal.SIGKILL)  # the server leads a group of its own
        server.wait()
    for process in psutil.wait_procs(family, timeout=5)[1]:
        process.kill()  # psutil knows a process by its start time too: never a stranger with a reused id
    psutil.wait_procs(family, timeout=5)
