"""The activation lab's rows of the error ledger: peak memory and time of steps at other sizes and with levers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any

import pandas as pd
import torch
from ledger_rows import begun, failed, going_on, replace_rows

import effkit as ek
from effkit import activations
from effkit.activations.gradients import NOISE
from effkit.activations.on_ranks import TIME
from effkit.activations.timeline import PEAK
from effkit.device import provenance
from lessons import small_models, spiking

# Configuration and the (batch size, length) that is measured, on a CPU and on a GPU.
_SMALL, _LARGE = {"layers": 2, "hidden": 128}, {"layers": 12, "hidden": 768, "heads": 12}
_LAYERS = ("encoder_layers", "decoder_layers")
MODELS: Mapping[str, tuple[tuple[dict[str, Any], tuple[int, ...]], tuple[dict[str, Any], tuple[int, ...]]]] = {
    "gpt": ((_SMALL, (8, 96)), (_LARGE, (8, 480))),
    "text": ((_SMALL, (8, 96)), (_LARGE, (8, 480))),
    "speech": (
        (dict.fromkeys(_LAYERS, 2), (8, 240)),
        ({"hidden": 512, "heads": 8} | dict.fromkeys(_LAYERS, 6), (16, 960)),
    ),
    "vision": ((_SMALL, (16,)), (_LARGE | {"image": 224, "patch": 16}, (32,))),
}

# Settings that no calibration sees. Do not tune to them. Batch size and length are multiples of the measured ones.
HELD_OUT = {
    "size": (
        {"batch_size": 1.625},
        {"batch_size": 0.625, "length": 1.45},
        {"batch_size": 2.875, "length": 0.7},
    ),
    "one lever": (
        {"checkpoint_every": 2},
        {"micro_batches": 3},
        {"offload_frac": 0.5},
        {"compress": "fp8_e4m3", "group": 64},
    ),
    "several levers": (
        {"checkpoint_every": 1, "micro_batches": 2},
        {"checkpoint_every": 2, "compress": "int8"},
        {"checkpoint_every": 1, "keep": "matmul", "autocast": "bfloat16"},
        {"offload_frac": 0.5, "micro_batches": 4},
        {"compress": "int8", "autocast": "bfloat16", "optimizer_states": "int8"},
        {"checkpoint_every": 1, "micro_batches": 2, "optimizer_states": "fp8_e4m3"},
    ),
    "size and levers": (
        {"batch_size": 1.625, "length": 0.7, "checkpoint_every": 1},
        {"batch_size": 2.875, "micro_batches": 4, "optimizer_states": "int8"},
        {"batch_size": 0.625, "compress": "int8", "autocast": "bfloat16"},
    ),
}
ROUNDS = 5  # of steps at all settings
REPEATS = 7  # of the steps that calibrate: what they were disturbed by is in every prediction

# Architectures of which each size is forecast before anything of it is run: name, configuration on a CPU, on a GPU,
# the size of the example.
_WIDE, _DROPPING = {"hidden": 512, "heads": 8}, {"attention": "eager", "dropout": 0.1}
ARCHITECTURES: Sequence[tuple[str, dict[str, Any], dict[str, Any], tuple[int, ...]]] = (
    ("gpt", {"layers": 2}, _WIDE, (6, 80)),
    ("gpt", {"layers": 2} | _DROPPING, _WIDE | _DROPPING, (6, 80)),
    ("text", {"layers": 2, "kv_heads": 2}, _WIDE | {"kv_heads": 2}, (6, 80)),
    ("vision", {"layers": 2, "image": 48}, _WIDE | {"image": 96}, (6,)),
    ("speech", dict.fromkeys(_LAYERS, 2), _WIDE, (6, 200)),
    ("convolutional", {}, {"width": 128}, (6,)),
    ("recurrent", {}, {"hidden": 512}, (6, 40)),
    ("spiking", {}, {"hidden": 2048}, (24,)),
    ("spiking", {"learning": "bptt"}, {"hidden": 2048, "learning": "bptt"}, (24,)),
)
SIZES = (
    {"batch_size": 1, "length": 1},
    {"batch_size": 0.5, "length": 0.7},
    {"batch_size": 2.5, "length": 1.6},
)  # multiples of the example's

# (quantity, knobs, largest median, largest of all)
BARS = (
    (PEAK, ("architecture",), 0.005, 0.03),
    (PEAK, ("size", "one lever", "several levers", "size and levers"), 0.01, 0.05),
    (TIME, ("several levers", "size and levers"), 0.08, 0.20),
)


def record() -> str:
    """Forecast, predict and measure all of the above; returns what is outside its bar."""
    torch.set_num_threads(1)  # as in the padding lab
    gpu = torch.cuda.is_available()
    part = begun("activations")
    tables = []
    for name, knob, setting, receipt in chain(_forecasts(gpu), _predictions(gpu)):
        receipt.append_to(part, lab="activations", model=name, knob=knob)
        tables.append(receipt.frame.reset_index().assign(knob=knob, at=f"{name} {setting}"))
    replace_rows("activations", part)
    if not tables:
        return "; ".join(failed())
    table = pd.concat(tables).assign(absolute=lambda frame: frame["error"].abs())
    summary = table.groupby(["quantity", "knob"], sort=False)["absolute"].agg(["count", "median", "max"])
    print(summary.to_string(float_format="{:.2%}".format))
    return "\n".join([*_outside(table), *failed()])


def _outside(table: pd.DataFrame) -> Iterator[str]:
    """A sentence for each bar that is missed, naming the settings beyond it."""
    for quantity, knobs, most_median, most in BARS:
        rows = table[(table["quantity"] == quantity) & table["knob"].isin(knobs)]
        median, far = rows["absolute"].median(), rows[rows["absolute"] > most]
        if median > most_median or len(far):
            named = "; ".join(f"{at} {error:+.1%}" for at, error in zip(far["at"], far["error"], strict=True))
            yield (
                f"activations: {quantity} by {', '.join(knobs)}: the bar is a median error of {most_median:.1%}, none "
                f"above {most:.0%}; median {median:.1%}, outside: {named or 'the median'}"
            )


Row = tuple[str, str, Mapping[str, Any], ek.Receipt]


def _forecasts(gpu: bool) -> Iterator[Row]:
    """Peaks of architectures at sizes of which nothing was run; only memory."""
    for name, small, large, usual in ARCHITECTURES:
        with going_on(f"activations, {name}"):
            yield from _forecast(name, large if gpu else small, usual)


def _forecast(name: str, configuration: dict[str, Any], usual: tuple[int, ...]) -> Iterator[Row]:
    model = spiking.build(**configuration) if name == "spiking" else small_models.build(name, **configuration)
    example = model.random_batch(*usual)
    for times in SIZES:
        size = _sized(times, usual)
        label = configuration | size
        with going_on(f"activations, {name}, {label}"):
            make_batch = partial(_made, model)  # the example repeated would keep its number of output tokens
            forecast = activations.forecast(model, example, make_batch=make_batch, **size)
            measured = activations.measure(model, model.random_batch(*size.values()), repeats=1)
            receipt = ek.Receipt(
                forecast, measured, setting=configuration | dict(measured.setting), provenance=provenance()
            )
            print(f"{name} {label}: {receipt}", flush=True)
            yield name, "architecture", label, receipt


def _made(model: Any, *size: int | None) -> Any:
    return model.random_batch(*(dimension for dimension in size if dimension is not None))


def _predictions(gpu: bool) -> Iterator[Row]:
    """Peaks and times at every held-out setting, from one measured account per model."""
    for name, sizes in MODELS.items():
        with going_on(f"activations, {name}"):
            yield from _predicted(name, *sizes[gpu])


def _predicted(name: str, configuration: dict[str, Any], usual: tuple[int, ...]) -> Iterator[Row]:
    model = getattr(ek.models, name)(**configuration)
    batch = model.random_batch(*usual)
    base = activations.measure(model, batch, time_levers=True, repeats=REPEATS)
    held_out = [(knob, setting | _sized(setting, usual)) for knob, group in HELD_OUT.items() for setting in group]
    held_out = [(knob, {k: v for k, v in setting.items() if k in base.setting}) for knob, setting in held_out]
    for knob, setting in held_out:
        with going_on(f"activations, {name}, {setting}"):
            predicted = activations.predict(base, **setting)
            # the noise that a gradient's error is held against is no prediction
            kept = tuple(companion for companion in predicted.companions if companion.title != NOISE)
            predicted = replace(predicted, companions=kept)
            measured = activations.measure(model, batch, base=base, repeats=ROUNDS, **setting)
            receipt = ek.Receipt(predicted, measured, setting=dict(measured.setting), provenance=provenance())
            print(f"{name} {setting}: {receipt}", flush=True)
            yield name, knob, setting, receipt


def _sized(times: Mapping[str, Any], usual: Sequence[int]) -> dict[str, int]:
    """The sizes that these multiples mean, of a model whose usual size has them."""
    names = zip(("batch_size", "length"), usual, strict=False)
    return {name: round(size * times[name]) for name, size in names if name in times}
