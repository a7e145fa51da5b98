"""torch-tb-profiler without TensorBoard: what it would show of one trace, or of a run folder, as JSON.

``python tb_breakdown.py [--time] TRACE_OR_FOLDER``, in the peers' own environment (``make .venv/.peers``). Without
arguments, it reads them from its input, a JSON list on a line, and answers each on a line.
A folder gives an entry per worker file that the plugin would accept by its name, and its distributed view.
"""

import argparse
import json
import logging
import math
import tempfile
from pathlib import Path

from spent import asked_in_turn, spent
from torch_tb_profiler.consts import WORKER_PATTERN
from torch_tb_profiler.profiler.data import DistributedRunProfileData, RunProfileData
from torch_tb_profiler.profiler.event_parser import ProfileRole
from torch_tb_profiler.profiler.loader import RunLoader
from torch_tb_profiler.profiler.run_generator import RunGenerator

OPERATOR_COLUMNS = (
    "calls", "host_self_duration", "host_total_duration", "device_self_duration", "device_total_duration",
)  # fmt: skip


def parsed(path: Path, cache: str) -> RunProfileData:
    """What ``RunLoader.load()`` does for each worker, without its process per worker."""
    name = WORKER_PATTERN.match(path.name)
    worker, span = name.groups() if name else (path.name, None)
    return RunProfileData.parse(worker, span and span[1:], str(path), cache)


def steps(data: RunProfileData) -> list[dict]:
    """Microseconds per category of each step: the stacked bars of the overview. Two steps may bear one name."""
    rows = zip(data.steps_names, data.steps_costs, data.comm_overlap_costs, strict=True)
    roles = [role.name for role in ProfileRole]
    return [
        {"step": name, **dict(zip(roles, cost.costs, strict=True)), "communication": vars(communication)}
        for name, cost, communication in rows
    ]


def tables(data: RunProfileData) -> dict:
    profile = RunGenerator(data.worker, data.span, data).generate_run_profile()
    operators = profile.operation_table_by_name["data"]
    kernels = profile.kernel_table["data"] if profile.kernel_table else {"columns": [], "rows": []}
    columns = [column["name"] for column in kernels["columns"]]
    return {
        "steps": steps(data),
        "operators": {row["name"]: {column: row.get(column) for column in OPERATOR_COLUMNS} for row in operators},
        "kernels": {row[0]: dict(zip(columns[1:], row[1:], strict=True)) for row in kernels["rows"]},
        "views": [view.display_name for view in profile.views],
    }


def distributed(workers: list[RunProfileData], run_name: str) -> dict | None:
    loader = object.__new__(RunLoader)  # its constructor opens a queue between processes
    loader.run_name = run_name
    profile = loader._process_distributed_profiles([DistributedRunProfileData(data) for data in workers], None)
    return profile and {"overlap": profile.steps_to_overlap, "wait": profile.steps_to_wait, "ops": profile.comm_ops}


def without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def answer(path: Path, cache: str) -> dict:
    try:
        if path.is_dir():
            files = sorted(file for file in path.iterdir() if WORKER_PATTERN.match(file.name))
            workers = {file.name: parsed(file, cache) for file in files}
            view = distributed(list(workers.values()), path.name)
            return {"workers": {name: tables(data) for name, data in workers.items()}, "distributed": view}
        return tables(parsed(path, cache))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def said(options: argparse.Namespace) -> str:
    with tempfile.TemporaryDirectory() as cache:
        if options.time:
            parsed(options.path, cache)
            return spent()
        return json.dumps(without_nan(answer(options.path, cache)), default=str)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--time", action="store_true", help="only parse, and what that cost")
    logging.disable(logging.CRITICAL)
    asked_in_turn(parser, said)


if __name__ == "__main__":
    main()
