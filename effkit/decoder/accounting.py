"""From times and bytes to Accounts: one generation, and what people ask of it beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from effkit.account import Account
from effkit.decoder.costs import PREFILL, START, Run
from effkit.decoder.memory import CacheBytes
from effkit.decoder.module_roles import BETWEEN, CROSS, CROSS_KV, EMBEDDING, ENCODER, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.setting import Setting

TIME = "Time of one generation"
ROWS = (ENCODER, CROSS_KV, PREFILL, SELF, CROSS, FFN, NORMS, EMBEDDING, OUTPUT, BETWEEN, START)
PER_TOKEN, RATE, SPEED, SHARE = "Time per token", "Tokens per second", "Real-time factor", "Decoder's share of the time"
PHASES, WEIGHTS, CACHE = "Prefill and decode", "Weights", "Key-value cache"
WHOLE = "generation"  # the one row where no part is told


def measured_rows(run: Run) -> tuple[dict[str, int], dict[str, int]]:
    """Rows of a run, and its time up to the first token and after it [ns]; with no encoder the first forward is its
    prefill. Of a run that could not be watched, one row and no phases."""
    if not run.watched:
        return {WHOLE: run.total_ns}, {}
    by_time, coded = sorted(run.watched, key=lambda one: one.wall_ns), run.setting.encoder_layers > 0
    watched = by_time[len(by_time) // 2]
    first = int(watched.steps.iloc[0].sum())
    rows = {ENCODER: watched.encoder_ns} if coded else {PREFILL: first}
    rows |= {str(part): int(value) for part, value in watched.steps.iloc[0 if coded else 1 :].sum().items()}
    rows[START] = watched.start_ns
    phases = {"prefill": watched.encoder_ns + first + watched.start_ns}
    phases["decode"] = watched.wall_ns - phases["prefill"]
    return {part: rows[part] for part in ROWS if rows.get(part)}, phases


def generation_account(
    rows: Mapping[str, float], phases: Mapping[str, float], setting: Setting, *,
    total_ns: float, weight_bytes: int, cache: CacheBytes, seconds_per_cell: float | None, source: str,
    basis: str = "measured", band_frac: float | None = None, in_range: bool = True, calibration: Any = None,
) -> Account:  # fmt: skip
    """One generation, with time per token, rates, phases, weights and cache as companions; all with its band."""
    total = round(total_ns)
    span = (1.0, 1.0) if band_frac is None else (1 / (1 + band_frac), 1 + band_frac)
    more: dict[str, Any] = {"setting": setting.plain(), "basis": basis}
    companions: list[Account] = []

    def add(title: str, unit: str, values: Mapping[str, float], source: str, low: float, high: float) -> None:
        whole = {item: round(value) for item, value in values.items()}
        size = sum(whole.values())
        within = in_range or unit == "bytes"  # what is counted needs no calibration
        band = _band(size, band_frac, low, high)
        companions.append(Account.of(title, unit, whole, total=size, source=source, in_range=within, **band, **more))

    tokens = setting.batch * setting.num_steps
    add(PER_TOKEN, "ns", {"token": total / setting.num_steps}, "time over steps", *span)
    add(RATE, "tokens/s", {"tokens": tokens / total * 1e9}, "tokens of all rows over time", *span)
    if seconds_per_cell:
        sound = setting.batch * setting.input_length * seconds_per_cell
        add(SPEED, "thousandths", {"sound over time": sound / total * 1e12}, "seconds of sound", *span)
    if setting.encoder_layers and ENCODER in rows:
        share = 1e6 * (1 - rows[ENCODER] / sum(rows.values()))
        add(SHARE, "ppm", {"share": share}, "all but the encoder", span[0], min(span[1], 1e6 / share))
    if phases:
        add(PHASES, "ns", phases, "the end of the first step", *span)
    add(WEIGHTS, "bytes", {"weights": weight_bytes}, "the parameters", 1, 1)
    attention = {SELF: cache.self_attention, CROSS: cache.cross_attention}
    add(CACHE, "bytes", attention, "keys and values", 1, 1)
    return Account.of(
        TIME, "ns", {row: round(value) for row, value in rows.items()}, total=total, source=source,
        companions=tuple(companions), calibration=calibration, in_range=in_range, **_band(total, band_frac, *span),
        **more,
    )  # fmt: skip


def _band(total: int, band_frac: float | None, low: float, high: float) -> dict[str, Any]:
    return {} if band_frac is None else {"low": int(low * total), "high": int(np.ceil(high * total))}
