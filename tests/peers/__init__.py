"""The peers that read traces: Holistic Trace Analysis and torch-tb-profiler, in an environment of their own.

The scripts beside this file run there, by their path; tests ask them through :func:`ask` and compare.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-peers" / "bin" / "python"
RECORDED = Path(os.environ.get("EFFKIT_RECORDED", HERE.parents[2] / "shared" / "data"))  # other people's recordings


def why_not() -> str | None:
    """Why nothing can be compared on this machine; ``None`` where it can."""
    if not (RECORDED / "traces").is_dir():
        return f"no recordings at {RECORDED}: set EFFKIT_RECORDED to their folder"
    if not PYTHON.exists():
        return "the peers are not installed: make .venv/.peers"
    return None


class _Running:
    """A peer's process: started once, it answers until its input ends."""

    def __init__(self, peer: str) -> None:
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (as long as the process lives)
        command = [str(PYTHON), "-W", "ignore", str(HERE / f"{peer}_breakdown.py")]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": self.said}
        self.process = subprocess.Popen(command, text=True, **pipes)

    def answer(self, *arguments: str) -> str:
        print(json.dumps(arguments), file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def end(self) -> str:
        """What it said of errors."""
        self.process.communicate(timeout=20)
        self.said.seek(0)
        return self.said.read()


_RUNNING: dict[str, _Running] = {}


def ask(peer: str, path: Path, *options: str) -> dict:
    """What a peer answers about a trace or a folder of traces; ``peer`` is "hta" or "tb".

    RuntimeError, with what it said, where its process has ended.
    """
    if peer not in _RUNNING:
        _RUNNING[peer] = _Running(peer)
    answer = _RUNNING[peer].answer(*options, str(path))
    if not answer:
        raise RuntimeError(f"{peer} gave no answer: {_RUNNING.pop(peer).end()}")
    return json.loads(answer)


def end_all() -> None:
    """End the peers' processes."""
    while _RUNNING:
        _RUNNING.popitem()[1].end()
