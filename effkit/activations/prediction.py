"""predict(), forecast(), largest_batch(): the peak of steps that nobody has run; whatif(): the same with sliders."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd

from effkit.account import Account
from effkit.activations import gradients
from effkit.activations.collectives import collective_bytes
from effkit.activations.forecasting import Forecaster, MakeBatch
from effkit.activations.levers import AUTOCASTS, COMPRESSIONS, KEEPS, Levers, Size, complete, parted
from effkit.activations.live import Calibration, check_trains, measure, saved_account
from effkit.activations.low_bit import STATES
from effkit.activations.on_ranks import TIME, sent_account
from effkit.activations.sharding import SHARDS, WRAPS
from effkit.activations.timeline import CATEGORIES, FORWARD_PEAK, PEAK, REQUESTED, RESERVED, RESIDENTS, Timeline
from effkit.arguments import checked_amount, described
from effkit.lab import Progress, Trust, calibration_of, interval
from effkit.progress_bar import working
from effkit.training import Loss, MakeOptimizer
from effkit.units import readable

if TYPE_CHECKING:
    import torch

    from effkit.whatif import WhatIf

_LEAST_BAND_FRAC = 0.01  # of a replay: small tensors that are not compressed, memory inside operators
_FEW_ROWS = 8  # to begin a search from


@working("Predicting a training step")
def predict(base: Account, **setting: Any) -> Account:
    """The peak at another setting, without running the model: a replay on fake tensors, or a surface through a few.

    Operators that hide memory, and those of a precision that no step has run, are run once, alone, on zeros. ValueError
    for an unknown knob, a base without calibration, or a step that cannot be replayed.

    Parameters
    ----------
    base
        What :func:`effkit.activations.measure` returned.
    setting
        Any of ``batch_size, length``; ``keep_frac``, the share of the tokens that is left before the first layer; and
        of :class:`Levers`. The rest stays as it was measured.

    Returns
    -------
    Account
        In bytes, with a band; ``source`` says in which operator the peak is. The step's time is a companion where
        levers were timed. ``in_range`` is False beyond the sizes that were replayed. At the measured setting: ``base``
        itself.
    """
    calibration = calibration_of(base, Calibration, "activations")
    wanted = complete(base.setting, setting)
    if wanted == complete(base.setting, {}):
        return base
    return _predicted(calibration.forecaster, wanted, calibration)


@working("Forecasting a training step")
def forecast(
    model: torch.nn.Module, batch_like: Any, *, loss: Loss | None = None, optimizer: MakeOptimizer | None = None,
    make_batch: MakeBatch | None = None, device: str | None = None, calibrate: bool | None = None, trains: bool = True,
    plan: Mapping[str, str] | None = None, **setting: Any,
) -> Account:  # fmt: skip
    """The peak of a training step before it is run: of this model at any size, with any levers in force.

    The whole step is replayed on fake tensors: no memory, and no arithmetic. What operators allocate inside themselves
    a replay cannot see: each of them is run once, alone, on zeros.

    Parameters
    ----------
    model
        In training mode; on the meta device if it is too large for this machine.
    batch_like, loss, optimizer, make_batch
        As in :func:`measure`.
    device
        ``"cuda"``, or the name of a GPU such as ``"H100"``: as on a GPU, on a machine that has none. What a GPU does
        otherwise is then assumed, not measured: see :mod:`effkit.activations.gpu_assumptions`. The peak is in whole
        blocks, as ``torch.cuda.max_memory_allocated`` counts it; companions are the bytes that tensors request, and
        what the allocator reserves.
    calibrate
        Whether to run operators; unless given, where the model is on this machine and ``device`` is left out.
    trains
        False: a forward pass alone, without gradients.
    plan
        How layers are split over ranks of ``tensor_parallel``: see :func:`spread`.
    setting
        As in :func:`predict`. With ``world_size`` above 1 the account is of rank 0, whose shards are the largest:
        torch's own wrappers are replayed in a group of which no other rank exists. A companion has the bytes of its
        collectives.
    """
    forecaster = _forecaster(model, batch_like, setting, calibrate, loss=loss, optimizer=optimizer,
                             make_batch=make_batch, device=device, trains=trains, plan=plan)  # fmt: skip
    return _predicted(forecaster, complete(forecaster.rest(), setting))


@working("Looking for the largest batch")
def largest_batch(
    model: torch.nn.Module, batch_like: Any, budget_bytes: int, *, loss: Loss | None = None,
    optimizer: MakeOptimizer | None = None, make_batch: MakeBatch | None = None, device: str | None = None,
    **setting: Any,
) -> int:  # fmt: skip
    """The largest batch size whose step fits into ``budget_bytes``, found without running out of memory.

    ValueError when not even one row fits.
    """
    budget_bytes = checked_amount("budget_bytes", budget_bytes)
    setting = {**setting, "batch_size": max(setting.get("micro_batches") or 1, _FEW_ROWS)}
    forecaster = _forecaster(model, batch_like, setting, loss=loss, optimizer=optimizer, make_batch=make_batch,
                             device=device)  # fmt: skip
    setting["batch_size"] = setting.get("micro_batches") or 1

    def peak_bytes(num_rows: int, exact: bool = False) -> int:
        size, levers = parted(complete(forecaster.rest(), setting | {"batch_size": num_rows}))
        return sum(forecaster.peak(size, levers, exact=exact).rows.values())

    fits, fails = setting["batch_size"], 2 * setting["batch_size"]
    if (needed := peak_bytes(fits)) > budget_bytes:
        amounts = _predicted(forecaster, complete(forecaster.rest(), setting)).frame["value"]
        resident = int(amounts.reindex(RESIDENTS).fillna(0).sum())
        raise ValueError(
            f"a budget of {readable(budget_bytes, 'bytes')} holds no step of this model: a batch of {fits} needs "
            f"{readable(needed, 'bytes')}, {readable(resident, 'bytes')} of it for parameters and what stays with them"
        )
    while peak_bytes(fails) <= budget_bytes:
        fits, fails = fails, 2 * fails
    fits += bisect_right(range(fits + 1, fails), budget_bytes, key=peak_bytes)
    # the search was on a surface: the last word has a replay
    while peak_bytes(fits, exact=True) > budget_bytes:
        fits -= 1
    while peak_bytes(fits + 1, exact=True) <= budget_bytes:
        fits += 1
    return fits


def saved(account: Account, by: str = "module") -> Account:
    """What forward leaves for backward at the account's setting, by ``"module"`` (layers of one kind together) or
    ``"operator"`` that saved it: of a measured account as it was observed, of a predicted one as it is replayed."""
    if by not in ("module", "operator"):
        raise ValueError(f"saved activations are told by module or by operator; given: {by!r}")
    step = _timeline(account)
    if isinstance(account.calibration, Calibration) and not account.predicted:
        return saved_account(step, account.calibration.observed.kept_bytes, by, "the allocator when backward began")
    return saved_account(step, int(step.retained["size_bytes"].sum()), by, "a replay on fake tensors")


def live_bytes(account: Account) -> pd.DataFrame:
    """What is alive during each operator of the account's step: ``phase``, ``operator``, and bytes by category.

    Of a measured account as it was observed, of a predicted one as it is replayed.
    """
    step = _timeline(account)
    levels = pd.DataFrame(step.levels().T, columns=list(CATEGORIES)).rename_axis("number")
    return levels.assign(phase=step.phases, operator=step.ops)


def _timeline(account: Account) -> Timeline:
    calibration = getattr(account, "calibration", None)
    if isinstance(calibration, Calibration) and not account.predicted:
        return calibration.observed.timeline
    forecaster = calibration.forecaster if isinstance(calibration, Calibration) else calibration
    if not isinstance(forecaster, Forecaster):
        raise ValueError("an Account of activations.measure(), predict() or forecast() has a timeline; given: "
                         f"{described(account)}")  # fmt: skip
    return forecaster.timeline(*parted(account.setting))


def whatif(
    base: Account, model: torch.nn.Module | None = None, batch: Any = None, *, repeats: int = 3, most_ranks: int = 1
) -> WhatIf:
    """Sliders over :func:`predict`; with the live ``model`` and a ``batch``, the button runs the setting.

    Parameters
    ----------
    base
        What :func:`effkit.activations.measure` returned.
    model, batch
        Those that were measured; without them the button is disabled.
    repeats
        Timed steps of the measurement behind the button.
    most_ranks
        Above 1: sliders for the ranks that share a step too. The button starts as many on this machine.
    """
    from effkit.whatif import Choice, Slider, WhatIf

    rest = base.setting
    rows, cells = rest["batch_size"], rest.get("length")
    knobs: list[Slider | Choice] = [Slider("batch_size", "Batch size [examples]", 1, 4 * rows, 1, "Rows of a batch")]
    if cells:
        knobs += [
            Slider("length", "Sequence length [tokens]", max(1, cells // 4), 2 * cells, 1, "Cells of each row"),
            Slider("keep_frac", "Tokens kept [tenths]", 1, 10, 1, "Share left before the first layer", scale=0.1),
        ]
    knobs += [
        Slider("micro_batches", "Micro-batches [count]", 1, 8, 1, "Parts of the batch, one after another"),
        Slider("checkpoint_every", "Checkpoint every [blocks]", 0, 4, 1, "Recompute one of so many; 0: none"),
        Choice("keep", "Recomputed blocks keep", KEEPS, "Outputs that are not recomputed"),
        Choice("compress", "Saved activations", COMPRESSIONS, "Format in which they are kept"),
        Slider("group", "Values per scale [count]", 32, 512, 32, "Of compressed activations"),
        Slider("offload_frac", "Offloaded [tenths]", 0, 10, 1, "Share that waits in host memory", scale=0.1),
        Choice("autocast", "Autocast", AUTOCASTS, "Data type of matrix products"),
        Choice("optimizer_states", "Optimizer states", STATES, "Format of AdamW's moments"),
    ]

    if most_ranks > 1:
        knobs += [
            Slider("world_size", "Ranks [count]", 1, most_ranks, 1, "Each has a batch of its own"),
            Choice("shard", "Ranks share by", SHARDS, "What each rank holds a part of"),
            Choice("wrap", "Gathered at once", WRAPS, "Of fsdp2 and zero: each block, or the whole model"),
        ]

    def run(progress: Progress, **setting: Any) -> Account:
        assert model is not None
        return measure(model, batch, base=base, repeats=repeats, progress=progress, **setting)

    return WhatIf(base, predict, knobs, run if model is not None else None)


def _forecaster(
    model: torch.nn.Module, batch: Any, setting: Mapping[str, Any], calibrate: bool | None = None, **options: Any
) -> Forecaster:
    """What forecasts around the size of this setting."""
    check_trains(model, options["loss"], options["optimizer"], options["make_batch"], runs=False)
    forecaster = Forecaster(model, batch, **options)
    forecaster.size, _ = parted(complete(forecaster.rest(), setting))
    if calibrate is not None:
        forecaster.runs_operators = calibrate
    return forecaster


def _predicted(forecaster: Forecaster, wanted: dict[str, Any], calibration: Calibration | None = None) -> Account:
    size, levers = parted(wanted)
    peak = forecaster.peak(size, levers)
    total = sum(peak.rows.values())
    error = abs(calibration.error_frac) if calibration else 0.0
    trust = Trust(error, least_frac=max(_LEAST_BAND_FRAC, forecaster.doubt_frac))
    frac = trust.beyond(peak.doublings, peak.seen)
    companions = _counters(forecaster, size, levers, frac) if forecaster.on_gpu and size == forecaster.size else []
    if levers.world_size > 1:
        sent = collective_bytes(forecaster.timeline(size, levers), levers)
        companions.append(sent_account(sent, basis=forecaster.basis))
        companions += _time_on_ranks(forecaster, size, levers, calibration, wanted)
    elif calibration is not None and (clock := calibration.clock) is not None:
        time_ns = round(forecaster.step_ns(size, levers, clock))
        known, beyond = clock.knows(levers), clock.doublings(levers, forecaster.growth(size))
        time_half_width = time_ns * clock.trust.beyond(max(beyond, peak.doublings), known)
        companions += [Account.of(
            TIME, "ns", {"step": time_ns}, total=time_ns, source="the times of operators in the steps that were run",
            basis="derived", **interval(time_ns, time_half_width), setting=wanted,
            in_range=peak.covered and known and not beyond,
        ), *gradients.predicted(levers, calibration.errors, calibration.noise)]  # fmt: skip
    title, band, told = PEAK if forecaster.trains else FORWARD_PEAK, interval(total, total * frac), ""
    if forecaster.replayer.mode.by_chance:  # a coin drops layers: a replay keeps them all
        band["low"] = min(band["low"], sum(peak.rows.get(row, 0) for row in RESIDENTS))
        told = "; layers that are dropped by chance are kept, and a step that drops some takes less"
    return Account.of(
        title, "bytes", peak.rows, total=total, basis=forecaster.basis, **band,
        source=f"a replay on fake tensors: the peak is in {peak.phase}, at {peak.op}{forecaster.assumptions}{told}",
        in_range=peak.covered, setting=wanted, companions=tuple(companions),
        calibration=calibration or forecaster,
    )  # fmt: skip


def _time_on_ranks(
    forecaster: Forecaster, size: Size, levers: Levers, calibration: Calibration | None, wanted: dict[str, Any]
) -> list[Account]:
    """The step's time on as many ranks as links were measured between; none on others, nor of layers that are split."""
    of_ranks = calibration.of_ranks if calibration else None
    alike = levers.tensor_parallel == levers.num_replicas == 1
    if of_ranks is None or levers.world_size != of_ranks.link.num_ranks or not alike:
        return []
    timeline, growth = forecaster.timeline(size, levers), forecaster.growth(size)
    computing, exposed = map(round, of_ranks.step_ns(timeline, levers, growth))
    beyond = max(of_ranks.clock.doublings(levers, growth), of_ranks.doublings(timeline, levers))
    known, total = of_ranks.clock.knows(levers), computing + exposed
    return [Account.of(
        TIME, "ns", {"computing": computing, "exposed communication": exposed}, total=total, basis="derived",
        source="the times of operators in steps that were run, and of collectives between ranks",
        **interval(total, total * of_ranks.trust.beyond(beyond, known)), setting=wanted, in_range=known and not beyond,
    )]  # fmt: skip


def _counters(forecaster: Forecaster, size: Size, levers: Levers, frac: float) -> list[Account]:
    """What else a GPU's allocator counts: bytes requested, and reserved. What of these is free depends on what ran
    before, and may be as much again, or nothing."""
    requested, (placed, held) = forecaster.requested(size, levers).peak_bytes, forecaster.placed(size, levers)
    used = placed.peak_bytes
    reserved = max(used, held)
    return [
        Account.of(name, "bytes", {name.split()[0].lower(): total}, total=total, basis=forecaster.basis,
                   source=f"a replay on fake tensors{forecaster.assumptions}", **interval(total, half_width))
        for name, total, half_width in (
            (REQUESTED, requested, requested * frac),
            (RESERVED, reserved, reserved * frac + reserved - used),
        )
    ]  # fmt: skip
