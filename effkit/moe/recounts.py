"""Published figures of expert-parallel layers, recounted from their inputs: FSMoE, LSH-MoE, Parallel Folding."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pandas as pd

from effkit.datasheets import DATASHEETS
from effkit.moe.degrees import LayerCosts, Task, best_degree, binding, exhaustive_degree, pipelined_ns

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

PUBLISHED_DIFFERING = 912  # FSMoE: of 1458 layers, those whose best degrees of forward and backward differ
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
    "batch, hidden, ffn_per_hidden, num_heads and capacity_factor: plausible, the paper's table was not at hand",
    "length: those that the authors' scheduler has a fit for",
    "capacity_factor 0, no token dropped: travels as a balanced load, factor 1",
    "backward: experts twice as long, messages as forward, as in the authors' scheduler",
)

# LSH-MoE (arXiv 2411.08446): share of all-to-all in a step, fraction of its bytes still sent, published speed-up
LSH: Mapping[str, tuple[float, float, float]] = {
    "GPT": (0.30, 0.20, 1.3),
    "RoBERTa": (0.40, 0.20, 1.6),
    "Swin": (0.70, 0.117, 1.28),
}
# Parallel Folding (arXiv 2504.14960), Mixtral 8x22B on H100: TFLOP/s per GPU, and MFU where the abstract prints it
FOLDING_TFLOPS = {"Megatron Core": (458.3, None), "Megatron Core with folding": (487.7, 0.493)}


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
        As for :func:`degrees.best_degree`; the authors' scheduler allows 1, 2, 4, 8.
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


def fsmoe_differing(max_degree: int = 8) -> pd.DataFrame:
    """On how many of the 1458 layers the best degrees of forward and backward differ, against 912 published.

    The count hangs on what the paper leaves open, so that all combinations are shown. Indexed by ``coefficients``,
    ``degrees`` (``any``, or ``powers of two`` as the authors' scheduler allows) and ``gradient``: ``published``,
    ``recomputed``, ``error``, ``regret_frac`` (the scheduler's largest, over both directions).
    """
    powers = [2**i for i in range(max_degree.bit_length()) if 2**i <= max_degree]
    rows = {}
    for name, (degrees, allowed), gradient in itertools.product(
        COEFFICIENTS_MS, (("any", None), ("powers of two", powers)), (False, True)
    ):
        table = fsmoe_grid(coefficients=name, max_degree=max_degree, allowed=allowed, gradient=gradient)
        regret = float(table[["forward_regret_frac", "backward_regret_frac"]].max().max())
        figures = {key: table.attrs[key] for key in ("published", "recomputed", "error")}
        rows[name, degrees, gradient] = figures | {"regret_frac": regret}
    table = pd.DataFrame.from_dict(rows, orient="index").astype({"published": int, "recomputed": int})
    table.index = pd.MultiIndex.from_tuples(list(rows), names=["coefficients", "degrees", "gradient"])
    table.attrs["assumed"] = _ASSUMED
    return table


def lsh_moe() -> pd.DataFrame:
    """LSH-MoE's speed-ups beside 1 / (1 - p + p c), when nothing but the exchange shrinks (Amdahl's law).

    Indexed by model: ``share_frac`` p, ``sent_frac`` c, ``published``, ``recomputed`` and ``error`` (relative);
    ``limit``, the speed-up were nothing sent at all; ``implied_sent_frac``, the c that the published speed-up needs.
    GPT closes. RoBERTa needs a c near 0.06: more than bytes shrank, perhaps the experts' work. Swin stays at half of
    what its share and compression allow: hashing has its price, or the share is of another set-up.
    """
    table = pd.DataFrame.from_dict(LSH, orient="index", columns=["share_frac", "sent_frac", "published"])
    share, sent = table["share_frac"], table["sent_frac"]
    table["recomputed"] = 1 / (1 - share + share * sent)
    table["error"] = table["recomputed"] / table["published"] - 1
    table["limit"] = 1 / (1 - share)
    table["implied_sent_frac"] = (1 / table["published"] - (1 - share)) / share
    table.attrs["source"] = "LSH-MoE, arXiv 2411.08446"
    return table.rename_axis("model")


def all_to_all_per_compute(
    flops_per_s: float,
    bandwidth_bytes_per_s: float,
    *,
    hidden: int,
    top_k: int,
    num_servers: int,
    bytes_per_value: int = 2,
) -> float:
    """T_a2a / T_compute = FLOPs / (6 B_inter) x k / (1 + 2 k) x (w - 1) / (w h), LSH-MoE (2411.08446), section 2.2.

    Its units, found by deriving it, per token of a training step: a layer computes 8 h^2 FLOP in attention's products
    and 16 h^2 in each of k experts (4 h wide), three times over for forward and backward: 24 h^2 (1 + 2 k). Four
    all-to-alls send k h values each, of which (w - 1) / w leave their server. The quotient of the two times has the
    paper's 6 when B_inter counts **values** per second; from bytes, divide by the size of a value.

    Parameters
    ----------
    flops_per_s, bandwidth_bytes_per_s
        Of one GPU: its rate [FLOP/s], and its share of the network between servers [bytes/s].
    hidden, top_k, num_servers
        h, k and w.
    bytes_per_value
        2 for 16-bit messages.

    Raises
    ------
    ValueError
        When one of them is not positive.
    """
    given = {
        "flops_per_s": flops_per_s, "bandwidth_bytes_per_s": bandwidth_bytes_per_s, "hidden": hidden, "top_k": top_k,
        "num_servers": num_servers, "bytes_per_value": bytes_per_value,
    }  # fmt: skip
    for name, value in given.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}, expected a positive number; give the layer's or the machine's own.")
    values_per_s = bandwidth_bytes_per_s / bytes_per_value
    leaving_frac = (num_servers - 1) / num_servers
    return flops_per_s / (6 * values_per_s) * top_k / (1 + 2 * top_k) * leaving_frac / hidden


def megatron_folding_mfu() -> pd.DataFrame:
    """MFU of Parallel Folding (2504.14960), Mixtral 8x22B: FLOP/s of a GPU over the dense bfloat16 rate of an H100.

    Indexed by set-up: ``flops_per_s`` and ``peak_flops_per_s`` [FLOP/s], ``published`` (NaN where not at hand),
    ``recomputed`` in [0, 1], ``error`` (relative).
    """
    peak = DATASHEETS["H100"].rate_flops_per_s["bfloat16"]
    rows = {name: (tflops * 1e12, peak, published) for name, (tflops, published) in FOLDING_TFLOPS.items()}
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["flops_per_s", "peak_flops_per_s", "published"])
    table = table.astype(float).assign(recomputed=table["flops_per_s"] / table["peak_flops_per_s"])
    table.attrs["source"] = f"Parallel Folding, arXiv 2504.14960; peak: {DATASHEETS['H100'].source}"
    return table.assign(error=table["recomputed"] / table["published"] - 1).rename_axis("setup")
