"""What vendors publish about their accelerators."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Datasheet:
    """Published ceilings of one accelerator: dense rates (no structured sparsity), FP32 accumulation.

    ``rate_flops_per_s`` by dtype [FLOP/s], ``bandwidth_bytes_per_s`` [B/s], ``memory_bytes`` [B] (vendors' GB of memory
    are 2**30). ``pattern`` finds it in the driver's name of a device: siblings that share a part of the name (PCIe,
    laptop, 40 GB) have other figures, and get none.
    """

    name: str
    pattern: str
    rate_flops_per_s: Mapping[str, float]
    bandwidth_bytes_per_s: float
    memory_bytes: float
    source: str
    date: str


_DTYPES = ("float32", "tf32", "float16", "bfloat16", "float8_e4m3fn")
# name, the driver's name, TFLOP/s (float32 vector, tf32, 16-bit and float8 matrix; vendors quote sparse rates first,
# these are the dense ones), GB/s, GB of memory, source, date
_ROWS = (
    ("A100", r"A100-SXM4-80GB", 19.5, 156, 312, None, 2039, 80, "NVIDIA A100 datasheet, SXM4 80 GB", "2021-06"),
    ("H100", r"H100 (80GB HBM3|SXM5)", 67, 494.5, 989.5, 1979, 3350, 80, "NVIDIA H100 datasheet, SXM5", "2023-03"),
    ("H200", r"H200$", 67, 494.5, 989.5, 1979, 4800, 141, "NVIDIA H200 datasheet, SXM", "2024-11"),
    ("B200", r"\bB200$", 75, 1125, 2250, 4500, 8000, 180, "NVIDIA DGX B200 datasheet, an eighth of it", "2025-03"),
    ("RTX 4090", r"RTX 4090$", 82.6, 82.6, 165.2, 330.3, 1008, 24, "NVIDIA Ada whitepaper, appendix A", "2022-10"),
    ("L4", r"\bL4$", 30.3, 60, 121, 242.5, 300, 24, "NVIDIA L4 datasheet", "2023-03"),
    ("MI300X", r"MI300X\b", 163.4, 653.7, 1307.4, 2614.9, 5300, 192, "AMD Instinct MI300X data sheet", "2023-12"),
)

DATASHEETS: Mapping[str, Datasheet] = {
    name: Datasheet(
        name, pattern,
        {dtype: rate * 1e12 for dtype, rate in zip(_DTYPES, (float32, tf32, half, half, float8), strict=True) if rate},
        bandwidth * 1e9, memory * 2**30, source, date,
    )
    for name, pattern, float32, tf32, half, float8, bandwidth, memory, source, date in _ROWS
}  # fmt: skip


def datasheet_of(name: str) -> Datasheet | None:
    """That of a device, by what its driver calls it; None where we hold none."""
    return next((sheet for sheet in DATASHEETS.values() if re.search(sheet.pattern, name)), None)
