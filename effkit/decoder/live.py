"""measure(): one generation of a live model, part by part, and the short runs that predictions rest on."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from effkit.account import Account
from effkit.arguments import checked_whole
from effkit.decoder import accounting, configurations
from effkit.decoder.calibration import Calibration, Observed, calibrate, helps, lattice, overhead_frac, probes, rows_ns
from effkit.decoder.costs import Lattice, Run
from effkit.decoder.generating import Ready, checked, prepared, setting_of
from effkit.decoder.memory import CacheBytes, Memory, halvings, in_cache, in_weights, kv_cache_bytes
from effkit.decoder.module_timers import LAUNCHES, Watched, step_times, watch
from effkit.decoder.product_costs import product_cost, reading_rate
from effkit.decoder.setting import DTYPES
from effkit.device import synchronize
from effkit.lab import Progress, calibration_of, relative_source, tell
from effkit.progress_bar import working
from effkit.timing import elapsed_ns, ratios_in_turn
from effkit.training import evaluating

Step = Callable[[Any, Any], tuple[Any, Any]]
_FEWEST = 3  # times each: one disturbed generation does not move the middle one. With clocks inside it is never more
_FRAME_SECONDS = 0.01  # of sound, per cell of ``input_features``


@working("Measuring generations")
def measure(
    model: Any, inputs: Any = None, *, num_steps: int | None = None, batch: int | None = None,
    base: Account | None = None, calibrated: bool = True, repeats: int = 5, progress: Progress | None = None,
    **changes: Any,
) -> Account:  # fmt: skip
    """Generate ``num_steps`` tokens per sequence and say where the time went; an Account in ns of one generation.

    Runs with clocks around the model's parts are done in turn with runs that have none: those give the total, and the
    difference is what the clocks cost. Rows: the encoder, the keys and values of cross-attention, the prefill of a
    decoder-only model; then of all steps self-attention, cross-attention, feed-forward, norms, embedding, output layer,
    and the host between steps (sampling, preparing inputs). Companions: time per token, tokens per second, the
    real-time factor of sound, prefill and decode, bytes of weights and cache. ValueError when the model cannot
    generate, or not this way.

    Parameters
    ----------
    model
        A transformers model with ``generate``, greedy; or a function ``step(token, cache) -> (token, cache)``, whose
        first ``token`` is ``inputs`` and first cache None.
    inputs
        Keyword arguments of ``generate``, or the main one's tensor. Rows and lengths are repeated or cut to fit.
        Random ones unless given.
    num_steps
        Tokens to generate; no end token ends it early.
    batch
        Sequences, 1 unless given.
    base
        An earlier measurement of this model: the setting is run in turn with it, and its time is told relative to it,
        for the machine's speed drifts. What is not given stays as it was there.
    calibrated
        Without a base: also run short generations around this one, which :func:`predict` rests on. Not where the
        base itself is compiled, without a cache, or a beam search.
    repeats
        At most so many generations of each setting, with clocks at most three; the middle one of either counts.
    changes
        Of :class:`Setting`: ``decoder_layers=4``, ``dtype="bfloat16"``. Other sizes are built with random weights.
    """
    repeats = checked_whole("repeats", repeats, 1)
    counts = {name: value for name, value in {"num_steps": num_steps, "batch": batch}.items() if value is not None}
    if not hasattr(model, "generate") and not isinstance(model, torch.nn.Module | type) and callable(model):
        if unknown := [*changes, *(["base"] if base is not None else [])]:
            raise ValueError(
                "a step(token, cache) function is measured as it is, with num_steps and batch; given: "
                f"{', '.join(unknown)}; give a model with generate() for the rest"
            )
        return measure_step(model, inputs, repeats=repeats, progress=progress, **counts)
    if base is not None:
        return _measured_beside(base, model, inputs, {**counts, **changes}, repeats, progress)
    setting = setting_of(model, inputs, **counts, **changes)
    if setting.hold_parameters == "on":
        raise ValueError("hold_parameters keeps the parameters of a base: give base=, or the layers themselves")
    # the costs are those of greedy steps with a cache
    plain = setting.compiled == "off" and setting.cache == "on" and setting.num_beams == 1
    settings = [setting, *(probes(model, setting) if calibrated and plain else ())]
    built: dict[Any, Any] = {}  # one model for all settings of its sizes
    ready = [prepared(model, inputs, setting, built) for setting in settings]
    with evaluating(*(generation.model for generation in ready)):
        nodes = lattice(model, setting) if len(ready) > 1 else None
        runs, caches, memory = _run(ready, model.config, repeats, progress, nodes)
        calibration = None
        if len(runs) > 1:
            halfway = setting.change(num_steps=-(-setting.num_steps // 2))  # its last step is a usual one
            calibration = _calibrated(prepared(model, inputs, halfway, built), runs, memory)
    return _accounted(runs[0], ready[0], caches[0], calibration=calibration)


def _measured_beside(
    base: Account, model: Any, inputs: Any, changes: dict[str, Any], repeats: int, progress: Progress | None
) -> Account:
    """The base's setting with these changes, run in turn with the base and told relative to it."""
    calibration = calibration_of(base, Calibration, "decoder")
    before, config = calibration.observed.setting, calibration.memory.config
    if configurations.sizes(model.config) != configurations.sizes(config):
        raise ValueError(f"base is an account of another model: this {type(model).__name__} has other sizes; measure "
                         "it without base=")  # fmt: skip
    setting = checked(model, calibration.resolved(before.change(**changes)))
    ready = [prepared(model, inputs, before), prepared(model, inputs, setting)]
    with evaluating(*(generation.model for generation in ready)):
        runs, caches, _ = _run(ready, model.config, repeats, progress)
    scale = base.total / runs[0].total_ns
    modelled = sum(rows_ns(calibration, setting).values())
    moved = replace(calibration, observed=runs[1], anchor=scale * runs[1].total_ns / modelled)
    return _accounted(runs[1], ready[1], caches[1], scale=scale, calibration=moved)


def _run(
    ready: Sequence[Ready], config: Any, repeats: int, progress: Progress | None, nodes: Lattice | None = None
) -> tuple[list[Run], list[CacheBytes], Memory]:
    """Every setting ``repeats`` times, with ``nodes`` until more do not help, with clocks inside and without; the cache
    that each leaves; and the memory of such models. ``config`` is that of the model that was given.

    The first is run again between the others, whose times are told relative to it: a machine's speed drifts."""
    # a step that was compiled has no modules left
    inside = [number for number, generation in enumerate(ready) if generation.setting.compiled == "off"]
    total = len(ready) * (1 + repeats)
    caches: list[CacheBytes] = []
    for done, generation in enumerate(ready, 1):  # untimed: memory is laid out, code is loaded (or compiled)
        output = generation.call()
        caches.append(in_cache(getattr(output, "past_key_values", None)))
        if len(caches) == 1:
            length = output.sequences.shape[1] if hasattr(output, "sequences") else 0
            memory = _memory(generation, config, caches[0], max(1, length - generation.setting.num_steps))
        tell(progress, done, total)
    latest: dict[int, Watched] = {}  # of this turn; then one of each turn
    watched: list[list[Watched]] = [[] for _ in ready]

    def watched_ns(number: int) -> int:
        if number not in latest:
            tell(progress, len(ready) * (1 + len(watched[number])) + len(latest) + 1, total)
        latest[number] = watch(ready[number].model, ready[number].call)
        return latest[number].wall_ns

    plain = [partial(elapsed_ns, generation.call) for generation in ready]
    others = [*plain[1:], *(partial(watched_ns, number) for number in inside)] or plain

    def runs(base_ns: Sequence[int], ratios: Sequence[Sequence[float]]) -> list[Run]:
        """What was run so far, as if all of it was when the base took the middle one of its times."""
        middle_ns = float(np.median(base_ns))
        times = [[middle_ns * ratio for ratio in of_one] for of_one in ratios]
        of_parts = dict(zip(inside, times[len(ready) - 1 :], strict=False))
        parts = [tuple(map(Watched.lasting, watched[number], of_parts.get(number, ()))) for number in range(len(ready))]
        return [Run(generation.setting, clocked, tuple(map(round, whole)), memory.step_size(generation.setting))
                for generation, clocked, whole in zip(ready, parts, [base_ns, *times], strict=False)]  # fmt: skip

    def more(ratios: Sequence[Sequence[float]]) -> range:
        for number in tuple(latest):
            watched[number].append(latest.pop(number))
        if (turn := len(ratios[0])) > _FEWEST:
            tell(progress, len(ready) * (1 + turn), total)
        enough = turn >= repeats or (nodes and turn >= _FEWEST and not helps(runs([10**9], ratios), nodes))
        num_chosen = len(others) if turn < _FEWEST else len(plain) - 1 or len(others)
        return range(0 if enough else num_chosen)

    return runs(*ratios_in_turn(plain[0], others, more)), caches, memory


def _memory(ready: Ready, config: Any, cache: CacheBytes, prompt_cells: int) -> Memory:
    setting = ready.setting
    run = configurations.changed(ready.model.config, decoder_layers=setting.depth)
    per_cell = kv_cache_bytes(run, setting.rows, 0, encoder_cells=1, dtype=setting.dtype).cross_attention
    cells = cache.cross_attention // per_cell if per_cell else 0
    halved = halvings(setting.input_length, cells) if cells else None
    # a copy: exit_layer changes the live one while it runs
    return Memory(type(ready.model), copy.deepcopy(config), prompt_cells, halved)


def _calibrated(ready: Ready, runs: Sequence[Run], memory: Memory) -> Calibration:
    times = step_times(ready.model, ready.call, ready.setting.num_steps)
    launches = times.pop(LAUNCHES).to_dict()
    step_bytes = runs[0].step.read_bytes
    shape = (ready.setting.width, configurations.sizes(ready.model.config).ffn)
    parameter, nodes = next(ready.model.parameters()), lattice(ready.model, runs[0].setting)
    products = {name: product_cost(*shape, step_bytes, nodes.rows, getattr(torch, name), parameter.device)
                for name in DTYPES}  # fmt: skip
    return calibrate(
        runs, nodes, memory=memory, seconds_per_cell=_seconds_per_cell(ready.model), launches=launches,
        apart=times.to_dict(), read_bytes_per_s=reading_rate(step_bytes, parameter.dtype, parameter.device),
        products=products,
    )  # fmt: skip


def _seconds_per_cell(model: Any) -> float | None:
    return _FRAME_SECONDS if model.main_input_name == "input_features" else None


def _accounted(
    run: Run, ready: Ready, cache: CacheBytes, *, scale: float = 1.0, calibration: Calibration | None = None
) -> Account:
    rows, phases = accounting.measured_rows(run)
    more = (f"; clocks inside cost {overhead_frac(run):+.1%}" if run.watched else "") + relative_source(scale)
    return accounting.generation_account(
        {row: scale * value for row, value in rows.items()}, {row: scale * value for row, value in phases.items()},
        run.setting, total_ns=scale * run.total_ns, weight_bytes=in_weights(ready.model), cache=cache,
        seconds_per_cell=_seconds_per_cell(ready.model), calibration=calibration or Observed(run),
        source=f"the wall clock of {len(run.plain_ns)} generations without clocks inside{more}",
    )  # fmt: skip


def measure_step(
    step: Step, first: Any, *, num_steps: int = 20, batch: int = 1, repeats: int = 3,
    progress: Progress | None = None,
) -> Account:  # fmt: skip
    """Call ``step`` for every token; rows are the first step, with no cache yet, and the later ones.

    What a step does inside is not visible here. ``batch`` says how many sequences the tokens hold. ValueError for no
    steps, or a step that does not return (token, cache).
    """
    if num_steps < 1 or batch < 1:
        raise ValueError(f"a generation has num_steps >= 1 and batch >= 1; given: {num_steps} and {batch}")
    walls, times = [], []
    with torch.no_grad():
        for turn in range(-1, repeats):  # the first time is not counted
            synchronize()
            marks, token, cache = [time.perf_counter_ns()], first, None
            for _ in range(num_steps):
                result = step(token, cache)
                if not isinstance(result, tuple) or len(result) != 2:
                    raise ValueError(f"a step returns (token, cache); given: {type(result).__name__}")
                token, cache = result
                synchronize()
                marks.append(time.perf_counter_ns())
            if turn >= 0:
                walls.append(time.perf_counter_ns() - marks[0])
                times.append(np.diff(marks))
            tell(progress, turn + 2, repeats + 1)
    middle = int(np.argsort(walls)[len(walls) // 2])  # rows and total of one generation: they add up whatever disturbs
    total, rows = walls[middle], {"first step": int(times[middle][0]), "later steps": int(times[middle][1:].sum())}
    token_ns, rate = round(total / num_steps), round(batch * num_steps / total * 1e9)
    companions = (
        Account.of(accounting.PER_TOKEN, "ns", {"token": token_ns}, total=token_ns, source="time over steps"),
        Account.of(accounting.RATE, "tokens/s", {"tokens": rate}, total=rate, source="tokens of all rows over time"),
    )
    return Account.of(
        accounting.TIME, "ns", rows, total=total, source=f"the wall clock of the middle one of {repeats} generations",
        companions=companions, setting={"num_steps": num_steps, "batch": batch},
        calibration=np.median(times, axis=0),  # time of every step, for positions()
    )  # fmt: skip
