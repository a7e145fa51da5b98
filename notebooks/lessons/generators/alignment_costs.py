"""What an alignment with an encoder saves, by what is counted: steps, FLOPs or time, with and without its own costs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache

import pandas as pd
from torch.utils.flop_counter import FlopCounterMode

from lessons import meter
from lessons.generators.alignment import AlignedTraining
from lessons.generators.flows import FlowTraining

ENCODER_STEPS = 150  # of the mini-lab
# What is left out of the count: phases of a training
SCOPES = {"all counted": (), "without encoder": ("encoder",), "without encoder and warm-up": ("encoder", "warm-up")}


def step_costs(*, repeats: int = 30) -> pd.DataFrame:
    """What one step of each phase costs, all in turn.

    Returns
    -------
    DataFrame
        Indexed by ``phase`` (``flow`` is the plain training): ``flops``, counted, and ``dur_ns``, the fastest of the
        repeats by the process's own clock, which stands still while another program has the core.
    """
    trainings = _of_phases()
    fastest = dict.fromkeys(trainings, float("inf"))
    for _ in range(repeats):
        for phase, training in trainings.items():
            begin = time.process_time_ns()
            training.step()
            fastest[phase] = min(fastest[phase], time.process_time_ns() - begin)
    return pd.DataFrame({"flops": step_flops(), "dur_ns": pd.Series(fastest).astype("int64")}).rename_axis("phase")


@cache
def step_flops() -> pd.Series[int]:
    """FLOPs of one step of each phase, counted."""
    found = {}
    for phase, training in _of_phases().items():
        with FlopCounterMode(display=False) as counter:
            training.step()
        found[phase] = counter.get_total_flops()
    return pd.Series(found, name="flops").rename_axis("phase")


def _of_phases() -> dict[str, FlowTraining]:
    many = 10**6  # steps: the phase never ends
    return {
        "flow": FlowTraining(0),
        "encoder": AlignedTraining(0, encoder_steps=many),
        "warm-up": AlignedTraining(0, encoder_steps=0, warm_up_steps=many),
        "flow, aligned": AlignedTraining(0, encoder_steps=0),
    }


def times_fewer(ways: Mapping[str, meter.ToTarget], costs: pd.DataFrame, plain: str = "plain") -> pd.DataFrame:
    """The plain training over each other one: above 1, the method saves.

    Steps are those of the runs; FLOPs and time are these steps, phase by phase, times what a step costs.

    Parameters
    ----------
    ways
        Each with one run.
    costs
        Of one step, by phase: :func:`step_costs`.

    Returns
    -------
    DataFrame
        Indexed by the way and what is counted: ``steps``, ``FLOPs`` and ``time``. A scope that leaves out no further
        phase of a way has no row for it.
    """
    each = costs.assign(num_steps=1).rename(columns={"num_steps": "steps", "flops": "FLOPs", "dur_ns": "time"})
    steps = {name: way.runs["num_steps"].droplevel("seed") for name, way in ways.items()}
    before = each.mul(steps.pop(plain), axis="index").sum()
    rows = {}
    for name, phases in steps.items():
        for scope, left_out in SCOPES.items():
            if not left_out or left_out[-1] in phases:
                after = each.mul(phases.drop(list(left_out)), axis="index").sum()
                rows[f"{name}, {scope}"] = before / after
    return pd.DataFrame(rows).T[["steps", "FLOPs", "time"]].rename_axis("plain over")


def break_even_steps(plain_steps: float, *, students: float = 1) -> float:
    """The aligned steps that cost as many FLOPs as so many plain ones, the encoder shared by so many students.

    ``(plain_steps * plain - encoder_steps * encoder / students) / aligned``, each factor FLOPs of one step.

    Raises
    ------
    ValueError
        For less than one student.
    """
    flops = step_flops()
    return float((plain_steps * flops["flow"] - _encoder_flops(students)) / flops["flow, aligned"])


def times_fewer_flops(fewer: float, students: float = 1, *, plain_steps: float = 200) -> float:
    """Plain FLOPs over aligned ones, where aligned trainings need so many times fewer steps and share the encoder."""
    flops = step_flops()
    own = _encoder_flops(students) + plain_steps / fewer * flops["flow, aligned"]
    return float(plain_steps * flops["flow"] / own)


def _encoder_flops(students: float) -> float:
    """Each student's share of the encoder's training."""
    if students < 1:
        raise ValueError(f"students is {students}, expected at least 1")
    return float(ENCODER_STEPS * step_flops()["encoder"] / students)
