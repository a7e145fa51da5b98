"""The peers that read traces: Holistic Trace Analysis and torch-tb-profiler, in an environment of their own.

The scripts beside this file run there, by their path; tests ask them through :func:`ask` and compare.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

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


def ask(peer: str, path: Path, *options: str) -> dict:
    """What a peer answers about a trace or a folder of traces; ``peer`` is "hta" or "tb"."""
    command = [str(PYTHON), "-W", "ignore", str(HERE / f"{peer}_breakdown.py"), *options, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
