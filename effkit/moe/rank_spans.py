"""One step, rank by rank: what each computed, and when it waited or moved bytes."""

from __future__ import annotations

import pandas as pd

from effkit.account import Account
from effkit.lab import calibration_of
from effkit.moe import breakdown
from effkit.moe.calibration import Calibration
from effkit.moe.live import ON
from effkit.moe.recorded import Step
from effkit.moe.setting import Setting

COMPUTING, LINK = "computing", "link"


def timeline(account: Account) -> pd.DataFrame:
    """The first step of an account that :func:`effkit.moe.measure` returned, or :func:`effkit.moe.predict`.

    ValueError for an account that keeps no calibration.

    Returns
    -------
    DataFrame
        A row per stretch of time: ``rank``; ``lane``, computing or link; ``what``, a phase, or waiting and moving of
        dispatch and combine; ``start_ns`` and ``end_ns`` from the beginning of the step.
    """
    calibration = calibration_of(account, Calibration, "moe")
    if not account.predicted:
        return _rows(calibration.step)
    on = dict(account.setting)
    ranks = {name: on.pop(name) for name in ON}
    return _rows(calibration.steps(Setting.of(on), **ranks)[0])


def _rows(step: Step) -> pd.DataFrame:
    begin = min(rank.begin_ns for rank in step.ranks)
    rows: list[tuple[int, str, str, int, int]] = []
    for number, rank in enumerate(step.ranks):
        computing = [phase for phase in rank.phases if phase[0] not in breakdown.TRAVELS]
        for lane, stretches in ((COMPUTING, computing), (LINK, breakdown.pieces_of(step, number))):
            rows += [(number, lane, what, start - begin, end - begin) for what, start, end in stretches]
    frame = pd.DataFrame(rows, columns=["rank", "lane", "what", "start_ns", "end_ns"])
    return frame[frame["end_ns"] > frame["start_ns"]].sort_values(["rank", "lane", "start_ns"], ignore_index=True)
