"""The decoder lab's rows of the error ledger: generations of a speech encoder-decoder and of a decoder-only model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from ledger_rows import begun, failed, going_on, outside_bars, replace_rows, unheld

import effkit as ek
from effkit import decoder
from effkit.decoder.calibration import overhead_frac
from effkit.device import provenance

# Settings that no calibration sees. Do not tune to them.
SPEECH: tuple[dict[str, Any], ...] = (
    {"decoder_layers": 2, "num_steps": 100},
    {"decoder_layers": 3, "batch": 4, "num_steps": 50},
    {"decoder_layers": 5, "batch": 16, "num_steps": 90},
    {"decoder_layers": 6, "num_steps": 20},
    {"decoder_layers": 6, "batch": 24, "num_steps": 40},
    {"decoder_layers": 10, "batch": 2, "num_steps": 120},
    {"decoder_layers": 12, "batch": 12, "num_steps": 30},
    {"decoder_layers": 14, "num_steps": 70},
    {"decoder_layers": 16, "batch": 32, "num_steps": 20},
    {"decoder_layers": 18, "batch": 3, "num_steps": 40},
    {"decoder_layers": 20, "batch": 8, "num_steps": 60},
    {"decoder_layers": 24, "num_steps": 30},
    {"decoder_layers": 24, "batch": 6, "num_steps": 100},
    {"decoder_layers": 4, "encoder_layers": 16, "batch": 5, "num_steps": 80},
    {"decoder_layers": 2, "encoder_layers": 24, "batch": 10, "num_steps": 25},
    {"decoder_layers": 7, "encoder_layers": 3, "input_length": 650, "batch": 7},
)
TEXT: tuple[dict[str, Any], ...] = (
    {"decoder_layers": 2, "batch": 6, "num_steps": 80},
    {"decoder_layers": 5, "num_steps": 110},
    {"decoder_layers": 10, "batch": 20, "num_steps": 40},
    {"decoder_layers": 16, "batch": 3, "num_steps": 25},
    {"decoder_layers": 22, "num_steps": 60, "input_length": 100},
    {"decoder_layers": 12, "batch": 10, "num_steps": 90, "input_length": 40},
)
# Levers that no calibration run has: outside the calibrated range, with the wider band that goes with it
LEVERS: tuple[dict[str, Any], ...] = (
    {"cache": "off"}, {"num_beams": 4}, {"exit_layer": 3}, {"width": 384}, {"dtype": "bfloat16"},
)  # fmt: skip
SAME = ("Time per token", "Tokens per second", "Real-time factor")
BARS = {"setting": (0.06, 0.18), "lever": (1.0, 1.0)}  # median and worst error of a generation's time
MISSED_FRAC = {"setting": 0.1, "lever": 1.0}  # of the totals, outside their band
SPEED_UP, CLAIM_ERROR = 2.5, 0.10
_ROWS_FRAC, _CLOCKS_FRAC = 0.05, 0.05  # rows against wall time; what the clocks inside cost
_EXPLAINED = (0.8, 1.2)  # operators and framework over the time of a step


def record() -> str:
    """Predict and measure every held-out setting, each in turn with the base; returns what is outside its bar."""
    part = begun("decoder")
    speech = ek.models.speech(encoder_layers=8, decoder_layers=8, hidden=256, heads=4)
    text = ek.models.text(layers=8, hidden=256)
    spoken = decoder.measure(speech, num_steps=60, input_length=400)
    written = decoder.measure(text, num_steps=60, input_length=64)
    broken: list[str] = []
    for name, check in {
        "speech": lambda: _closes("speech", spoken),
        "text": lambda: _closes("text", written),
        "settings": lambda: _receipts(
            part, [(speech, spoken, unheld(SPEECH)), (text, written, unheld(TEXT))], "setting"),
        "levers": lambda: _receipts(part, [(speech, spoken, LEVERS)], "lever"),
        "layers moved": lambda: _claim(part),
    }.items():  # fmt: skip
        with going_on(f"decoder, {name}"):
            broken.append(check())
    replace_rows("decoder", part)
    return "; ".join(filter(None, [*broken, *failed()]))


def _closes(name: str, base: ek.Account) -> str:
    rows, clocks = base.residual / base.total, np.median([overhead_frac(run) for run in base.calibration.runs])
    print(base, f"rows against wall time {rows:+.1%}, clocks inside {clocks:+.1%}", sep="\n", flush=True)
    floors = decoder.roofline(base)
    beaten, explained = floors["reached_frac"].max(), floors.loc["step", "explained_frac"]
    print(floors[["time_ns", "floor_ns", "operators_ns", "framework_ns", "explained_frac"]], flush=True)
    within = _EXPLAINED[0] <= explained <= _EXPLAINED[1]
    if abs(rows) > _ROWS_FRAC or clocks > _CLOCKS_FRAC or beaten > 1 or not within:
        return (f"decoder, {name}: rows {rows:+.1%}, clocks {clocks:+.1%}, a part reaches {beaten:.0%} of its floor, "
                f"operators and framework are {explained:.0%} of the step")  # fmt: skip
    return ""


def _receipts(part: Any, labs: list[tuple[Any, ek.Account, Sequence[dict[str, Any]]]], knob: str) -> str:
    receipts = []
    for model, base, settings in labs:
        for setting in settings:
            with going_on(f"decoder, {_named(base)}, {setting}"):
                receipt = _receipt(base, setting, decoder.measure(model, base=base, repeats=3, **setting))
                receipt.append_to(part, lab="decoder", model=_named(base), knob=knob)
                print(setting, f"{receipt.error:+.1%}", receipt.within_band, flush=True)
                receipts.append(receipt)
    return outside_bars("decoder", knob, receipts, BARS[knob], MISSED_FRAC[knob])


def _receipt(base: ek.Account, setting: dict[str, Any], measured: ek.Account) -> ek.Receipt:
    """Without the companions that say the time once more, in other units."""
    guess, truth = (
        one.with_companions(*(other for other in one.companions if other.title not in SAME))
        for one in (decoder.predict(base, **setting), measured)
    )
    return ek.Receipt(guess, truth, setting=setting, provenance=provenance())


def _named(base: ek.Account) -> str:
    setting = base.setting
    layers = f"{setting['encoder_layers']}/{setting['decoder_layers']}" if setting["encoder_layers"] else (
        f"{setting['decoder_layers']}")  # fmt: skip
    return f"{'speech' if setting['encoder_layers'] else 'text'}, {layers} layers, width {setting['width']}"


def _claim(part: Any) -> str:
    """24/24 to 32/4 layers, and to 4 decoder layers at equal parameters, at batch 1: arXiv 2503.05931."""
    model = ek.models.speech(encoder_layers=24, decoder_layers=24, hidden=128)
    base = decoder.measure(model, num_steps=60, input_length=400)
    missed = []
    for moved in ({"encoder_layers": 32, "decoder_layers": 4}, {"decoder_layers": 4, "hold_parameters": "on"}):
        receipt = _receipt(base, moved, decoder.measure(model, base=base, **moved))
        receipt.append_to(part, lab="decoder", model=_named(base), knob="layers moved")
        speed_up = base.total / receipt.measured.total
        split = f"24/24 -> {receipt.measured.setting['encoder_layers']}/4"
        print(receipt, f"{split}: {speed_up:.2f} times as fast", sep="\n", flush=True)
        if speed_up < SPEED_UP or abs(receipt.error) > CLAIM_ERROR:
            missed.append(f"{split}: {speed_up:.2f} times as fast, predicted with an error of {receipt.error:+.1%}")
    return "; ".join(missed)
