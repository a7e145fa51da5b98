"""account(): where the time of a recorded step of many ranks goes, waiting told from moving."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.captured import Capture
from effkit.loading.fleet import Fleet
from effkit.panes import collectives
from effkit.panes.breakdown import mean_of
from effkit.trace import intervals
from effkit.units import readable

DISPATCH, COMBINE, ALL_TO_ALL, OTHER = "dispatch", "combine", "all-to-all", "other collectives"
KINDS = (DISPATCH, COMBINE, ALL_TO_ALL, OTHER)
UNSEEN = "(waiting not visible)"
# A moment at which several calls run belongs to the first of these: bytes that move are not waited for
_PHASES = ("moving", "waiting", UNSEEN)
_ORDER = tuple(f"{kind} {phase}" for phase in _PHASES for kind in KINDS)
_SHOWN = tuple(f"{kind} {phase}" for kind in KINDS for phase in ("waiting", "moving", UNSEEN))
_CLEAR_FRAC = 0.02  # of a step, by which clocks may differ before a word is due
_OUTSIDE = "step not begun or over"


class _Steps(NamedTuple):
    """The steps of the recorded ranks, on one clock where that could be found."""

    stretches: Mapping[int, tuple[Any, Any]]  # starts and ends [ns] by rank
    aligned: bool
    spread_ns: int | None
    slowest: int
    total_ns: int


def account(capture: Capture | str | Path, step: str | None = None) -> Account:
    """Where one step of an expert-parallel run goes, or of any run with collectives: means over the recorded ranks.

    ``dispatch``, ``combine``, ``all-to-all`` (whose direction is not visible) and ``other collectives`` are told apart
    by the names of kernels (DeepEP and its like say ``dispatch`` and ``combine``) and by the annotations around the
    call. Each is ``waiting`` for the last of the recorded ranks, then ``moving``. These rows hold *exposed* time only:
    what runs under computation counts as ``computing``. A call waits first and moves then, so what is hidden is taken
    from the part in which it was hidden, by intersecting intervals; where calls overlap, a moment counts once, and
    moving comes before waiting. The rest is as in :meth:`Capture.overview`: ``computing`` (kernels, or operators where
    no device was recorded), ``copies``, ``data loading``, ``host and idle``, ``not visible``. ``step not begun or
    over`` is time in which the slowest rank was in its step and the others were not. A row is absent where nothing of
    it was recorded; calls that no other rank's recording shows stand in rows ``(waiting not visible)``. ValueError when
    no collective was recorded, or none with its time, or a device on some ranks only; when a rank's file is missing
    from the folder.

    Parameters
    ----------
    capture
        One Capture of all ranks, as ``load(folder)`` gives it; one rank alone shows nobody's waiting. Or the folder
        into which the ranks of :mod:`effkit.moe.rank` wrote, under torchrun on a cluster, say: then the Account is like
        that of :func:`effkit.moe.measure`.
    step
        The annotation that marks a step, as in :meth:`Capture.overview`. Of several steps the mean is taken.

    Returns
    -------
    Account
        In ns per step. The total is the step of the slowest rank, by its marks. The first companion,
        *Communication of one step*, has rows ``exposed`` and ``hidden`` per kind. ``setting`` holds ``num_ranks``
        (recorded), ``world_size``, ``missing_ranks``, ``num_steps``, ``slowest_rank``, ``clock_spread_ns`` and
        ``notes``; what was not recorded is None.

    Examples
    --------
    >>> account(load("traces/")).share["all-to-all waiting"]                  # doctest: +SKIP
    """
    if isinstance(capture, str | Path):
        from effkit.moe.live import of_folder  # a capture is accounted for without torch

        return of_folder(capture)
    if not isinstance(capture, Capture):
        raise TypeError(f"account() takes a Capture, from load(folder of ranks); given: {type(capture).__name__}")
    overview, calls = capture.overview(step), capture.collectives()
    if calls.empty:
        raise ValueError(
            "no collective is in this capture, so there is no all-to-all to account for: profile a run of several "
            "ranks, and load the files of all of them together"
        )
    timed = calls[calls["dur_ns"].notna()]
    if timed.empty:
        raise ValueError(
            f"{len(calls):,} collectives are in this capture, and the kernels of none: their time is not visible. "
            "Profile with ProfilerActivity.CUDA"
        )
    steps = _steps(capture, overview)
    exposed, hidden = _communication(timed, steps)
    rows = {row: exposed[row] for row in _SHOWN if row in exposed} | _rest(overview) | _outside(steps)
    setting = _setting(capture, overview, calls, steps)
    marked = next((note for note in overview.attrs["notes"] if note.startswith("steps from ")), "its steps")
    source = f"{marked.removeprefix('steps from ')}, of rank {steps.slowest}, the slowest"
    basis = {
        row: "derived" if row == _OUTSIDE or (row in exposed and UNSEEN not in row) else "measured" for row in rows
    }
    moved = ["exposed_communication_ns", "hidden_communication_ns"]
    communication = Account.of(
        "Communication of one step", "ns", _by_kind(exposed, hidden),
        total=round(mean_of(overview[moved].sum(axis=1))), setting=setting,
        source="the time in which the recorded ranks communicate, their mean",
    )  # fmt: skip
    return Account.of(
        "Time of one step", "ns", {row: round(value) for row, value in rows.items()}, total=steps.total_ns,
        source="; ".join([source, *setting["notes"]]), basis=basis, setting=setting, companions=(communication,),
    )  # fmt: skip


def _steps(capture: Capture, overview: pd.DataFrame) -> _Steps:
    clocks = capture.clocks()
    ranks = overview.index.get_level_values("rank")
    starts = overview["start_ns"]
    if not isinstance(capture, Fleet):  # whose overview is on the first rank's clock already
        starts = starts - ranks.map(clocks["offset_ns"].fillna(0).astype("int64")).fillna(0).astype("int64")
    frame = pd.DataFrame({"start": starts, "end": starts + overview["dur_ns"]})
    per_rank = overview["dur_ns"].groupby(level="rank").mean()
    recorded = ranks.unique()
    return _Steps(
        {int(rank): (part["start"].to_numpy(), part["end"].to_numpy()) for rank, part in frame.groupby(level="rank")},
        aligned=bool(clocks["offset_ns"].reindex(recorded).notna().all()),
        spread_ns=int(clocks["spread_ns"].max()) if clocks["spread_ns"].notna().all() else None,
        slowest=int(per_rank.idxmax()),
        total_ns=round(float(per_rank.max())),
    )


def _kinds(calls: pd.DataFrame) -> pd.Series[Any]:
    """What each call is: by its own name, else by the annotations around it, else by what kind of collective it is."""
    named = calls["collective"].map(lambda name: _direction([name]))
    annotated = calls["annotations"].map(lambda names: _direction(names.split(" < ")))
    # between nodes, DeepEP prepares both directions by one kernel: it belongs to the one that follows
    follows = named.groupby(calls["rank"]).bfill().where(calls["collective"] == "cached_notify")
    plain = calls["collective"].map(lambda name: ALL_TO_ALL if name == "all_to_all" else OTHER)
    return named.fillna(annotated).fillna(follows).fillna(plain)


def _direction(names: Iterable[str]) -> str | None:
    for name in names:
        directions = [direction for direction in (DISPATCH, COMBINE) if direction in name.lower()]
        if len(directions) == 1:
            return directions[0]
    return None


def _communication(calls: pd.DataFrame, steps: _Steps) -> tuple[dict[str, float], dict[str, float]]:
    """Exposed and hidden time of each row [ns per step], means over ranks; rows that have no call are absent."""
    calls = calls.assign(kind=_kinds(calls))
    exposed: dict[str, float] = {}
    hidden: dict[str, float] = {}
    for rank, (starts, ends) in steps.stretches.items():
        busy, bare = _stretches(calls[calls["rank"] == rank])
        share = len(starts) * len(steps.stretches)
        alone, both = (_each_once(stretches, starts, ends) for stretches in (bare, busy))
        for row in _ORDER:
            exposed[row] = exposed.get(row, 0.0) + alone[row] / share
            hidden[row] = hidden.get(row, 0.0) + (both[row] - alone[row]) / share
    unseen = calls["waiting_ns"].isna()
    rows = {f"{kind} {UNSEEN}" for kind in calls.loc[unseen, "kind"]}
    rows |= {f"{kind} {phase}" for kind in calls.loc[~unseen, "kind"] for phase in ("waiting", "moving")}
    return {row: exposed[row] for row in _ORDER if row in rows}, {row: hidden[row] for row in _ORDER if row in rows}


def _stretches(calls: pd.DataFrame) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
    """Of one rank: when each row's calls run, and when they run exposed, as pairs of times [ns]."""
    busy: dict[str, list[Any]] = {row: [] for row in _ORDER}
    bare: dict[str, list[Any]] = {row: [] for row in _ORDER}
    for kind, start, dur, waiting, text in zip(
        calls["kind"], calls["start_ns"], calls["dur_ns"], calls["waiting_ns"], calls["exposed_spans_ns"], strict=True
    ):
        spans = np.asarray(json.loads(text), "int64").reshape(-1, 2)
        parts = [(UNSEEN, 0, dur)] if pd.isna(waiting) else [("waiting", 0, waiting), ("moving", waiting, dur)]
        for phase, begins, ends in parts:
            busy[f"{kind} {phase}"].append(np.array([[start + begins, start + ends]], "int64"))
            cut = np.clip(spans, begins, ends)
            bare[f"{kind} {phase}"].append(cut[cut[:, 0] < cut[:, 1]] + start)
    return busy, bare


def _each_once(stretches: Mapping[str, list[Any]], starts: Any, ends: Any) -> dict[str, int]:
    """Time of each row within the steps of one rank [ns], in order, without what an earlier row covers."""
    times, covered = {}, 0
    pairs = np.zeros((0, 2), "int64")
    for row in _ORDER:
        pairs = np.concatenate([pairs, *stretches[row]])
        reach = int(intervals.union(pairs[:, 0], pairs[:, 1]).within(starts, ends).sum())
        times[row] = reach - covered
        covered = reach
    return times


def _rest(overview: pd.DataFrame) -> dict[str, float]:
    """What of the steps is not communication [ns per step]."""
    device = overview["kernel_ns"].notna().groupby(level="rank").all()
    if device.nunique() > 1:
        without = device.index[~device]
        raise ValueError(
            f"rank{'s' if len(without) > 1 else ''} {', '.join(map(str, without))} recorded no device activity and the "
            "others did, so that their means mean nothing: load the files of either alone"
        )
    rows = {"computing": overview["kernel_ns"] if device.all() else overview["cpu_exec_ns"]}
    if device.all():
        rows["copies"] = overview["memcpy_ns"]
    if overview["dataloader_ns"].any():
        rows["data loading"] = overview["dataloader_ns"]
    rows["host and idle"] = overview["idle_ns"] + (overview["cpu_exec_ns"] if device.all() else 0)
    rows["not visible"] = overview["not_visible_ns"]
    return {name: mean_of(column) for name, column in rows.items() if column.notna().any()}


def _outside(steps: _Steps) -> dict[str, float]:
    """Time of the slowest rank's steps in which the others have none [ns per step]; {} where that is not visible. What
    they do then was not marked as part of a step, and ranks that stand in unlike numbers of steps cannot be laid over
    one another."""
    starts, ends = steps.stretches[steps.slowest]
    if len(steps.stretches) < 2 or not steps.aligned or len({len(begin) for begin, _ in steps.stretches.values()}) > 1:
        return {}
    whole = int(intervals.union(starts, ends).within(starts, ends).sum())
    shared = [int(intervals.union(*own).within(starts, ends).sum()) for own in steps.stretches.values()]
    return {_OUTSIDE: float(np.mean([whole - both for both in shared])) / len(starts)}


def _by_kind(exposed: Mapping[str, float], hidden: Mapping[str, float]) -> dict[str, int]:
    rows = {}
    for kind in KINDS:
        own = [row for row in exposed if row.startswith(kind)]
        for word, part in (("exposed", exposed), ("hidden", hidden)) if own else ():
            rows[f"{kind} {word}"] = round(sum(part[row] for row in own))
    return rows


def _setting(capture: Capture, overview: pd.DataFrame, calls: pd.DataFrame, steps: _Steps) -> dict[str, Any]:
    """What was recorded, and what has to be said of it."""
    ranks = sorted(steps.stretches)
    world = capture.provenance.get("world_size")
    missing = sorted(set(capture.provenance.get("missing_ranks") or ()) | (set(range(world or 0)) - set(ranks)))
    counts = sorted({len(begin) for begin, _ in steps.stretches.values()})
    notes = list(capture.provenance.get("notes", ()))
    if len(ranks) == 1:
        notes.append(f"only rank {ranks[0]} was recorded: who waits for whom is not visible")
    elif missing:
        listed = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
        notes.append(f"ranks {listed} were not recorded: waiting for them counts as moving")
    notes += collectives.doubts(calls)
    if untimed := int(calls["dur_ns"].isna().sum()):
        notes.append(f"{untimed:,} of {len(calls):,} calls have no kernels here: their time is not visible")
    if len(counts) > 1:
        notes.append(f"the ranks recorded unlike numbers of steps, {counts[0]} to {counts[-1]}: each has its own mean")
    if len(ranks) > 1 and not steps.aligned:
        notes.append("some ranks share no collective with the first: their clocks are taken as they are")
    if (steps.spread_ns or 0) > _CLEAR_FRAC * steps.total_ns:
        spread = readable(steps.spread_ns or 0, "ns")
        notes.append(f"the ranks' clocks agree to within {spread} only: what is waiting and what moving is doubtful")
    return {
        "num_ranks": len(ranks), "world_size": world, "missing_ranks": tuple(missing), "num_steps": counts[-1],
        "slowest_rank": steps.slowest, "clock_spread_ns": steps.spread_ns, "notes": tuple(notes),
    }  # fmt: skip
