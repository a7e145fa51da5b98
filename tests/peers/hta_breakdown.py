"""Holistic Trace Analysis of one trace, or of a folder with a trace per rank, as JSON: what effkit is compared with.

``python hta_breakdown.py [--time] TRACE_OR_FOLDER``, in the peers' own environment (``make .venv/.peers``). Without
arguments, it reads them from its input, a JSON list on a line, and answers each on a line.
Each answer stands alone, for HTA may give one and crash on the next: ``{"error": …}`` in its place says how.
"""

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path

import pandas as pd
from hta.configs.env_options import HTAEnvOptions
from hta.trace_analysis import TraceAnalysis
from spent import asked_in_turn, spent


def records(frame: pd.DataFrame) -> list[dict]:
    """Rows as JSON knows them: plain numbers, and ``null`` for what is not a number."""
    return json.loads(frame.to_json(orient="records", double_precision=15))


def answered(question: Callable[[], pd.DataFrame]) -> list[dict] | dict:
    try:
        return records(question())
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def parsed(path: Path, *, last_step: bool) -> TraceAnalysis:
    """HTA leaves the last profiler step out unless told: ``last_step`` tells it."""
    if path.is_dir():
        return TraceAnalysis(trace_dir=str(path), include_last_profiler_step=last_step)
    return TraceAnalysis(trace_files={0: str(path)}, include_last_profiler_step=last_step)


def breakdowns(analysis: TraceAnalysis) -> dict:
    def kernels() -> tuple[pd.DataFrame, pd.DataFrame]:
        # as many as there are, so that none is folded into "others"
        return analysis.get_gpu_kernel_breakdown(visualize=False, num_kernels=10**6, duration_ratio=1.0)

    return {
        "temporal": answered(lambda: analysis.get_temporal_breakdown(visualize=False)),
        "overlap": answered(lambda: analysis.get_comm_comp_overlap(visualize=False)),
        "idle": answered(lambda: analysis.get_idle_time_breakdown(ranks=analysis.t.get_ranks(), visualize=False)[0]),
        "kernel_types": answered(lambda: kernels()[0]),
        "kernels": answered(lambda: kernels()[1]),
    }


def answer(options: argparse.Namespace) -> str:
    HTAEnvOptions.instance().set_disable_ns_rounding(options.unrounded)
    if options.time:  # no answer to catch an error for: a crash must not look fast
        analysis = parsed(options.path, last_step=options.last_step)
        analysis.get_temporal_breakdown(visualize=False)
        analysis.get_comm_comp_overlap(visualize=False)
        return spent()
    try:
        found = breakdowns(parsed(options.path, last_step=options.last_step))
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"}
    return json.dumps(found, allow_nan=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--time", action="store_true", help="only parse, both breakdowns, and what that cost")
    parser.add_argument("--last-step", action="store_true", help="keep the last profiler step")
    parser.add_argument("--unrounded", action="store_true", help="do not round to whole microseconds, inwards")
    logging.disable(logging.CRITICAL)
    asked_in_turn(parser, answer)


if __name__ == "__main__":
    main()
