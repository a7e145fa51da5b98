"""measure(): one generation of a live model, part by part, and the short runs that predictions rest on."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from effkit.account import Account
from effkit.decoder import accounting, configurations
from effkit.decoder.calibration import Calibration, Observed, calibrate, overhead_frac, probes
from effkit.decoder.costs import Run
from effkit.decoder.floors import Launches, reading_rate
from effkit.decoder.generating import Ready, checked, prepared, setting_of
from effkit.decoder.memory import CacheBytes, Memory, halvings, in_cache, in_weights, kv_cache_bytes
from effkit.decoder.module_timers import Watched, watch
from effkit.decoder.product_costs import caches, product_cost
from effkit.decoder.scaling_rules import rows_ns
from effkit.decoder.setting import DTYPES, Setting
from effkit.decoder.stepping import measure_step
from effkit.lab import Progress, calibration_of, tell
from effkit.timing import elapsed_ns
from effkit.training import evaluating

_FRAME_SECONDS = 0.01  # of sound, per cell of ``input_features``


def measure(
    model: Any,
    inputs: Any = None,
    *,
    num_steps: int | None = None,
    batch: int | None = None,
    base: Account | None = None,
    calibrated: bool = True,
    repeats: int = 5,
    progress: Progress | None = None,
    **changes: Any,
) -> Account:
    """Generate ``num_steps`` tokens per sequence and say where the time went; an Account in ns of one generation.

    Runs with clocks around the model's parts are done in turn with runs that have none: those give the total, and the
    difference is what the clocks cost. Rows: the encoder, the keys and values of cross-attention, the prefill of a
    decoder-only model; then of all steps self-attention, cross-attention, feed-forward, norms, embedding, output layer,
    and the host between steps (sampling, preparing inputs). Companions: time per token, tokens per second, the
    real-time factor of sound, prefill and decode, bytes of weights and cache.

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
        Without a base: also run three settings around this one, which :func:`predict` rests on. Not where the base
        itself is compiled, drafted, without a cache, or a beam search.
    repeats
        Generations of each setting, with and without clocks; the fastest of either counts.
    changes
        Of :class:`Setting`: ``decoder_layers=4``, ``dtype="bfloat16"``. Other sizes are built with random weights.

    Raises
    ------
    ValueError
        When the model cannot generate, or not this way.
    """
    if repeats < 1:
        raise ValueError(f"repeats is at least 1; given: {repeats}")
    given = {name: value for name, value in {"num_steps": num_steps, "batch": batch}.items() if value is not None}
    if not hasattr(model, "generate") and not isinstance(model, torch.nn.Module) and callable(model):
        if base is not None or changes:
            unknown = ", ".join([*changes, *(["base"] if base is not None else [])])
            raise ValueError(
                f"a step(token, cache) function is measured as it is, with num_steps and batch; given: {unknown}; "
                "give a model with generate() for the rest"
            )
        return measure_step(model, inputs, repeats=repeats, progress=progress, **given)
    if base is None:
        setting = setting_of(model, inputs, **given, **changes)
        if setting.hold_parameters == "on":
            raise ValueError("hold_parameters keeps the parameters of a base: give base=, or the layers themselves")
        settings = [setting, *(probes(model, setting) if calibrated and _plain(setting) else ())]
    else:
        known = calibration_of(base, Calibration, "decoder")
        setting = checked(model, known.resolved(known.observed.setting.change(**given, **changes)))
        settings = [known.observed.setting, setting]
    ready = [prepared(model, inputs, setting) for setting in settings]
    with evaluating(*(one.model for one in ready)):
        runs, caches, memory = _run(ready, model.config, repeats, progress)
    if base is not None:
        scale = base.total / runs[0].total_ns
        modelled = sum(rows_ns(known, setting).values())
        moved = replace(known, observed=runs[1], anchor=scale * runs[1].total_ns / modelled)
        return _accounted(runs[1], ready[1], caches[1], scale=scale, calibration=moved)
    found = None
    if len(runs) > 1:
        found = _calibrated(ready[0], runs, memory)
    return _accounted(runs[0], ready[0], caches[0], calibration=found)


def _plain(setting: Setting) -> bool:
    """The costs are those of greedy steps with a cache."""
    return _watchable(setting) and setting.cache == "on" and setting.num_beams == 1


def _watchable(setting: Setting) -> bool:
    """A compiled step has no modules left, and speculation runs two models."""
    return setting.compiled == "off" and not setting.num_draft


def _run(
    ready: Sequence[Ready], config: Any, repeats: int, progress: Progress | None
) -> tuple[list[Run], list[CacheBytes | None], Memory]:
    """Every setting ``repeats`` times, in turn, with clocks inside and without; the cache that each leaves; and the
    memory of such models. ``config`` is that of the model that was given."""
    turns = [number for _ in range(repeats) for number in range(len(ready))]
    done, total = 0, len(ready) + len(turns)

    def told() -> None:
        nonlocal done
        done += 1
        tell(progress, done, total)

    caches: list[CacheBytes | None] = []
    prompts = []
    for one in ready:  # untimed: memory is laid out, code is loaded (or compiled)
        output = one.call()
        # what speculation leaves is cropped, and not handed out: not visible
        caches.append(None if one.setting.num_draft else in_cache(getattr(output, "past_key_values", None)))
        made = output.sequences.shape[1] if hasattr(output, "sequences") else 0
        prompts.append(max(1, made - one.setting.num_steps))
        told()
    memory = _memory(ready[0], config, caches[0], prompts[0])
    watched: list[list[Watched]] = [[] for _ in ready]
    plain: list[list[int]] = [[] for _ in ready]
    for number in turns:
        one, first = ready[number], len(plain[number]) % 2  # which of the two comes first takes turns
        for inside in (first, 1 - first):
            if not inside:
                plain[number].append(elapsed_ns(one.call))
            elif _watchable(one.setting):
                watched[number].append(watch(one.model, one.call))
        told()
    return (
        [
            Run(one.setting, tuple(seen), tuple(times), memory.step_size(one.setting))
            for one, seen, times in zip(ready, watched, plain, strict=True)
        ],
        caches,
        memory,
    )


def _memory(one: Ready, config: Any, cache: CacheBytes | None, prompt_cells: int) -> Memory:
    setting = one.setting
    run = configurations.changed(one.model.config, decoder_layers=setting.depth)
    per_cell = kv_cache_bytes(run, setting.rows, 0, encoder_cells=1, dtype=setting.dtype).cross_attention
    cells = cache.cross_attention // per_cell if cache and per_cell else 0
    halved = halvings(setting.input_length, cells) if cells else None
    # a copy: exit_layer changes the live one while it runs
    return Memory(type(one.model), copy.deepcopy(config), prompt_cells, halved)


def _calibrated(one: Ready, runs: Sequence[Run], memory: Memory) -> Calibration:
    counter = Launches()
    with counter:
        counted = watch(one.model, one.call, counter)
    step_bytes = runs[0].step.read_bytes
    shape = (one.setting.width, configurations.sizes(one.model.config).ffn)
    parameter = next(one.model.parameters())
    return calibrate(
        runs, memory, _seconds_per_cell(one.model), dict(counted.steps.iloc[-1]),
        reading_rate(step_bytes, parameter.dtype, parameter.device),
        {name: product_cost(*shape, step_bytes, getattr(torch, name), parameter.device) for name in DTYPES},
        caches(*shape, parameter.dtype, parameter.device),
    )  # fmt: skip


def _seconds_per_cell(model: Any) -> float | None:
    return _FRAME_SECONDS if model.main_input_name == "input_features" else None


def _accounted(
    run: Run, one: Ready, cache: CacheBytes | None, *, scale: float = 1.0, calibration: Calibration | None = None
) -> Account:
    rows, phases = accounting.measured_rows(run)
    overhead = f"; clocks inside cost {overhead_frac([run]):+.1%}" if run.watched else ""
    return accounting.generation_account(
        {row: scale * value for row, value in rows.items()}, {row: scale * value for row, value in phases.items()},
        run.setting, total_ns=scale * run.total_ns, weight_bytes=in_weights(one.model), cache=cache,
        seconds_per_cell=_seconds_per_cell(one.model), calibration=calibration or Observed(run),
        source=f"the wall clock of {len(run.plain_ns)} generations without clocks inside{overhead}"
        + ("; relative to the base measured in turn" if scale != 1.0 else ""),
    )  # fmt: skip
