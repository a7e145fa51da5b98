"""The shell's door: ``effkit report PATH``, ``effkit diff A B``, ``effkit lessons DIR``. Needs no torch."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd

from effkit.captured import Capture
from effkit.claims.table import HOMES
from effkit.loading import load
from effkit.panes.breakdown import mean_of
from effkit.units import readable
from effkit.whole_files import write_text

_ROOMS = ("notebooks", "data")
_NOT_COPIED = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.part")
_GREW, _WRONG = 1, 2  # exit codes
_SHOWN = 15  # rows of a difference


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 where ``diff`` found more than is allowed, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (ValueError, OSError) as error:
        sys.stderr.write(f"effkit: {error}\n")
        return _WRONG


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="effkit", description="See where the time and memory of a PyTorch model go.")
    commands = parser.add_subparsers(required=True, metavar="report | diff | lessons")

    report = commands.add_parser("report", help="where the time and memory of a recorded run went, and what would help")
    report.add_argument("path", help="a profiler trace, a folder with one per rank, a memory snapshot, or a capture")
    report.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="write there: an HTML page unless told otherwise"
    )
    form = report.add_mutually_exclusive_group()
    form.add_argument("--md", action="store_true", help="as Markdown, for a pull request")
    form.add_argument("--json", action="store_true", help="as JSON, for a program")
    report.set_defaults(command=_report)

    diff = commands.add_parser("diff", help="which operators and kernels grew, shrank, appeared or went, per step")
    diff.add_argument("before")
    diff.add_argument("after")
    diff.add_argument("--fail-above", type=_share, metavar="5%", help="exit with 1 where the time of a step, or of its "
                      "kernels, or the peak of memory grew by more")  # fmt: skip
    diff.set_defaults(command=_diff)

    lessons = commands.add_parser("lessons", help="copy the notebooks, and the data that they read, into a new folder")
    lessons.add_argument("folder", type=Path)
    lessons.set_defaults(command=_lessons)
    return parser


def _report(options: argparse.Namespace) -> int:
    from effkit.advice.recorded_study import of_file

    study = of_file(options.path)
    advice = study.advise("memory" if study.capture is None else "time")
    if options.output is not None and not (options.md or options.json):
        _say(f"{study.report(options.output, advice)} is written: open it in a browser")
        return 0
    text = study.to_json() if options.json else study.to_markdown() if options.md else f"{study.overview()}\n\n{advice}"
    _say(f"{write_text(options.output, text, 'report.md')} is written" if options.output else text)
    return 0


def _diff(options: argparse.Namespace) -> int:
    before, after = load(options.before), load(options.after)
    rows = before.diff(after)
    grown = []
    for name, (old, new, unit) in _totals(before, after).items():
        change = new / old - 1 if old else float("inf") if new else 0.0
        _say(f"{name}: {readable(old, unit)} -> {readable(new, unit)} ({change:+.1%})")
        if options.fail_above is not None and change > options.fail_above:
            grown.append(name)
    for (kind, name), row in rows[rows["change"] != "same"].head(_SHOWN).iterrows():
        times = " -> ".join("-" if pd.isna(row[part]) else readable(float(row[part]), "ns")
                            for part in ("time_ns", "other_time_ns"))  # fmt: skip
        _say(f"  {row['change']:<8} {times:>22}  {kind} {name:.100}")
    if grown:
        _say(f"grew by more than {options.fail_above:.1%}: {', '.join(grown)}")
    return _GREW if grown else 0


def _totals(before: Capture, after: Capture) -> dict[str, tuple[float, float, str]]:
    """What a step costs in both: name -> before, after, unit; without what either did not record."""
    totals: dict[str, tuple[float, float, str]] = {}
    parts = before.overview(), after.overview()
    for name, column in (("time of a step", "dur_ns"), ("kernels of a step", "kernel_ns")):
        if all(len(part) and part[column].notna().all() for part in parts):
            old, new = (mean_of(part[column]) for part in parts)
            totals[name] = old, new, "ns"
    peaks = [max((memory["peak_bytes"] for memory in capture._recorded_memory()), default=None)
             for capture in (before, after)]  # fmt: skip
    if None not in peaks:
        totals["peak of memory"] = float(peaks[0] or 0), float(peaks[1] or 0), "bytes"
    if not totals:
        raise ValueError("the two files have nothing in common: compare two traces, or two snapshots")
    return totals


def _lessons(options: argparse.Namespace) -> int:
    folder: Path = options.folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already: give the name of a folder to make, {folder / 'effkit'} say")
    home = next((home for home in HOMES if (home / "notebooks" / "00_start_here.ipynb").exists()), None)
    if home is None:
        raise ValueError("the lessons are not beside this effkit: install it with pip, or use a checkout")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=".effkit-") as made:
        for room in _ROOMS:
            shutil.copytree(home / room, Path(made) / "whole" / room, ignore=_NOT_COPIED)
        if folder.exists():
            folder.rmdir()
        (Path(made) / "whole").rename(folder)
    first = folder / "notebooks" / "00_start_here.ipynb"
    _say(f"The lessons are in {folder}. Open the first with:\n  jupyter lab {first}")
    return 0


def _share(text: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"a share, such as 5% or 0.05; given: {text}")
    return value


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


def run() -> None:
    """What the shell calls."""
    sys.exit(main())


if __name__ == "__main__":
    run()
