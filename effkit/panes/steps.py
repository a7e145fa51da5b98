"""Where the steps of a run begin and end."""

from __future__ import annotations

import fnmatch

import numpy as np
import pandas as pd

from effkit.trace import nesting
from effkit.trace.names import STEP

WHOLE = "the whole window: no step is marked"
_SERVING = (  # how SGLang and vLLM annotate each batch that they run
    r"^step\[(?P<mode>[A-Z_\d]+) bs=|^execute_(?:\d+_)?context_(?P<prefill>\d+)\(.*\)_generation_(?P<decode>\d+)\("
)
_MODES = {"extend": "prefill", "split_prefill": "prefill", "target_verify": "decode"}  # SGLang's own words


def phases(names: pd.Series[str]) -> pd.Series[str]:
    """What a serving engine says that a batch does, by the name of its annotation; absent for other annotations."""
    said = names.str.extract(_SERVING)
    fills, decodes = (pd.to_numeric(said[word]) > 0 for word in ("prefill", "decode"))
    counted = np.select([fills & decodes, fills, decodes], ["mixed", "prefill", "decode"], "idle")
    counted = pd.Series(counted, names.index).where(said["prefill"].notna())
    return said["mode"].str.lower().replace(_MODES).fillna(counted)


def marks(events: pd.DataFrame, step: str | None = None) -> pd.DataFrame:
    """The marked steps: ``rank, start_ns, dur_ns``. ``step`` names an annotation, ``*`` standing for anything, or a
    ``phase`` of a serving engine's batches, which by default are the steps and then are in a column of that name."""
    if step is not None and not isinstance(step, str):
        raise TypeError(f"step is the name of an annotation, or a pattern with *; given: {step!r}")
    notes = events[events["category"] == "user_annotation"].reset_index(drop=True)
    columns = ["rank", "start_ns", "dur_ns"]
    if step is not None:
        chosen = notes[notes["name"].isin([step, *fnmatch.filter(notes["name"].unique(), step)])]
        if len(chosen):
            return chosen[columns].reset_index(drop=True)
    served = notes.assign(phase=phases(notes["name"])).dropna(subset="phase").reset_index(drop=True)
    served = served[nesting.parents(served) < 0]  # one engine's mark may stand within another's
    if step is not None:
        served = served[served["phase"] == step]
    elif served.empty:
        return notes.loc[notes["name"].str.startswith(STEP), columns].reset_index(drop=True)
    return served[[*columns, "phase"]].reset_index(drop=True)


def steps(events: pd.DataFrame, step: str | None = None) -> tuple[pd.DataFrame, str]:
    """The steps of one rank, and in words where they come from.

    A serving engine's batches, ``ProfilerStep#`` marks, or the annotation called ``step`` (ValueError when there is
    none); without marks the whole window is one step.
    """
    marked = marks(events, step)
    if len(marked):
        if "phase" in marked:
            counts = marked["phase"].value_counts(sort=False).items()
            return marked, f"the serving engine's marks: {', '.join(f'{num} of {word}' for word, num in counts)}"
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
