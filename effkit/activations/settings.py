"""Settings: the knobs of the lab, and which step a setting means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from effkit.activations.forecasting import Size
from effkit.activations.levers import KNOBS as LEVER_KNOBS
from effkit.activations.levers import Levers
from effkit.lab import asked
from effkit.lab.knobs import checked_share, checked_whole

SIZE_KNOBS = ("batch_size", "length", "keep_frac")
KNOBS = (*SIZE_KNOBS, *LEVER_KNOBS)


def complete(rest: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The setting ``rest`` with these changes, as a full setting.

    Raises
    ------
    ValueError
        For a knob that there is not, or that this model has no use for.
    """
    changes = asked(changes, KNOBS)
    useless = sorted(name for name in ("length", "keep_frac") if name in changes and name not in rest)
    if useless:
        raise ValueError(f"batches of this model have no sequence dimension: leave out {' and '.join(useless)}")
    wanted = {**rest, **changes}
    for name in ("batch_size", "length"):
        if name in wanted:
            wanted[name] = checked_whole(name, wanted[name], 1)
    if "keep_frac" in wanted:
        checked_share("keep_frac", wanted["keep_frac"], positive=True)
    _, levers = parted(wanted)  # the levers check themselves
    if wanted["micro_batches"] > wanted["batch_size"]:
        raise ValueError(
            f"a batch of {wanted['batch_size']} cannot be cut into {wanted['micro_batches']} micro-batches: use fewer"
        )
    return {**wanted, **asdict(levers)}


def parted(setting: Mapping[str, Any]) -> tuple[Size, Levers]:
    """The size of the batch, tokens that are dropped before the first layer left out, and the levers."""
    cells = setting.get("length")
    if cells is not None:
        cells = max(1, round(cells * setting["keep_frac"]))
    return Size(setting["batch_size"], cells), Levers(**{name: setting[name] for name in LEVER_KNOBS})
