"""DeepEP's low-latency table: two sizes calibrate an alpha and a bandwidth, and the others are predicted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

SOURCE = "DeepEP, github.com/deepseek-ai/DeepEP, docs/legacy.md, 'Low-latency kernels with pure RDMA'"
GPUS_PER_NODE = 8
NIC_BYTES_PER_S = 50e9  # 400 Gb/s, "~50 GB/s maximum bandwidth" in the same document; printed beside what is fitted
NVLINK_BYTES_PER_S = 160e9  # "~160 GB/s NVLink maximum bandwidth" of an H800, same document
NUM_TOKENS, HIDDEN, TOP_K = 128, 7168, 8
# Bytes of one token's message: dispatch in FP8 with a float32 scale per 128 values, combine in BF16
MESSAGE_BYTES = {"dispatch": HIDDEN + HIDDEN // 128 * 4, "combine": HIDDEN * 2}
# Latency [us] by ranks in the expert-parallel group
PUBLISHED_US = {
    "dispatch": {8: 77, 16: 118, 32: 155, 64: 173, 128: 192, 256: 194},
    "combine": {8: 114, 16: 195, 32: 273, 64: 314, 128: 369, 256: 360},
}
_NS_PER_US, _NS_PER_S = 1e3, 1e9


@dataclass(frozen=True)
class Link:
    """``t = alpha_ns + max(bytes over NVLink / its bandwidth, bytes over the NIC / its bandwidth)`` [ns]."""

    alpha_ns: float
    nic_bytes_per_s: float
    nvlink_bytes_per_s: float = NVLINK_BYTES_PER_S

    def dur_ns(self, size_bytes: float, ep: int) -> float:
        """One exchange of ``size_bytes`` per rank among ``ep`` ranks [ns]."""
        nvlink_bytes, nic_bytes = split(size_bytes, ep)
        slower_s = max(nvlink_bytes / self.nvlink_bytes_per_s, nic_bytes / self.nic_bytes_per_s)
        return self.alpha_ns + slower_s * _NS_PER_S


def size_bytes(kind: str) -> int:
    """What a rank sends in one exchange [bytes]: 128 tokens x 8 experts x one message (7.57 MB, 14.68 MB).

    Raises
    ------
    ValueError
        When ``kind`` is neither ``"dispatch"`` nor ``"combine"``.
    """
    if kind not in MESSAGE_BYTES:
        raise ValueError(f"kind is {kind!r}, expected one of {list(MESSAGE_BYTES)}; choose one of them.")
    return NUM_TOKENS * TOP_K * MESSAGE_BYTES[kind]


def split(size_bytes: float, ep: int, node_size: int = GPUS_PER_NODE) -> tuple[float, float]:
    """Bytes of a rank that stay in its node, and bytes that leave it through its NIC: experts are chosen evenly.

    Raises
    ------
    ValueError
        When ``ep`` is not positive, or larger than a node and not a multiple of it.
    """
    if ep < 1 or (ep > node_size and ep % node_size):
        raise ValueError(f"ep is {ep}, expected at most {node_size} ranks or a multiple of it; use whole nodes.")
    inside = size_bytes * min(node_size, ep) / ep
    return inside, size_bytes - inside


def calibrate(kind: str, sizes: Sequence[int] = (16, 32)) -> Link:
    """Alpha and the NIC's bandwidth from two sizes of the published table, NVLink's bandwidth as documented.

    Raises
    ------
    ValueError
        When ``kind`` is unknown, or ``sizes`` are not two different ones of the table beyond a node.
    """
    whole = size_bytes(kind)
    published = PUBLISHED_US[kind]
    usable = [ep for ep in published if ep > GPUS_PER_NODE]
    if len(set(sizes)) != 2 or not set(sizes) <= set(usable):
        raise ValueError(f"sizes is {tuple(sizes)}, expected two different ones of {usable}; calibrate on two of them.")
    few, many = sorted(sizes)
    more_bytes = split(whole, many)[1] - split(whole, few)[1]
    more_ns = (published[many] - published[few]) * _NS_PER_US
    ns_per_byte = more_ns / more_bytes
    alpha_ns = published[few] * _NS_PER_US - split(whole, few)[1] * ns_per_byte
    return Link(alpha_ns, _NS_PER_S / ns_per_byte)


def low_latency_table(sizes: Sequence[int] = (16, 32)) -> pd.DataFrame:
    """DeepEP's low-latency latencies, predicted from two of its sizes.

    128 tokens per rank, hidden 7168, top-8, H800, 8 GPUs and NICs of 400 Gb/s a node. As ``ep`` grows, the share of a
    rank's bytes that leaves its node does, 1 - 8 / ep, and nothing else: latencies saturate. Those of EP 128 and 256
    saturate higher than predicted (most of the error left): more peers cost something too.

    The table's title says "pure RDMA", yet EP 8 is reported faster than a NIC carries its bytes (98 GB/s of 50): what
    stays in the node does not pass the NIC. EP 8 is beyond the calibration, its alpha need not be that of the NIC.

    Parameters
    ----------
    sizes
        The two sizes that calibrate, as for :func:`calibrate`.

    Returns
    -------
    A row per ``kind`` and ``ep``: ``nvlink_bytes``, ``nic_bytes`` of a rank; ``binds`` (``"nvlink"`` or ``"nic"``);
    ``predicted_ns``, ``published_ns``, ``error`` (relative); ``calibrated``, whether the row was used; ``in_range``,
    whether it goes over the link that was calibrated. ``attrs["links"]``: per kind ``alpha_ns``, ``nic_bytes_per_s``,
    ``nvlink_bytes_per_s``, each with its basis; ``attrs["mean_error"]``: mean absolute error of the rows in range that
    were not used.

    Raises
    ------
    ValueError
        As :func:`calibrate`.
    """
    rows, links = [], {}
    for kind, published in PUBLISHED_US.items():
        link = calibrate(kind, sizes)
        links[kind] = {
            "alpha_ns": (link.alpha_ns, f"fitted on EP {sizes[0]} and {sizes[1]}"),
            "nic_bytes_per_s": (link.nic_bytes_per_s, f"fitted on EP {sizes[0]} and {sizes[1]}"),
            "nvlink_bytes_per_s": (link.nvlink_bytes_per_s, f"documented: {SOURCE}"),
        }
        for ep, latency_us in published.items():
            nvlink_bytes, nic_bytes = split(size_bytes(kind), ep)
            over_nic = nic_bytes / link.nic_bytes_per_s >= nvlink_bytes / link.nvlink_bytes_per_s
            rows.append(
                {
                    "kind": kind,
                    "ep": ep,
                    "nvlink_bytes": round(nvlink_bytes),
                    "nic_bytes": round(nic_bytes),
                    "binds": "nic" if over_nic else "nvlink",
                    "predicted_ns": link.dur_ns(size_bytes(kind), ep),
                    "published_ns": latency_us * _NS_PER_US,
                    "calibrated": ep in sizes,
                    "in_range": ep > GPUS_PER_NODE,
                }
            )
    table = pd.DataFrame(rows)
    table["error"] = table["predicted_ns"] / table["published_ns"] - 1
    unseen = table[table["in_range"] & ~table["calibrated"]]
    errors = unseen["error"].abs().groupby(unseen["kind"]).mean()
    table.attrs = {"source": SOURCE, "links": links, "mean_error": {str(kind): float(e) for kind, e in errors.items()}}
    return table
