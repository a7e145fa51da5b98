"""predict(): another setting's epoch from one measured account. whatif(): the same with sliders and a button."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from effkit.account import Account
from effkit.lab import Progress, Trust, asked, calibration_of, interval
from effkit.padding.accounting import EPOCH_TIME, LIMIT_KNOBS, PEAK, companions, epoch_rows
from effkit.padding.calibration import Calibration
from effkit.padding.planning import BUCKETED, LIMITS, STRATEGIES, check_whole, plan
from effkit.padding.plans import Plan

if TYPE_CHECKING:
    import torch

    from effkit.whatif import WhatIf

_OF_THE_EPOCH = ("strategy", "memory_bytes", "max_length", "world_size")
KNOBS = ("strategy", *LIMIT_KNOBS, *_OF_THE_EPOCH[1:])
_DEFAULTS = {"num_buckets": 30, "num_output_buckets": 2}
_MIB = 2**20


def predict(base: Account, **setting: Any) -> Account:
    """The epoch at another setting: time, cells, steps and peak memory, without running anything.

    ValueError for an unknown knob, a base without calibration, or limits that no plan can keep.

    Parameters
    ----------
    base
        What :func:`effkit.padding.measure` returned.
    setting
        Any of ``strategy, batch_size, max_input_cells, num_buckets, num_output_buckets, quadratic, seed,
        pad_to_multiple_of`` (see :func:`effkit.padding.plan`); ``memory_bytes``, a budget that then decides the batch
        sizes; ``max_length``, beyond which examples are left out [cells]; ``world_size``. The rest stays as measured.

    Returns
    -------
    Account
        In ns, with a band, which widens outside the range. ``in_range`` is False when a batch is longer or larger than
        what was measured, for packed rows (their mask costs differently) where padded ones were measured, or the other
        way round, and for several ranks (communication was not measured). Cells and steps,
        among the companions, are exact; peak memory has a band. At the measured setting: ``base`` itself.
    """
    calibration = calibration_of(base, Calibration, "padding")
    wanted = complete(base, setting)
    if wanted == dict(base.setting):
        return base
    planned = plan_at(base, wanted)
    cost, memory, frame = calibration.cost, calibration.memory, planned.frame
    world_size = wanted["world_size"]
    rows, epoch_ns, num_steps = epoch_rows(planned, cost, world_size)
    output = frame.get("output_length", 0)
    doublings = cost.doublings(frame["num_rows"], frame["input_length"], output)
    path_seen = (planned.row_starts is not None) == (cost.attention != "padded")
    seen = path_seen and world_size == 1
    band_frac = calibration.trust(frame).beyond(doublings, seen)
    total = round(epoch_ns * calibration.anchor)
    peak = round(float(np.max(memory.amount(frame["num_rows"], frame["input_length"], output))))
    of_peak = interval(peak, peak * Trust(memory.error_frac).beyond(doublings, path_seen))
    of_peak["in_range"] = path_seen and doublings == 0
    return Account.of(
        EPOCH_TIME, "ns", rows, total=total, source=f"the cost of {cost.num_steps} measured steps", basis="derived",
        **interval(total, total * band_frac), in_range=seen and doublings == 0, setting=wanted,
        companions=companions(planned, num_steps, peak, ("the plan", "the plan", "the fitted memory model"), exact=True,
                              **of_peak),
        calibration=calibration,
    )  # fmt: skip


def complete(base: Account, changes: dict[str, Any]) -> dict[str, Any]:
    """The measured setting with these changes, as a full setting.

    A knob that the new setting's strategy has no use for is dropped; one that it needs and nobody gave falls back to
    what was measured.
    """
    changes = asked(changes, KNOBS)
    check_whole(changes)
    setting = {**_DEFAULTS, **base.setting, **changes}
    if setting["strategy"] not in (*STRATEGIES, base.setting.get("strategy")):
        raise ValueError(f"unknown strategy {setting['strategy']!r}; choose one of {', '.join(STRATEGIES)}")
    # a loader's own batches have no limits of a plan
    used = {*LIMITS.get(setting["strategy"], base.setting), *_OF_THE_EPOCH}
    used -= {"batch_size", "max_input_cells"} if setting.get("memory_bytes") else {"memory_bytes"}
    return {name: value for name, value in setting.items() if name in used}


def plan_at(base: Account, setting: dict[str, Any]) -> Plan:
    """The plan of a full setting, over the lengths that were measured."""
    calibration = calibration_of(base, Calibration, "padding")
    measured = calibration.plan
    lengths = measured.lengths
    if setting["max_length"] < base.setting["max_length"]:
        lengths = lengths[lengths["input_length"] <= setting["max_length"]].reset_index(drop=True)
        if lengths.empty:
            raise ValueError(f"no example is {setting['max_length']} cells or shorter: raise max_length")
    if isinstance(setting.get("batch_size"), tuple) and setting["strategy"] not in BUCKETED:
        raise ValueError(
            f"{setting['strategy']} takes one batch_size, and what was measured had one per bucket: give it"
        )
    fixed = {name: value for name, value in measured.limits.items() if name not in KNOBS}
    limits = fixed | {name: value for name, value in setting.items() if name not in _OF_THE_EPOCH}
    changed = {name for name in setting if setting[name] != base.setting.get(name)}
    if setting["strategy"] not in STRATEGIES and changed <= {"pad_to_multiple_of", "world_size"}:
        return replace(measured, limits=limits)  # the same batches, padded in another way
    if setting.get("memory_bytes"):
        budget = replace(calibration.memory, budget=float(setting["memory_bytes"]))
        if setting["strategy"] in BUCKETED:
            limits["memory"] = budget
        else:
            limits["batch_size"] = int(budget.largest_batches(lengths.max().to_frame().T)[0])
    if setting["strategy"] == "token_budget" and "max_input_cells" not in limits:
        # the cells of one full batch of the longest examples: what the measured plan had to make room for
        size = limits.pop("batch_size", None)
        if not isinstance(size, int):
            raise ValueError("token_budget needs max_input_cells here: what was measured had no one batch size")
        limits["max_input_cells"] = size * int(lengths["input_length"].max())
    return plan(lengths, setting["strategy"], **limits)


def whatif(
    base: Account, model: torch.nn.Module | None = None, *, num_batches: int | None = None, repeats: int = 3
) -> WhatIf:
    """Sliders over :func:`predict`; with the live ``model``, the button runs the setting and shows the receipt.

    Parameters
    ----------
    base
        What :func:`effkit.padding.measure` returned.
    model
        The live model that was measured; without it the button is disabled.
    num_batches, repeats
        Of the measurement behind the button, as in :func:`effkit.padding.measure`.
    """
    from effkit.whatif import Choice, Slider, WhatIf

    shortest = int(calibration_of(base, Calibration, "padding").plan.lengths["input_length"].median())
    rest, longest = base.setting, base.setting["max_length"]
    peak_mib = base.companion(PEAK).total // _MIB
    # packing only where it was measured; and what was measured, if it is none of the usual ones
    own = rest["strategy"]
    choices = [own] * (own not in STRATEGIES) + [name for name in STRATEGIES if name != "pack" or own == "pack"]
    knobs: list[Slider | Choice] = [
        *(Slider(name, label, 1, 4 * rest[name], 1, tooltip) for name, label, tooltip in (
            ("batch_size", "Batch size [examples]", "Rows per batch, in every bucket"),
            ("max_input_cells", "Largest batch [cells]", "Padded input cells per batch"),
        ) if isinstance(rest.get(name), int)),
        Slider("memory_bytes", "Memory budget [MiB]", 0, 2 * peak_mib, max(1, peak_mib // 50),
               "What a step may take; decides the batch sizes, unless 0", rest=0, scale=_MIB),
        Choice("strategy", "Strategy", choices, "How examples are assigned to batches"),
        Slider("num_buckets", "Input buckets [count]", 1, 40, 1, "Buckets by input length", rest=8),
        Slider("num_output_buckets", "Output buckets [count]", 1, 8, 1, "By output length, within each", rest=2),
        Slider("max_length", "Longest input [cells]", shortest, longest, max(1, (longest - shortest) // 50),
               "Longer examples are left out"),
        Slider("world_size", "Ranks [count]", 1, 16, 1, "Ranks that share the epoch and wait for each other"),
    ]  # fmt: skip

    def run(progress: Progress, **setting: Any) -> Account:
        from effkit.padding.live import measure

        assert model is not None
        full = complete(base, setting)
        measured = measure(
            plan_at(base, full), model, base=base, num_batches=num_batches, repeats=repeats,
            world_size=full["world_size"], progress=progress,
        )  # fmt: skip
        return replace(measured, setting=full)

    return WhatIf(base, predict, knobs, run if model is not None else None)
