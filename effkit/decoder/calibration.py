"""The few short runs that a prediction rests on, and what they cover."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from effkit.decoder import configurations
from effkit.decoder.costs import Costs, Run, fit
from effkit.decoder.memory import Memory, in_weights
from effkit.decoder.product_costs import Caches, ProductCost
from effkit.decoder.setting import Setting
from effkit.lab import Trust, rms

_LARGE_BATCH, _MIDDLE_BATCH = 32, 8
_FEW_STEPS = 8
_DEEP = 12  # from so many layers on, the other depth is a smaller one
_TOO_LARGE_BYTES = 2**31  # of weights: no deeper model is built then
# Knobs whose effect no probe has shown
_UNSEEN: Mapping[str, Any] = {"cache": "on", "num_beams": 1, "compiled": "off", "num_draft": 0, "weight_bits": 0}
_RANGES = ("encoder_layers", "decoder_layers", "batch", "num_steps", "input_length")
_LEAST_NOISE, _LEAST_ERROR = 0.02, 0.04  # four runs fit their own costs more closely than any others


@dataclass(frozen=True, eq=False)
class Observed:
    """The generation that an account was measured from."""

    observed: Run


@dataclass(frozen=True, eq=False)
class Calibration(Observed):
    """What a measurement found, and all that :func:`effkit.decoder.predict` needs.

    Attributes
    ----------
    observed
        The generation that the account was measured from: the first of ``runs``, unless it was measured with a base.
    runs
        Those that the costs were fitted on: the base first, then the probes; at most four settings.
    costs
        Costs of all parts, through these runs.
    memory
        Bytes at any setting.
    seconds_per_cell
        Of sound, per cell of the input; None where the input is no sound.
    anchor
        Measured over modelled time of what was observed.
    error_frac
        Root mean square error of the fit on its own runs, relative to the base.
    noise_frac
        Spread of a run's repetitions, halved.
    launches
        Part -> operators that one step launches, views not counted.
    read_bytes_per_s
        Highest rate at which this device reads weights of this size.
    products
        Data type -> what a weight costs in products on this device.
    """

    runs: tuple[Run, ...]
    costs: Costs
    memory: Memory
    seconds_per_cell: float | None
    anchor: float
    error_frac: float
    noise_frac: float
    launches: Mapping[str, int]
    read_bytes_per_s: float
    products: Mapping[str, ProductCost]

    @property
    def setting(self) -> Setting:
        """The calibrated setting, which the costs belong to."""
        return self.runs[0].setting

    @property
    def overhead_frac(self) -> float:
        """What the clocks inside cost: watched over plain time, pair by pair, minus 1."""
        return overhead_frac(self.runs)

    @property
    def band_frac(self) -> float:
        """Half the width of a prediction's band: two standard errors."""
        return Trust(self.error_frac, self.noise_frac, _LEAST_ERROR, _LEAST_NOISE).band_frac

    def resolved(self, setting: Setting) -> Setting:
        """With parameters held, the setting with the encoder layers that keep the base's number of them."""
        if setting.hold_parameters == "off":
            return setting
        if not setting.encoder_layers:
            raise ValueError("hold_parameters moves layers to an encoder; this model has none")
        rest = self.observed.setting
        base, now = self.memory.parameters(rest), self.memory.parameters(setting)
        total = base.total(rest.encoder_layers, rest.decoder_layers)
        return replace(setting, encoder_layers=now.encoder_layers_for(total, setting.decoder_layers))

    def covers(self, setting: Setting) -> bool:
        """Whether the setting lies within the probes: its sizes between theirs, its other knobs as they had them."""
        base = self.setting
        for name in _RANGES:
            probed = [getattr(run.setting, name) for run in self.runs]
            value = setting.depth if name == "decoder_layers" else getattr(setting, name)
            least = 1 if name in ("num_steps", "encoder_layers") else min(probed)  # fewer of these are parts of a run
            if not (least <= value <= max(probed) or value == getattr(base, name)):
                return False
        same = ("width", "kv_heads", "dtype")
        return all(getattr(setting, name) == value for name, value in _UNSEEN.items()) and all(
            getattr(setting, name) == getattr(base, name) for name in same
        )


def calibrate(
    runs: Sequence[Run], memory: Memory, seconds_per_cell: float | None, launches: Mapping[str, int],
    read_bytes_per_s: float, products: Mapping[str, ProductCost], caches: Caches,
) -> Calibration:  # fmt: skip
    """Fit the costs; the first run is the base."""
    costs = fit(runs, caches)
    ratios = np.asarray([run.total_ns / sum(costs.rows(run.setting, run.step).values()) for run in runs])
    spread = [np.subtract(*np.percentile(run.plain_ns, [75, 25])) / run.total_ns for run in runs]
    return Calibration(
        runs[0], tuple(runs), costs, memory, seconds_per_cell, anchor=float(ratios[0]),
        error_frac=rms(ratios / ratios[0] - 1), noise_frac=float(np.median(spread)) / 2,
        launches=launches, read_bytes_per_s=read_bytes_per_s, products=products,
    )  # fmt: skip


def overhead_frac(runs: Sequence[Run]) -> float:
    ratios = [w.wall_ns / plain for run in runs for w, plain in zip(run.watched, run.plain_ns, strict=True)]
    return float(np.median(ratios)) - 1


def probes(model: Any, base: Setting) -> list[Setting]:
    """Three settings around the base: a batch of several in a deep decoder, a large one over more steps, and one
    sequence alone in the shallowest decoder, whose weights the caches hold.

    One sequence is another regime than several: matrix times vector. So that its depth is told from the caches, it is
    run at two depths; several, at two batches.
    """
    depth, coded = base.depth, base.encoder_layers
    deep, half, shallow = (3 * depth, max(1, depth // 2), max(1, depth // 4))
    many, few = 3 * coded, min(coded, max(1, coded // 4))
    weights = in_weights(model)
    if depth >= _DEEP or 3 * weights > _TOO_LARGE_BYTES:
        deep, shallow, many = depth, max(1, depth // 8), 9 * coded // 4  # as parameters held would have it
    middle = _MIDDLE_BATCH if base.batch == 1 else 2 * base.batch
    large = max(_LARGE_BATCH, 4 * base.batch)
    length = base.input_length
    return [
        _possible(model, base, batch=middle, decoder_layers=deep, encoder_layers=few, input_length=2 * length,
                  num_steps=max(min(_FEW_STEPS, base.num_steps), base.num_steps // 3)),
        _possible(model, base, batch=large, decoder_layers=half, encoder_layers=few, num_steps=2 * base.num_steps),
        _possible(model, base, batch=1, decoder_layers=shallow, encoder_layers=many, input_length=max(1, length // 2)),
    ]  # fmt: skip


def _possible(model: Any, base: Setting, **changes: Any) -> Setting:
    """The changed setting, with steps and input within the model's positions."""
    setting = replace(base, exit_layer=0, **changes)
    sizes = configurations.sizes(model.config)
    if hasattr(model.config, "num_mel_bins"):  # Whisper: one length of input only
        setting = replace(setting, input_length=base.input_length)
    if (longest := getattr(model.config, "max_source_positions", None)) and base.encoder_layers:
        setting = replace(setting, input_length=min(setting.input_length, max(longest, base.input_length)))
    if sizes.positions is not None:
        if not base.encoder_layers:
            room = max(base.input_length, sizes.positions - base.num_steps)
            setting = replace(setting, input_length=min(setting.input_length, room))
        prompt = 1 if base.encoder_layers else setting.input_length
        setting = replace(setting, num_steps=min(setting.num_steps, sizes.positions - prompt))
    return setting
