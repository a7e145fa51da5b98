"""measure(): one steady training step, what fills its peak, and how long it takes; account(): a recorded peak."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from effkit import lab
from effkit.account import Account
from effkit.activations import gradients, on_ranks, stepping
from effkit.activations.checkpointing import blocks
from effkit.activations.collectives import RanksClock
from effkit.activations.forecasting import Forecaster, MakeBatch
from effkit.activations.levers import COMPRESSIONS, Levers, Size, complete, parted
from effkit.activations.low_bit import STATES
from effkit.activations.on_ranks import TIME
from effkit.activations.real_step import Observation
from effkit.activations.storage_tracker import OUTSIDE
from effkit.activations.time_model import Clock, Run
from effkit.activations.timeline import PEAK, Ints, Timeline
from effkit.arguments import checked_same_model, checked_training, checked_whole, described
from effkit.captured import Capture
from effkit.lab import Progress, calibration_of
from effkit.progress_bar import working
from effkit.ranks.links import COLLECTIVES, Link
from effkit.restoring import unchanged
from effkit.timing import ratios_in_turn
from effkit.training import Loss, MakeOptimizer, still

_FEWEST_REPEATS = 3  # of timed levers: two may agree by chance
Step = tuple[Any, Levers, torch.optim.Optimizer]  # a batch, and how a step of it is taken
RunStep = Callable[..., dict[str, int]]  # such a step -> nanoseconds of each phase


@dataclass(frozen=True, eq=False)
class Calibration:
    """What :func:`~effkit.activations.predict` needs of a measurement.

    ``observed`` is the step that was measured, ``clock`` the time of a step (``None`` where levers were not timed),
    ``error_frac`` the replay of the measured step over its measured peak, minus 1; ``errors`` and ``noise`` are the
    gradient's, of each lossy lever that was run and between half batches; ``parts_error`` is that of micro-batches,
    beside the rounding of a number; ``of_ranks`` is the time of a step on ranks, where their links were given.
    """

    forecaster: Forecaster
    observed: Observation
    clock: Clock | None
    error_frac: float
    errors: Mapping[str, Account] = field(default_factory=dict)
    noise: tuple[Account, ...] = ()
    parts_error: float = float("nan")
    rounding_frac: float = 0.0
    of_ranks: RanksClock | None = None


@working("Measuring training steps")
def measure(
    model: torch.nn.Module, batch: Any, *, loss: Loss | None = None, optimizer: MakeOptimizer | None = None,
    make_batch: MakeBatch | None = None, repeats: int = 3, time_levers: bool = False, base: Account | None = None,
    plan: Mapping[str, str] | None = None, links: Mapping[str, Link] | None = None, progress: Progress | None = None,
    **setting: Any,
) -> Account:  # fmt: skip
    """The peak memory of one steady training step, by what it is for; and the step's time.

    A step runs once so that the optimizer has its state, once with every operator followed and every allocation
    recorded, and ``repeats`` times by the clock (the fastest counts). The model comes out as it went in, whatever the
    optimizer does: see :class:`effkit.restoring.unchanged`. ValueError for a model without parameters, a
    batch without tensors, a loss that is no number or needs no gradient.

    Parameters
    ----------
    model
        Any module, in training mode. Compiled modules hide their operators and are not visible here.
    batch
        Keyword arguments of the model as a mapping, its arguments as a tuple, or one tensor. Dimension 0 is the batch.
    loss
        Output -> scalar; ``output.loss`` unless given.
    optimizer
        Parameters -> optimizer; AdamW unless given.
    make_batch
        ``(batch_size, length) -> batch``, for other sizes; unless given, the batch is repeated and cut.
    repeats
        Timed steps; with ``time_levers`` at most so many, for more than its band needs are not run.
    time_levers
        Also run each lever once alone, so that the time of any combination can be predicted.
    base
        An earlier account of this model: what its calibration found is used, and nothing is calibrated again. Its step
        is run in turn with this one, and the time is told relative to it, for the machine's speed drifts.
    plan
        How layers are split over ranks of ``tensor_parallel``: see :func:`spread`.
    links
        What :func:`links` found. With ``time_levers``, ranks that are so connected run some steps too, so that the time
        of any step spread over them can be predicted; with a base that has them, ranks are started on the same links.
    progress
        Called with (runs done, runs in all); what it raises ends the measurement.
    setting
        ``batch_size``, ``length``, ``keep_frac`` and any of :class:`Levers`; the batch's own size and a plain step
        unless given. With ``world_size`` above 1 that many ranks are started on this machine, are sent the model and
        what goes with it, run the step, and end: the account is of the one whose peak is highest.

    Returns
    -------
    Account
        In bytes: parameter, buffer, optimizer state, input, gradient, saved activation, offloaded activation (in host
        memory, which on a CPU is the same), recomputed activation, workspace. The total is the allocator's.
        Companions: the step's time by phase; what is saved for backward, by operator; for lossy levers the gradient's
        error, beside its noise between two half batches.
    """
    check_trains(model, loss, optimizer, make_batch)
    if links is not None and (not time_levers or base is not None or setting.get("world_size", 1) != 1):
        raise ValueError("links go with time_levers=True, a step of one process, and no base, which has its own")
    if links is not None and (not isinstance(links, Mapping) or set(links) != set(COLLECTIVES)):
        raise ValueError(f"links are what activations.links() found, of every kind; given: {described(links)}")
    repeats = checked_whole("repeats", repeats, 1)
    earlier = None if base is None else calibration_of(base, Calibration, "activations")
    if earlier:
        checked_same_model(model, earlier.forecaster.shapes)
    forecaster = earlier.forecaster if earlier else Forecaster(
        model, batch, loss=loss, optimizer=optimizer, make_batch=make_batch, plan=plan
    )  # fmt: skip
    wanted = complete(forecaster.rest() if base is None else base.setting, setting)
    size, levers = parted(wanted)
    if levers.world_size > 1:
        between = earlier.of_ranks.link.between if earlier and earlier.of_ranks else {}
        with on_ranks.of_one_step(levers.world_size, **between) as ranks:
            return on_ranks.measured(
                model, forecaster.batch(size), levers, wanted, loss=forecaster.loss, ranks=ranks, repeats=repeats,
                optimizer=forecaster.make_optimizer, plan=plan or forecaster.plan, progress=progress,
                calibration=earlier or forecaster,
            )  # fmt: skip
    if not earlier:
        forecaster.size = size  # predictions are around what is measured
    alone = _single(model, size, optimizer) if time_levers and not earlier else []
    both = [Levers(offload_frac=1.0, micro_batches=min(4, size.num_rows))] if alone and size.num_rows > 1 else []
    timed = [levers, *alone, *both]
    settings = [(size, one) for one in timed] + (_checks(size, alone) if alone else [])
    base_ns = 0  # of the base's step, which is run in turn, where it was measured, and is no rank's
    if base is not None and not base.predicted and base.setting.get("world_size", 1) == 1:
        base_ns = base.companion(TIME).total
        settings.append(parted(complete(base.setting, {})))
    tell = partial(lab.tell, progress, total=1 + len(settings) * (repeats + bool(alone)))
    with unchanged(model):
        tell(0)
        updates = {one.optimizer_states: still(model.parameters(), one.optimizer(forecaster.make_optimizer))
                   for _, one in settings}  # fmt: skip
        batch = forecaster.batch(size)
        # before another optimizer has its state, and another batch its memory
        step = forecaster.observe(model, batch, levers, updates[levers.optimizer_states])
        steps = [(forecaster.batch(rows), one, updates[one.optimizer_states]) for rows, one in settings]

        def run(batch: Any, levers: Levers, update: torch.optim.Optimizer) -> dict[str, int]:
            return stepping.phases_ns(model, batch, forecaster.loss, update, levers)

        if alone:
            follow = partial(forecaster.follow, model)
            phases, source, clock = _calibrated(run, follow, settings, steps, repeats, tell, len(timed))
        else:
            (phases, source), clock = _timed(run, steps, repeats, tell, base_ns), None
        noise = gradients.noise(model, batch, forecaster.loss) if any(map(gradients.lossy, timed)) else ()
        if earlier:
            calibration = replace(earlier, observed=step)
        else:
            error = float("nan")
            with suppress(ValueError):  # it can be measured, not forecast; who asks for a forecast is told why
                # teaches the forecaster which operators hide memory
                error = forecaster.watch(step.timeline, size, levers).peak_bytes / step.peak_bytes - 1
            of_levers = gradients.calibrated(model, batch, alone, forecaster.loss) if alone else {}
            calibration = Calibration(forecaster, step, clock, error, noise=noise, **of_levers)
            if links is not None and clock is not None:
                calibration = replace(calibration, of_ranks=on_ranks.clock_of_ranks(
                    model, forecaster, clock, links, repeats, loss=forecaster.loss, optimizer=optimizer, plan=plan,
                    progress=progress,
                ))  # fmt: skip
        lossy = gradients.lossy(levers)
        changed = [gradients.error(model, batch, levers, forecaster.loss), *noise] if lossy else []
    companions = [
        Account.of(TIME, "ns", phases, total=sum(phases.values()), setting=wanted, source=source),
        saved_account(step.timeline, step.kept_bytes, "operator", "the allocator when backward began"),
        *changed,
        *(Account.of(name, "bytes", {name.split()[0].lower(): amount}, total=amount, setting=wanted,
                     source="torch.cuda.memory_stats") for name, amount in step.counters.items()),
    ]  # fmt: skip
    return Account.of(PEAK, "bytes", step.rows, total=step.peak_bytes, source=step.source, setting=wanted,
                      calibration=calibration, companions=tuple(companions))  # fmt: skip


def account(recorded: Capture, *, by: str = "category", device: str | None = None, rank: int | None = None) -> Account:
    """The peak of a capture, live or loaded, by ``"category"`` or ``"stack"``: see :meth:`Capture.memory`.

    A recording tells categories by stacks and lifetimes, and what these do not tell is *unknown*; :func:`measure`
    follows the live step and knows them all.
    """
    if not isinstance(recorded, Capture):
        raise TypeError(f"account() takes a Capture, from capture(memory=True) or load(); given: {described(recorded)}")
    return recorded.memory(by=by, device=device, rank=rank)


def check_trains(model: Any, loss: Any, optimizer: Any, make_batch: Any, *, runs: bool = True) -> None:
    """TypeError or ValueError unless a training step can be made of these."""
    checked_training(model, loss, optimizer, make_batch, "(batch_size, length) -> batch", runs=runs, shards=runs)
    if torch.is_inference_mode_enabled() or any(parameter.is_inference() for parameter in model.parameters()):
        raise ValueError("a training step cannot run under inference mode: leave torch.inference_mode() first")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{type(model).__name__} has no parameter that requires a gradient: there is nothing to train")


def saved_account(timeline: Timeline, total: int, by: str, source: str, **more: Any) -> Account:
    """What forward leaves for backward, by ``operator`` or ``module``, the largest first."""
    retained = timeline.retained
    names = retained[by].replace(OUTSIDE, "outside of any module")
    if by == "module":
        names = names.str.replace(r"\b\d+\b", "*", regex=True)  # layers of one kind together
    sizes = retained["size_bytes"].groupby(names).sum().sort_values(ascending=False, kind="stable")
    return Account.of(f"Saved activations by {by}", "bytes", sizes.to_dict(), total=total, source=source, **more)


def _single(model: torch.nn.Module, size: Size, optimizer: MakeOptimizer | None) -> list[Levers]:
    """Each lever alone, those that this model and batch admit."""
    singles = [*(Levers(compress=form) for form in COMPRESSIONS[1:3]), Levers(offload_frac=1.0),
               Levers(autocast="bfloat16")]  # fmt: skip
    singles += [Levers(micro_batches=parts) for parts in (2, 4) if parts <= size.num_rows]
    if optimizer is None:
        singles += [Levers(optimizer_states=form) for form in STATES[1:]]
    try:
        blocks(model)
    except ValueError:
        return singles
    return [Levers(checkpoint_every=1), Levers(checkpoint_every=1, keep="matmul"), *singles]


def _checks(size: Size, alone: Sequence[Levers]) -> list[tuple[Size, Levers]]:
    """Steps that no clock of levers ``alone`` has seen: pairs, in part where they have parts, and half a batch."""
    rows = size.num_rows
    in_part = {"checkpoint_every": 2, "offload_frac": 0.5, "micro_batches": 3 if rows % 3 == 0 else min(2, rows)}
    both = [one.changed | other.changed for one, other in zip(alone, alone[len(alone) // 2 :], strict=False)]
    pairs = [(size, Levers(**{name: in_part.get(name, value) for name, value in changed.items()})) for changed in both]
    return [*pairs, (replace(size, num_rows=rows // 2), Levers())] if rows > 1 else pairs


def _timed(
    run: RunStep, steps: Sequence[Step], repeats: int, tell: Callable[[int], None], base_ns: int
) -> tuple[dict[str, int], str]:
    """Nanoseconds of each phase of the first of these steps, and what they are: the fastest; or the middle one of those
    run in turn with the second, the base's, which took ``base_ns`` when it was measured."""
    taken: list[dict[str, int]] = []

    def more(done: Sequence[Sequence[Any]]) -> list[int]:
        tell(min(repeats, 1 + len(done[0])))
        return [0] * (len(done[0]) < repeats)

    if not base_ns:
        while more([taken]):
            _kept(run, steps[0], taken)
        return _quickest(taken), f"wall time, fastest of {repeats}"
    times, (ratios,) = ratios_in_turn(partial(_kept, run, steps[1], []), [partial(_kept, run, steps[0], taken)], more)
    scale = statistics.median(ratios) * base_ns / sum(_quickest(taken).values())
    source = f"wall time, middle one of {repeats}{lab.relative_source(base_ns / min(times))}"
    return {phase: round(scale * time_ns) for phase, time_ns in _quickest(taken).items()}, source


def _kept(run: RunStep, step: Step, taken: list[dict[str, int]]) -> int:
    """Take this step, and keep its phases among those that were ``taken``; its time [ns]."""
    taken.append(run(*step))
    return sum(taken[-1].values())


def _quickest(taken: Sequence[dict[str, int]]) -> dict[str, int]:
    return min(taken, key=lambda phases: sum(phases.values()))


def _calibrated(
    run: RunStep, follow: Callable[..., tuple[Timeline, Ints]], settings: Sequence[tuple[Size, Levers]],
    steps: Sequence[Step], repeats: int, tell: Callable[[int], None], num_fitted: int,
) -> tuple[dict[str, int], str, Clock]:  # fmt: skip
    """Nanoseconds of each phase of the first of these steps, the plain one, at its fastest; what they are; and a clock,
    whose first ``num_fitted`` are each lever alone, while the rest check it.

    All are run in turn, and are timed relative to the plain one. Repeats end when one more would hardly make the band
    narrower.
    """
    followed, clocks, taken = [], [], list[dict[str, int]]()
    for number, step in enumerate(steps):
        tell(1 + number)
        followed.append(follow(*step))

    def fit(ratios: Sequence[Sequence[float]]) -> Clock:
        fastest = sum(_quickest(taken[1:]).values())
        runs = []
        for (size, levers), seen, of_one in zip(settings, followed, [[1.0], *ratios], strict=True):
            growth = size.num_rows / settings[0][0].num_rows
            repeats_ns = tuple(round(ratio * fastest) for ratio in of_one)
            runs.append(Run(levers, *seen, round(statistics.median(repeats_ns)), repeats_ns, growth))
        return Clock.fit(runs[:num_fitted], runs[num_fitted:])

    def more(ratios: Sequence[Sequence[float]]) -> range:
        turn = len(ratios[0])
        tell(1 + (1 + turn) * len(steps))
        if turn >= min(_FEWEST_REPEATS, repeats):
            clocks.append(fit(ratios))
        enough = turn == repeats or (clocks and not clocks[-1].trust.shrinks(turn + 1))
        return range(0 if enough else len(ratios))

    ratios_in_turn(partial(_kept, run, steps[0], taken), [partial(_kept, run, step, []) for step in steps[1:]], more)
    source = f"wall time, fastest of {len(taken) - 1}; {len(steps)} settings in turn with it"
    return _quickest(taken[1:]), source, clocks[-1]
