"""measure(): run a plan's batches on a live model, forward, backward and optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from effkit import lab, training
from effkit.account import Account
from effkit.arguments import checked_function, checked_same_model, checked_training, checked_whole, described, shapes
from effkit.lab import Progress, calibration_of
from effkit.padding.accounting import EPOCH_TIME, companions, epoch_rows, setting_of
from effkit.padding.buckets import Ints
from effkit.padding.calibration import Calibration, fit_cost, fit_memory
from effkit.padding.plans import Plan
from effkit.padding.real_cells import input_lengths
from effkit.progress_bar import working
from effkit.recording import steady_peak
from effkit.restoring import unchanged
from effkit.timing import elapsed_ns, ratios_in_turn
from effkit.training import Loss, MakeOptimizer, own_loss

MakeBatch = Callable[[list[Ints], pd.DataFrame], Any]
Step = Callable[[Any], object]

_SETTLED_FRAC = 0.05  # runs that agree so far have found the batch's time
_PATIENCE = 3  # times ``repeats`` that a batch is run at most


@working("Measuring training steps")
def measure(
    plan: Plan, model: torch.nn.Module, *, num_batches: int | None = None, repeats: int = 3,
    make_batch: MakeBatch | None = None, loss: Loss | None = None, optimizer: MakeOptimizer | None = None,
    step: Step | None = None, also: Plan | None = None, base: Account | None = None, world_size: int = 1,
    progress: Progress | None = None,
) -> Account:  # fmt: skip
    """The time of one epoch of this plan on this model, with what it was spent on.

    Each batch runs once untimed while its peak memory is read, then ``repeats`` timed passes go over all of them in
    turn. One of them is run again and again between, and the others are told relative to it: a machine's speed drifts.
    A batch of which no two runs agree to 5% is run again, up to three times as often; the middle one counts. The model
    comes out as it went in, and all that a step of yours can reach: see :class:`effkit.restoring.unchanged`.

    Parameters
    ----------
    plan
        Which examples make up which batch.
    model
        In training mode. Its own ``make_batch(rows, lengths)`` is used unless one is given.
    num_batches
        Run only so many, evenly spread from the largest to the smallest, and scale to the epoch by the fitted cost;
        ``None`` runs them all. A calibration (no ``base``) gives half of them to cut-down batches: few rows, or the
        shortest. A plan's own batches can be so alike that the fixed cost and the cost per cell cannot be told apart.
    repeats
        Timed passes.
    make_batch
        ``(example indices of each row, lengths) -> batch``: keyword arguments of the model, on its device.
    loss
        Model output -> scalar; ``output.loss`` unless given.
    optimizer
        Parameters -> optimizer; AdamW unless given.
    step
        A training step of your own, ``step(batch)``, run as it is in place of forward, backward and optimizer.
    also
        A plan of the same examples, of which two batches join the calibration: larger ones, say, so that predictions
        about such lie within what was measured.
    base
        An earlier account of this model: its cost model then splits the time instead of one fitted to this plan, and a
        batch of it is what these are told relative to.
    world_size
        Ranks that share the epoch. They are run one after another here, and communication is not visible.
    progress
        Called with (steps done, steps in all); what it raises ends the measurement.

    Returns
    -------
    Account
        In ns: rows ``step overhead``, ``real``, ``padding`` (and ``waiting`` for the slowest rank), split by the
        cost model; the total is wall time. Companions: input cells, steps, peak memory. ``calibration`` is set.
    """
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a Plan, from padding.plan(lengths, ...); given: {described(plan)}")
    checked_training(model, loss, optimizer, make_batch, "(rows, lengths) -> batch")
    checked_function("step", step, "step(batch)")
    repeats, world_size = checked_whole("repeats", repeats, 1), checked_whole("world_size", world_size, 1)
    calibration = None if base is None else calibration_of(base, Calibration, "padding")
    if calibration and calibration.shapes:
        checked_same_model(model, calibration.shapes)
    if num_batches is not None:  # three of them where a cost model is to be fitted
        num_batches = checked_whole("num_batches", num_batches, 3 if calibration is None else 1)
    make = make_batch or getattr(model, "make_batch", None)
    if make is None:
        raise TypeError(
            f"measure() cannot make batches for {type(model).__name__}: give make_batch=(rows, lengths) -> batch"
        )
    probes = choose(plan, num_batches, cut_down=calibration is None)
    probes += [] if also is None else [Probe(plan, probe.rows) for probe in choose(also, 2, cut_down=False)]
    whole_ones = [probe for probe in probes if probe.whole]
    # of batches in order of their size, the middle one is what the others are told relative to
    reference, base_ns = whole_ones[len(whole_ones) // 2], 0.0
    if calibration is not None:  # of a base, it is the one that the base's own were told relative to
        told = calibration.steps[calibration.steps["whole"]]
        row = told.iloc[len(told) // 2]
        reference = Probe(calibration.plan, calibration.plan.rows(int(row["batch"])))
        base_ns = float(row["dur_ns"])
    tell = partial(lab.tell, progress)
    with unchanged(model, *([] if step is None else [step])) as given:
        train, update = (step, None) if step is not None else _still_step(model, loss or own_loss, optimizer)
        train(make(probes[0].rows, plan.lengths))  # the optimizer's state exists from here on
        updates = given.optimizers if update is None else [update]
        peaks, peak_source, of_batches = _peaks(model, make, train, updates, probes, plan, repeats, tell)
        now_ns, times = _timed(make, train, reference, probes, repeats, tell)
    scale = base_ns / now_ns if base_ns else 1.0
    middle_ns = [round(scale * np.median(of_one)) for of_one in times]
    steps = pd.DataFrame(of_batches).assign(dur_ns=middle_ns, peak_bytes=peaks, times_ns=times)
    if calibration:
        cost, memory = calibration.cost, calibration.memory
    else:  # time and peak memory of a step as functions of its shape
        cost = fit_cost(steps, attention="padded" if plan.row_starts is None else "block_mask")
        memory = fit_memory(steps.rename(columns={"num_rows": "batch_size"}))
    whole = steps[steps["whole"]]
    modelled = cost.step_ns(whole["num_rows"], whole["input_length"], whole.get("output_length", 0))
    anchor = float(whole["dur_ns"].sum() / modelled.sum())
    rows, epoch_ns, num_steps = epoch_rows(plan, cost, world_size)
    complete = len(whole) == len(plan.batches)
    noise = lab.noise(times)
    # where every batch was run, their sum is the epoch, without the model's help
    total = int(whole["dur_ns"].sum()) if complete and world_size == 1 else round(anchor * epoch_ns)
    sources = ("the shapes of the batches", "the number of batches",
               peak_source + ("" if complete else ", largest of the steps run"))  # fmt: skip
    return Account.of(
        EPOCH_TIME, "ns", rows, total=total, basis="derived", setting=setting_of(plan, world_size),
        source=_source(len(whole), len(plan.batches), repeats, noise, world_size) + lab.relative_source(scale),
        companions=companions(plan, num_steps, int(whole["peak_bytes"].max()), sources),
        calibration=Calibration(plan, cost, memory, steps, noise, anchor, shapes(model)),
    )  # fmt: skip


def _peaks(
    model: torch.nn.Module, make: MakeBatch, train: Step, updates: Sequence[torch.optim.Optimizer],
    probes: list[Probe], plan: Plan, repeats: int, tell: Progress,
) -> tuple[list[int], str, list[dict[str, Any]]]:  # fmt: skip
    """Peak memory of one step on each batch [bytes], the counter that saw it, and the shapes of the batches."""
    peaks, source, of_batches = [], "", []
    for i, probe in enumerate(probes):
        batch = make(probe.rows, plan.lengths)  # one at a time: others would count as its memory
        of_batches.append(_shape(batch, probe))
        tell(i, len(probes) * (repeats + 1))
        training.drop_gradients(model.parameters())  # those from before would be freed unseen

        def resident_bytes(batch: Any = batch) -> int:
            return sum(map(training.size_bytes, training.residents(model, updates, batch).values()))

        peak, source = steady_peak(partial(train, batch), resident_bytes, training.states_replaced(updates))
        peaks.append(peak)
    return peaks, source, of_batches


def _timed(
    make: MakeBatch, train: Step, reference: Probe, probes: list[Probe], repeats: int, tell: Progress
) -> tuple[int, list[list[int]]]:
    """The fastest step on the reference [ns]; and times of steps on each batch, as if all were run when that was."""
    others = [probe for probe in probes if probe is not reference] or [reference]
    num_runs = len(probes) * (repeats + 1)

    def step_ns(probe: Probe) -> int:
        batch = make(probe.rows, probe.plan.lengths)
        return elapsed_ns(partial(train, batch))

    def more(ratios: Sequence[Sequence[float]]) -> list[int]:
        tell(min(num_runs - 1, len(probes) + sum(map(len, ratios))), num_runs)
        apart = [min(np.diff(np.log(np.sort(of_one))), default=0.0) for of_one in ratios]
        most = [repeats * (_PATIENCE if nearest > _SETTLED_FRAC else 1) for nearest in apart]
        return [i for i, of_one in enumerate(ratios) if len(of_one) < most[i]]

    taken, ratios = ratios_in_turn(partial(step_ns, reference), [partial(step_ns, probe) for probe in others], more)
    fastest = min(taken)
    of_others = iter([round(ratio * fastest) for ratio in of_one] for of_one in ratios)
    return fastest, [[fastest] if probe is reference else next(of_others) for probe in probes]


def _source(num_run: int, num_batches: int, repeats: int, noise_frac: float, world_size: int) -> str:
    """What the total was read from, and what to think of it."""
    source = "wall time"
    if num_run != num_batches:
        source += f" of {num_run} of {num_batches} steps, scaled to the epoch by the fitted cost"
    source += f", middle one of {repeats} passes or more"
    if noise_frac > _SETTLED_FRAC:
        source += f"; repeats lie {noise_frac:.0%} apart, so this machine is busy with something else"
    if world_size > 1:
        source += f"; {world_size} ranks run one after another, communication not visible"
    return source


def _still_step(model: torch.nn.Module, to_loss: Loss, make: MakeOptimizer | None) -> tuple[Step, Any]:
    """A step that learns nothing, and its optimizer."""
    update = training.still(model.parameters(), make)

    def train(batch: Any) -> None:
        to_loss(training.forward(model, batch)).backward()
        update.step()
        # last, so that the gradients of one step are not freed inside the next
        update.zero_grad(set_to_none=True)

    return train, update


def _shape(batch: Any, probe: Probe) -> dict[str, Any]:
    """The probe's shape, of a cut-down batch as it was made; a whole one whose tensors do not hold the cells that its
    plan says is refused: a receipt would compare two things."""
    shape = probe.shape()
    try:
        real, width = input_lengths(batch)
    except ValueError:  # this batch shows no padding: nothing to compare
        return shape
    planned = sum(int(probe.plan.lengths["input_length"].to_numpy()[row].sum()) for row in probe.rows)
    longest = shape["input_length"]
    if int(real.sum()) != planned or (width != longest and probe.whole):
        raise ValueError(
            f"make_batch() made {int(real.sum()):,} real cells in rows of {width:,}, and the plan says {planned:,} in "
            f"rows of {longest:,}: let it pad to the longest row or the plan's multiple, and count as lengths do"
        )
    return shape | {"input_length": width}


@dataclass(frozen=True, eq=False)
class Probe:
    """One batch to run: the example indices of each row, and its number in the plan, -1 where it is none of its own."""

    plan: Plan
    rows: list[Ints]
    batch: int = -1

    @property
    def whole(self) -> bool:
        """Whether it is a batch of the plan as it stands."""
        return self.batch >= 0

    def shape(self) -> dict[str, Any]:
        """``num_rows``, padded ``input_length`` and, where known, ``output_length`` [cells]; ``whole``, and the
        number of the ``batch``, -1 for none."""
        lengths = self.plan.lengths
        padded = {name: max(int(lengths[name].to_numpy()[row].sum()) for row in self.rows) for name in lengths}
        padded["input_length"] = self.plan.padded(padded["input_length"])
        return {"num_rows": len(self.rows), **padded, "whole": self.whole, "batch": self.batch}


def choose(plan: Plan, num_batches: int | None, *, cut_down: bool) -> list[Probe]:
    """Batches of the plan, evenly spread in order of their padded cells, the largest first.

    With ``cut_down``, half of them (and four beside all of them) are not whole: the longest rows of the largest
    batch, a batch of the plan's shortest rows, half a batch with the fewest outputs for their inputs, a few of the
    shortest rows. Without the third, inputs and outputs grow together, and what each costs cannot be told.
    """
    frame = plan.frame
    order = np.argsort((frame["num_rows"] * frame["input_length"]).to_numpy(), kind="stable")[::-1]
    num_cut = 0 if not cut_down else 4 if num_batches is None else num_batches // 2
    num_whole = len(order) if num_batches is None else min(len(order), num_batches - num_cut)
    chosen = order[np.rint(np.linspace(0, len(order) - 1, num_whole)).astype(int)]
    probes = [Probe(plan, plan.rows(int(batch)), int(batch)) for batch in chosen]
    return probes + [Probe(plan, rows) for rows in _cut_down(plan, order)[:num_cut]]


def _cut_down(plan: Plan, order: Ints) -> list[list[Ints]]:
    lengths = plan.lengths["input_length"].to_numpy()

    def by_length(rows: list[Ints]) -> list[Ints]:
        return sorted(rows, key=lambda row: int(lengths[row].sum()))

    usual = max(1, int(np.median(plan.frame["num_rows"])))
    few = max(1, usual // 4)
    # the shortest batches hold the shortest rows of a bucketed plan, and a fair sample of a shuffled one
    pool = by_length([row for batch in order[-16:] for row in plan.rows(int(batch))])
    if "output_length" in plan.lengths:
        outputs = plan.lengths["output_length"].to_numpy()
        large = by_length([row for batch in order[:16] for row in plan.rows(int(batch))])
        terse = sorted(large[len(large) // 2 :], key=lambda row: int(outputs[row].sum()) / int(lengths[row].sum()))
    else:
        terse = by_length(plan.rows(int(order[len(order) // 2])))
    return [by_length(plan.rows(int(order[0])))[-few:], pool[:usual], terse[: max(1, usual // 2)], pool[:few]]
