"""predict(): a generation that nobody has run; whatif(): the same with sliders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from effkit.account import Account
from effkit.decoder import accounting, configurations
from effkit.decoder.calibration import Calibration, rows_ns
from effkit.decoder.costs import PREFILL, START
from effkit.decoder.module_roles import CROSS_KV, ENCODER
from effkit.decoder.setting import DTYPES, SWITCH
from effkit.lab import Progress, calibration_of

if TYPE_CHECKING:
    import torch

    from effkit.whatif import WhatIf


def predict(base: Account, **setting: Any) -> Account:
    """A generation at another setting, without running anything.

    The sum of the parts' costs, which the runs of the calibration gave, anchored at the base's measured time; weights
    and cache are counted. ValueError for an unknown knob, a value that cannot be, or a base without calibration.

    Parameters
    ----------
    base
        What :func:`measure` returned.
    setting
        Any of :class:`Setting`. The rest stays as it was measured.

    Returns
    -------
    Account
        In ns, with a band; companions as measured ones have, each with its band (bytes are exact). ``in_range`` is
        False where the calibration has seen nothing like it. At the measured setting: ``base`` itself.
    """
    calibration = calibration_of(base, Calibration, "decoder")
    memory, rest = calibration.memory, calibration.observed.setting
    wanted = calibration.resolved(rest.change(**setting))
    if wanted == rest:
        return base
    configurations.check_positions(memory.sizes(wanted), memory.prompt(wanted), wanted.num_steps)
    doublings, seen = calibration.doublings(wanted), calibration.seen(wanted)
    band = calibration.trust.beyond(doublings, seen)
    rows = {row: calibration.anchor * value for row, value in rows_ns(calibration, wanted).items()}
    rows = {row: rows[row] for row in (*accounting.ROWS, *rows) if row in rows}
    total = sum(rows.values())
    first = sum(rows.get(row, 0.0) for row in (ENCODER, CROSS_KV, PREFILL, START))
    if wanted.encoder_layers:  # the first token comes with a step of its own
        first += (total - first) / wanted.num_steps
    runs = [run.setting for run in calibration.runs]
    depths, batches = ([getattr(one, name) for one in runs] for name in ("decoder_layers", "batch"))
    return accounting.generation_account(
        rows, {"prefill": first, "decode": total - first}, wanted, total_ns=total,
        weight_bytes=memory.weight_bytes(wanted), cache=memory.cache(wanted),
        source=f"the parts' costs in {len(runs)} runs ({min(depths)} to {max(depths)} layers, {min(batches)} to "
               f"{max(batches)} sequences)",
        seconds_per_cell=calibration.seconds_per_cell, basis="derived", band_frac=band,
        in_range=seen and not doublings, calibration=calibration,
    )  # fmt: skip


def whatif(base: Account, model: torch.nn.Module | None = None, inputs: Any = None, *, repeats: int = 3) -> WhatIf:
    """Sliders over :func:`predict`; with the live ``model``, the button builds the altered model and runs it.

    Parameters
    ----------
    base
        What :func:`measure` returned.
    model, inputs
        Those that were measured; without the model the button is disabled.
    repeats
        Of the measurement behind the button.
    """
    from effkit.whatif import Choice, Slider, WhatIf

    calibration = calibration_of(base, Calibration, "decoder")
    rest = calibration.observed.setting
    sizes = calibration.memory.sizes(rest)
    coded = rest.encoder_layers > 0
    knobs: list[Slider | Choice] = [
        Slider("decoder_layers", "Decoder layers [count]", 1, max(24, 2 * rest.decoder_layers), 1, "Run per token"),
        *((
            Choice("hold_parameters", "Hold parameters equal", SWITCH, "Layers move from decoder to encoder"),
            Slider("encoder_layers", "Encoder layers [count]", 1, max(32, 2 * rest.encoder_layers), 1,
                   "Run once; with parameters held they follow from the decoder's"),
        ) if coded else ()),
        Slider("width", "Width [values]", sizes.head_dim, 4 * rest.width, sizes.head_dim, "Values per token"),
        Slider("batch", "Batch [sequences]", 1, max(32, 4 * rest.batch), 1, "Generated together"),
        Slider("num_steps", "Tokens [count]", 1, 6 * rest.num_steps, 1, "To generate, per sequence"),
        Slider("input_length", "Input length [cells]", 1, 4 * rest.input_length, 1, "Frames or tokens"),
        Choice("cache", "Key-value cache", SWITCH, "Off: every step computes all positions anew"),
        Choice("dtype", "Data type", tuple(DTYPES), "Of weights and values"),
        Slider("weight_bits", "Weight bits [bits]", 0, 8, 4, "0: as the data type says; predicted only"),
        Choice("compiled", "Compiled steps", SWITCH, "Static cache and torch.compile, or a CUDA graph"),
        Slider("num_beams", "Beams [count]", 1, 8, 1, "1 is greedy"),
        Slider("exit_layer", "Exit after layer [number]", 0, rest.decoder_layers, 1, "0: after the last"),
        *([] if coded else
          [Slider("kv_heads", "Key-value heads [count]", 1, sizes.heads, 1, "Fewer than query heads share them")]),
    ]  # fmt: skip

    def run(progress: Progress, **setting: Any) -> Account:
        from effkit.decoder.live import measure

        return measure(model, inputs, base=base, repeats=repeats, progress=progress, **setting)

    return WhatIf(base, predict, knobs, run if model is not None else None)
