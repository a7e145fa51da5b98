"""What was in memory, moment by moment. Pure functions of allocation frames, whichever source these came from.

Give the rows of one rank. A moment is a time [ns]: an allocation is alive from its birth on, until just before its end.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pandas as pd

from effkit.account import Account

_LIBRARIES = re.compile(r"(?:torch|einops|transformers|site-packages|python3\.\d+)/|<frozen")  # say how, not for whom
_CALLERS = 3


def timeline(
    allocations: pd.DataFrame, segments: pd.DataFrame | None = None, *, num_points: int = 2000
) -> pd.DataFrame:
    """How full the memory was: ``time_ns``, ``device``, ``allocated_bytes``, ``reserved_bytes``, device by device.

    At most ``num_points`` rows per device, in order of time: the fullest moment of each stretch, so that the peak stays
    exact. ``reserved_bytes`` is the most that was reserved in that stretch, ``<NA>`` where ``segments`` does not tell.
    A device on which nothing came or went has no rows.
    """
    if num_points < 1:
        raise ValueError(f"a timeline needs at least one point; given: {num_points}")
    frames = [pd.DataFrame({"time_ns": [], "device": [], "allocated_bytes": [], "reserved_bytes": []})]
    for device, rows in allocations.groupby("device", sort=True):
        times, levels = _levels(rows)
        stretch = ((times - times[0]) / max(times[-1] - times[0], 1) * (num_points - 1)).astype("int64")
        # the last moment has a stretch of its own, also where doubles round
        stretch[:-1] = np.minimum(stretch[:-1], max(0, num_points - 2))
        fullest = np.lexsort((-levels, stretch))  # within each stretch, the first of the fullest moments comes first
        kept = fullest[np.unique(stretch[fullest], return_index=True)[1]] if len(times) > 1 else fullest[:0]
        edges = np.append(times[np.searchsorted(stretch, stretch[kept])], np.iinfo("int64").max)
        edges[:1] = np.iinfo("int64").min  # memory may be reserved before anything is allocated
        reserved = _reserved(segments, str(device), edges[:-1], edges[1:])
        columns = {"time_ns": times[kept], "device": device, "allocated_bytes": levels[kept]}
        frames.append(pd.DataFrame(columns | {"reserved_bytes": reserved}))
    types = {"time_ns": "int64", "device": "str", "allocated_bytes": "int64", "reserved_bytes": "Int64"}
    return pd.concat([frame.astype(types) for frame in frames], ignore_index=True)


def at(allocations: pd.DataFrame, time_ns: int) -> pd.DataFrame:
    """The allocations that are alive at a moment [ns]."""
    born = ~(allocations["alloc_ns"] > time_ns).fillna(False)
    dead = (allocations["free_ns"] <= time_ns).fillna(False)
    return allocations[(born & ~dead).to_numpy(dtype=bool)]


def account(
    allocations: pd.DataFrame, *, peak_bytes: int, source: str, device: str, by: str = "category",
    segments: pd.DataFrame | None = None, at_ns: int | None = None, when: str = "", num_rows: int = 12,
) -> Account:  # fmt: skip
    """What fills the memory of a device at the moment ``at_ns`` [ns], ``when`` in words; by default the first with most
    bytes alive.

    ``peak_bytes`` is the allocator's own total at that moment, by the counter ``source``. ``by`` is ``"category"``,
    ``"stack"`` or ``"place"``: the ``num_rows`` of these that hold most, and all others in one row. Where ``segments``
    are given, a companion says how the memory reserved at that moment was used. ValueError when there is nothing on
    that device, or ``by`` is none of these.
    """
    if by not in ("category", "stack", "place"):
        raise ValueError(f"memory is accounted for by category or by stack or by place; given: {by!r}")
    rows = allocations[allocations["device"] == device]
    if rows.empty:
        devices = ", ".join(sorted(allocations["device"].unique())) or "none"
        raise ValueError(f"nothing was allocated on {device!r}; devices with allocations: {devices}")
    moment = at_ns
    if moment is None:
        times, levels = _levels(rows)
        moment = int(times[levels.argmax()])
    alive = at(rows, moment)
    names = alive["category" if by == "category" else "stack"].fillna("not recorded")
    if by != "category":
        names = names.map({name: _callers(name, by) for name in names.unique()})
    held = alive["size_bytes"].groupby(names).sum().sort_values(ascending=False, kind="stable")
    items = {str(item): int(value) for item, value in held.items()}
    if by != "category" and len(held) > num_rows:
        items = dict(list(items.items())[:num_rows])
        items[f"{len(held) - num_rows:,} other {by}s"] = int(held.iloc[num_rows:].sum())
    companions: tuple[Account, ...] = ()
    reserved, used = _reserved(segments, device, [moment], [moment + 1])[0], sum(items.values())
    if reserved is not pd.NA and (total := int(reserved)) >= used:
        parts = {"allocated": used, "reserved but not allocated": total - used}
        reserving = "Reserved at that moment", "bytes", parts
        companions = (Account.of(*reserving, total=total, source="the allocator's segments"),)
    title = f"Memory of {device} at {when or ('its peak' if at_ns is None else f'{at_ns:,} ns')}"
    return Account.of(title, "bytes", items, total=peak_bytes, source=source, companions=companions)


def _callers(stack: str, by: str) -> str:
    """By ``"stack"`` the innermost callers that are not a library's own, as many as fit on a line; by ``"place"`` the
    innermost of these, and of all."""
    frames = stack.split(" < ")
    own = [frame for frame in frames if not _LIBRARIES.match(frame)] or frames
    if by == "place":
        return own[0] if own[0] == frames[0] else f"{own[0]}, in {frames[0]}"
    return " < ".join(own[:_CALLERS]) + (" < …" if len(own) > _CALLERS else "")


def _levels(rows: pd.DataFrame) -> tuple[Any, Any]:
    """Moments [ns] at which something came or went, the first one just before all of them; bytes alive at each."""
    sizes = rows["size_bytes"].to_numpy()
    born, dead = (rows[name].notna().to_numpy() for name in ("alloc_ns", "free_ns"))
    times = np.append(rows["alloc_ns"][born].to_numpy("int64"), rows["free_ns"][dead].to_numpy("int64"))
    order = np.argsort(times, kind="stable")
    signed = np.append(sizes[born], -sizes[dead])[order]
    moments, first = np.unique(times[order], return_index=True)
    changes = np.add.reduceat(signed, first) if len(first) else signed
    start = moments[0] - 1 if len(moments) else 0
    return np.append(start, moments), sizes[~born].sum() + np.append(0, np.cumsum(changes))


def _reserved(segments: pd.DataFrame | None, device: str, begins: Any, ends: Any) -> Any:
    """The most bytes that were reserved in stretches of time [ns], ``<NA>`` where that is not recorded."""
    rows = None if segments is None else segments[segments["device"] == device]
    if rows is None or rows.empty:
        return pd.array([pd.NA] * len(begins), dtype="Int64")
    moments, levels = _levels(rows)
    first = np.maximum(np.searchsorted(moments, begins, "right") - 1, 0)
    last = np.maximum(np.searchsorted(moments, ends, "left"), first + 1)
    return pd.array([levels[i:j].max() for i, j in zip(first, last, strict=True)], dtype="Int64")
