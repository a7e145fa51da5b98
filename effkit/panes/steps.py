"""Where the steps of a run begin and end."""

from __future__ import annotations

import fnmatch

import pandas as pd

from effkit.trace.names import STEP

WHOLE = "the whole window: no step is marked"


def marks(events: pd.DataFrame, step: str | None = None) -> pd.DataFrame:
    """The marked steps: ``rank, start_ns, dur_ns``. ``step`` names an annotation, ``*`` standing for anything."""
    if step is not None and not isinstance(step, str):
        raise TypeError(f"step is the name of an annotation, or a pattern with *; given: {step!r}")
    name = events["name"]
    if step is None:
        named = name.str.startswith(STEP)
    elif any(sign in step for sign in "*?["):
        named = name.isin([text for text in name.unique() if fnmatch.fnmatchcase(text, step)])
    else:
        named = name == step
    marked = named & (events["category"] == "user_annotation")
    return events.loc[marked, ["rank", "start_ns", "dur_ns"]].reset_index(drop=True)


def steps(events: pd.DataFrame, step: str | None = None) -> tuple[pd.DataFrame, str]:
    """The steps of one rank, and in words where they come from.

    ``ProfilerStep#`` marks, or the annotation called ``step`` (ValueError when there is none); without marks the whole
    window is one step.
    """
    marked = marks(events, step)
    if len(marked):
        return marked, f"the annotation “{step}”" if step else "the profiler's step marks"
    if step is not None:
        names = ", ".join(events.loc[events["category"] == "user_annotation", "name"].unique()[:5]) or "none"
        raise ValueError(
            f"no annotation is called “{step}”; there are {names}. Give one of these names, or a pattern with *"
        )
    if events.empty:
        return marked, "no event"
    start = int(events["start_ns"].min())
    length = int((events["start_ns"] + events["dur_ns"]).max()) - start
    window = pd.DataFrame({"rank": [int(events["rank"].iloc[0])], "start_ns": [start], "dur_ns": [length]})
    return window, WHOLE
