"""roofline(): every part of a step beside the least time that this device could do it in."""

from __future__ import annotations

import numpy as np
import pandas as pd

from effkit.account import Account
from effkit.decoder.calibration import Calibration
from effkit.decoder.module_roles import CROSS, EMBEDDING, FFN, NORMS, OUTPUT, SELF
from effkit.decoder.module_timers import FRAMEWORK, LAUNCHES, OPERATORS
from effkit.decoder.setting import DTYPES
from effkit.device import Device
from effkit.lab import calibration_of
from effkit.progress_bar import working

READING, ARITHMETIC = "reading", "arithmetic"
_PARTS = (SELF, CROSS, FFN, NORMS, EMBEDDING, OUTPUT)


@working("Measuring the floors of a step")
def roofline(base: Account, device: Device | None = None) -> pd.DataFrame:
    """One step of a measured generation, part by part, beside its floor.

    A part can be no faster than its operators can be launched, its weights, keys and values read, and its products
    computed (Williams et al., CACM 2009, with launches added). What it takes beyond the largest of the three is
    measured too: its operators at their own sizes, run one after another and nothing else, and the code between them,
    run without them. On an accelerator the operators' time is its own, and the host runs ahead of it. Kernels that the
    model launches together, as a CUDA graph, have no floor of launches.

    Parameters
    ----------
    base
        What :func:`measure` returned, with its calibration.
    device
        This machine unless given.

    Returns
    -------
    DataFrame
        Indexed by part, of all layers together, and ``step``, their sum: ``time_ns`` (median over steps), ``launches``,
        ``weight_bytes``, ``kv_bytes``, ``flops``; the floors ``launches_ns, reading_ns, arithmetic_ns``; ``floor_ns``,
        the largest; ``binds``, which that is; ``reached_frac``, floor over time; what was measured apart,
        ``operators_ns`` and ``framework_ns``; ``explained_frac``, those two over time (on an accelerator the larger of
        the operators, and of the host's part, launches and framework).
    """
    calibration, machine = calibration_of(base, Calibration, "decoder"), device or Device.here()
    run, setting, memory = calibration.observed, calibration.setting, calibration.memory
    if run.setting != setting:
        raise ValueError("launches were counted at the calibrated setting: give what measure() returned without base=")
    rate = machine.rate_flops_per_s.get(setting.dtype) or max(machine.rate_flops_per_s.values())
    times = pd.concat([w.steps.iloc[1:] for w in run.watched]).median()
    step_ns = float(sum(times[part] for part in _PARTS))
    parameters, sizes, value_bytes = memory.parameters(setting), memory.sizes(setting), DTYPES[setting.dtype]
    cells = {SELF: run.step.prompt_cells + setting.num_steps / 2, CROSS: memory.encoder_cells(setting.input_length)}
    heads = {SELF: sizes.kv_heads, CROSS: sizes.heads}
    rows = {}
    for part in _PARTS:
        if not times[part]:
            continue
        deep = 1 if part in (EMBEDDING, OUTPUT) else setting.depth
        weights = deep * parameters.of_part.get(part, 0)
        read = cells.get(part, 0.0) * setting.rows * deep * sizes.head_dim
        rows[part] = {
            "time_ns": times[part], "launches": calibration.launches[part], "weight_bytes": weights * value_bytes,
            "kv_bytes": 2 * read * heads.get(part, 0) * value_bytes,
            "flops": 2 * weights * setting.rows + 4 * read * sizes.heads,
            **{f"{kind}_ns": share[part] * step_ns for kind, share in calibration.apart.items()},
        }  # fmt: skip
    frame = pd.DataFrame(rows).T
    frame.loc["step"] = frame.sum()
    frame[f"{LAUNCHES}_ns"] = frame["launches"] * machine.launch_overhead_ns
    frame[f"{READING}_ns"] = (frame["weight_bytes"] + frame["kv_bytes"]) / calibration.read_bytes_per_s * 1e9
    frame[f"{ARITHMETIC}_ns"] = frame["flops"] / rate * 1e9
    floors = frame[[f"{LAUNCHES}_ns", f"{READING}_ns", f"{ARITHMETIC}_ns"]]
    frame["floor_ns"], frame["binds"] = floors.max(axis=1), floors.idxmax(axis=1).str.removesuffix("_ns")
    frame["reached_frac"] = frame["floor_ns"] / frame["time_ns"]
    operators_ns, framework_ns = frame[f"{OPERATORS}_ns"], frame[f"{FRAMEWORK}_ns"]
    host_ns = framework_ns + (operators_ns if machine.kind == "cpu" else frame[f"{LAUNCHES}_ns"])
    frame["explained_frac"] = np.maximum(operators_ns, host_ns) / frame["time_ns"]
    whole = [name for name in frame.columns if name != "binds" and not name.endswith("_frac")]
    return frame.round(dict.fromkeys(whole, 0)).rename_axis("part")
