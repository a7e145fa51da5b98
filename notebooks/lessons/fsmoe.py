"""FSMoE (arXiv 2501.10714) recounted: its Table 2, and the pipelining degrees of its 1458 layers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from lessons.pipelining_degree import LayerCosts, Task, best_degree, binding, exhaustive_degree, pipelined_ns

_NS_PER_MS, _VALUE_BYTES, _TOP_K = 1e6, 4, 2  # FSMoE: float32, two experts a token

# Start-up [ms] and time per byte or FLOP [ms], by task. "authors": what the authors' scheduler is set to
# (github.com/xpan413/FSMoE, tools/optim.py), there per value of 4 bytes and per multiply-add. "testbed B": FSMoE
# (arXiv 2501.10714), Figure 5; experts assumed as fast as that scheduler has attention at length 512 (11.5 TFLOP/s, of
# 13.4 that a 2080 Ti has), all-reduce assumed as with the authors.
COEFFICIENTS_MS: Mapping[str, Mapping[str, tuple[float, float]]] = {
    "testbed B": {
        "all_to_all": (1.75e-1, 3.06e-7),
        "all_gather": (3.20e-2, 1.68e-7),
        "reduce_scatter": (3.91e-2, 1.67e-7),
        "experts": (0.7674542565, 1.7435315251e-10 / 2),
        "all_reduce": (3.4099276392e-01, 3.4950701465e-06 / 4),
    },
    "authors": {
        "all_to_all": (2.3515350484e-01, 1.8543323833e-06 / 4),
        "all_gather": (0.0549, 6.72388e-7 / 4),
        "reduce_scatter": (0.0688, 6.70433e-7 / 4),
        "experts": (5.9194353200e-01, 5.6847387697e-11 / 2),
        "all_reduce": (3.4099276392e-01, 3.4950701465e-06 / 4),
    },
}
NUM_SHARING = {"testbed B": 4, "authors": 8}  # ranks that share a node's tokens and experts: GPUs of a node

# FSMoE, Table 2, Testbed B, forward communication of one layer [ms]: k = 2, f = 1.2, B = 4, L = 1024; hidden size
TABLE2_MS: Mapping[str, tuple[int, Mapping[str, float]]] = {
    "GPT2-XL": (1600, {"all_to_all": 11.2, "all_gather": 15.5, "reduce_scatter": 15.7}),
    "Mixtral-7B": (4096, {"all_to_all": 28.3, "all_gather": 39.6, "reduce_scatter": 40.8}),
}
_BATCH, _LENGTH, _FACTOR = 4, 1024, 1.2

# FSMoE: of 1458 layers, those whose best degrees of forward and backward differ; 8 nodes of 4 GPUs, and the gradients'
# all-reduce in the backward pass
PUBLISHED_DIFFERING = 912
LAYERS: Mapping[str, tuple[float, ...]] = {
    "batch": (1, 2, 4),
    "length": (256, 512, 1024),
    "hidden": (1024, 2048, 4096),
    "ffn_per_hidden": (2, 3, 4),
    "num_heads": (8, 16, 32),
    "capacity_factor": (1.2, 2.4, 0.0),
    "num_gemms": (2, 3),
}
_ASSUMED = (
    "batch, hidden, ffn_per_hidden, num_heads and capacity_factor: plausible values, not those of the paper's Table 4",
    "GPUs of a node: 8 with the authors' coefficients; the paper's count is of 8 nodes of 4",
    "length: those that the authors' scheduler has a fit for",
    "capacity_factor 0, no token dropped: travels as a balanced load, factor 1",
    "backward: experts twice as long, messages as forward, as in the authors' scheduler",
)


def fsmoe_table2(
    published_ms: Mapping[str, tuple[int, Mapping[str, float]]] = TABLE2_MS,
    coefficients_ms: Mapping[str, tuple[float, float]] = COEFFICIENTS_MS["testbed B"],
    num_sharing: int = NUM_SHARING["testbed B"],
) -> pd.DataFrame:
    """FSMoE's Table 2, Testbed B: forward communication of one layer, from alpha and beta of its Figure 5.

    A node's ``num_sharing`` GPUs hold B L tokens of M float32 together, a part each (their tensor-parallel group). Of
    k f B L M x 4 routed bytes

    * each GPU sends its part, 1 / num_sharing, by all-to-all: two, dispatch and combine;
    * each GPU gathers all, since every expert is cut over the node; and once more B L M x 4 bytes for attention, which
      is cut over the same GPUs. Two all-gathers, and two reduce-scatters back.

    The same sizes stand in the authors' scheduler (get_optimal_degree, measure_others). All six cells come out low,
    both of all-to-all by a ninth: not the sizes, but a table slower than its figure.

    Parameters
    ----------
    published_ms
        Model -> hidden size, and milliseconds by task; other cells of the same shape (Testbed A) go here.
    coefficients_ms
        Task -> alpha [ms], beta [ms per byte].
    num_sharing
        GPUs of a node.

    Returns
    -------
    Indexed by ``model`` and ``task``: ``num_calls``, ``size_bytes`` over these calls, ``predicted_ns``,
    ``published_ns``, ``error`` (relative); ``slope_ratio``, time per byte between the table's smallest and largest
    layer over beta: 1 where both agree, 0.1 where a coefficient is ten times too large; NaN with one layer.
    """
    rows = []
    for model, (hidden, cells) in published_ms.items():
        tokens_bytes = _BATCH * _LENGTH * hidden * _VALUE_BYTES
        routed_bytes = round(_TOP_K * _FACTOR * tokens_bytes)
        for task, cell_ms in cells.items():
            size_bytes = 2 * routed_bytes / num_sharing if task == "all_to_all" else routed_bytes + tokens_bytes
            alpha_ms, beta_ms = coefficients_ms[task]
            predicted_ns = (2 * alpha_ms + size_bytes * beta_ms) * _NS_PER_MS
            rows.append((model, task, 2, size_bytes, predicted_ns, cell_ms * _NS_PER_MS))
    columns = ["model", "task", "num_calls", "size_bytes", "predicted_ns", "published_ns"]
    table = pd.DataFrame(rows, columns=columns)
    table["error"] = table["predicted_ns"] / table["published_ns"] - 1
    for task, cells in table.groupby("task"):
        least, most = cells.loc[cells["size_bytes"].idxmin()], cells.loc[cells["size_bytes"].idxmax()]
        size_bytes, dur_ns = (most[name] - least[name] for name in ("size_bytes", "published_ns"))
        beta_ns = coefficients_ms[str(task)][1] * _NS_PER_MS
        table.loc[cells.index, "slope_ratio"] = dur_ns / size_bytes / beta_ns if size_bytes else math.nan
    table = table.set_index(["model", "task"])
    table.attrs["source"] = "FSMoE, arXiv 2501.10714, Table 2 and Figure 5, Testbed B"
    return table


def fsmoe_costs(layer: Mapping[str, float], coefficients: str = "authors") -> LayerCosts:
    """Forward pass of one layer of :func:`fsmoe_grid`, by the sizes of the authors' scheduler.

    k f B L M x 4 bytes are gathered and scattered within a node; each of its N GPUs sends 1 / N of them and computes
    GEMMs x 2 x k f B L M H / N FLOP. Heads play no part: a count over the grid is a multiple of 3, as 912 is.

    Raises
    ------
    ValueError
        When ``coefficients`` is no key of ``COEFFICIENTS_MS``.
    """
    if coefficients not in COEFFICIENTS_MS:
        raise ValueError(f"coefficients is {coefficients!r}, expected one of {list(COEFFICIENTS_MS)}; choose one.")
    num_sharing = NUM_SHARING[coefficients]
    values = _TOP_K * (layer["capacity_factor"] or 1.0) * layer["batch"] * layer["length"] * layer["hidden"]
    flops = layer["num_gemms"] * 2 * values * layer["ffn_per_hidden"] * layer["hidden"] / num_sharing

    def task(name: str, size: float) -> Task:
        alpha_ms, beta_ms = COEFFICIENTS_MS[coefficients][name]
        return Task(alpha_ms * _NS_PER_MS, beta_ms * _NS_PER_MS, size)

    exchange = task("all_to_all", values * _VALUE_BYTES / num_sharing)
    gather, scatter = (task(name, values * _VALUE_BYTES) for name in ("all_gather", "reduce_scatter"))
    return LayerCosts(exchange, task("experts", flops), exchange, gather, scatter)


def fsmoe_grid(
    *, coefficients: str = "authors", max_degree: int = 8, allowed: Sequence[int] | None = None, gradient: bool = False
) -> pd.DataFrame:
    """FSMoE's 1458 = 3^6 x 2 layers: the best degree of forward and backward, by the scheduler and by running them all.

    Most values are assumed, as ``attrs["assumed"]`` lists them.

    Parameters
    ----------
    coefficients
        A key of ``COEFFICIENTS_MS``, of which ``"testbed B"`` is partly assumed.
    max_degree, allowed
        As for :func:`~lessons.pipelining_degree.best_degree`; the authors' scheduler allows 1, 2, 4, 8.
    gradient
        Also reduce the attention's gradient, 4 M^2 / N values, between nodes during the backward pass.

    Returns
    -------
    A row per layer: its sizes; for ``forward`` and ``backward`` the columns ``_degree``, ``_exhaustive_degree``,
    ``_dur_ns``, ``_regret_frac`` (beyond the exhaustive best), ``_binds``; ``differ``, whether the two degrees do. In
    ``attrs``: ``published`` and ``recomputed``, the number that differ, ``error`` (relative), ``source``, ``assumed``.
    Raises ValueError when ``coefficients`` is unknown or no degree is left.
    """
    degrees = [degree for degree in allowed or range(1, max_degree + 1) if degree <= max_degree]
    rows = []
    for sizes in itertools.product(*LAYERS.values()):
        layer = dict(zip(LAYERS, sizes, strict=True))
        forward = fsmoe_costs(layer, coefficients)
        alpha_ms, beta_ms = COEFFICIENTS_MS[coefficients]["all_reduce"]
        reduced_bytes = 4 * layer["hidden"] ** 2 / NUM_SHARING[coefficients] * _VALUE_BYTES
        reduced_ns = (alpha_ms + beta_ms * reduced_bytes) * _NS_PER_MS if gradient else 0.0
        row: dict[str, float | str] = {**layer}
        for name, costs in (("forward", forward), ("backward", forward.backward(reduced_ns))):
            degree, best = best_degree(costs, max_degree, allowed=allowed), exhaustive_degree(costs, degrees)
            row[f"{name}_degree"], row[f"{name}_exhaustive_degree"] = degree, best
            row[f"{name}_dur_ns"] = pipelined_ns(costs, degree)
            row[f"{name}_regret_frac"] = pipelined_ns(costs, degree) / pipelined_ns(costs, best) - 1
            row[f"{name}_binds"] = binding(costs, degree)
        rows.append(row)
    table = pd.DataFrame(rows)
    table["differ"] = table["forward_degree"] != table["backward_degree"]
    recomputed = int(table["differ"].sum())
    table.attrs = {
        "published": PUBLISHED_DIFFERING,
        "recomputed": recomputed,
        "error": recomputed / PUBLISHED_DIFFERING - 1,
        "source": "FSMoE, arXiv 2501.10714; github.com/xpan413/FSMoE, tools/optim.py",
        "assumed": _ASSUMED,
    }
    return table
