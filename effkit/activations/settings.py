"""Settings: the knobs of the lab, and which step a setting means."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effkit.activations.forecasting import Size
from effkit.activations.levers import KNOBS as LEVER_KNOBS
from effkit.activations.levers import Levers

SIZE_KNOBS = ("batch_size", "length", "keep_frac")
KNOBS = (*SIZE_KNOBS, *LEVER_KNOBS)


def complete(rest: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The setting ``rest`` with these changes, as a full setting.

    Raises
    ------
    ValueError
        For a knob that there is not, or that this model has no use for.
    """
    unknown = set(changes) - set(KNOBS)
    if unknown:
        raise ValueError(f"no such knob: {', '.join(sorted(unknown))}; the knobs are {', '.join(KNOBS)}")
    useless = sorted(name for name in ("length", "keep_frac") if changes.get(name) is not None and name not in rest)
    if useless:
        raise ValueError(f"batches of this model have no sequence dimension: leave out {' and '.join(useless)}")
    wanted = {**rest, **{name: value for name, value in changes.items() if value is not None}}
    for name in ("batch_size", "length"):
        if name in wanted and (not isinstance(wanted[name], int) or wanted[name] < 1):
            raise ValueError(f"{name} is a whole number from 1 on; given: {wanted[name]!r}")
    if not 0 < wanted.get("keep_frac", 1.0) <= 1:
        raise ValueError(f"keep_frac is a share in (0, 1]; given: {wanted['keep_frac']!r}")
    if wanted["micro_batches"] > wanted["batch_size"]:
        raise ValueError(
            f"a batch of {wanted['batch_size']} cannot be cut into {wanted['micro_batches']} micro-batches: use fewer"
        )
    parted(wanted)  # the levers check themselves
    return wanted


def parted(setting: Mapping[str, Any]) -> tuple[Size, Levers]:
    """The size of the batch, tokens that are dropped before the first layer left out, and the levers."""
    cells = setting.get("length")
    if cells is not None:
        cells = max(1, round(cells * setting["keep_frac"]))
    return Size(setting["batch_size"], cells), Levers(**{name: setting[name] for name in LEVER_KNOBS})
