"""Device: what this machine can do, measured, beside what the datasheet of its kind says."""

from __future__ import annotations

import datetime
import hashlib
import html
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from effkit import markup
from effkit.datasheets import Datasheet, datasheet_of
from effkit.progress_bar import advance, working
from effkit.units import readable
from effkit.whole_files import replacing

_VERSION = 2  # of the cached file
_TURN_NS = 20_000_000  # on an accelerator, between two waits for it
# What libraries read from the environment about how they multiply
_MULTIPLYING = re.compile("(OMP|MKL|ONEDNN|DNNL|ATEN|NVIDIA|CUDA|CUBLAS|TORCH_ALLOW_TF32|HIP|ROCBLAS|HSA|ZE|SYCL)_")


@dataclass(frozen=True)
class Device:
    """Ceilings of this machine.

    Attributes
    ----------
    name, kind
        ``"NVIDIA H200"`` and ``"cuda"``, or the processor's name and ``"cpu"``.
    rate_flops_per_s
        dtype name -> rate of a large matrix product [FLOP/s], 2·n³ operations counted.
    float32_precision
        How float32 was multiplied, in torch's word: ``"ieee"``, or in fewer bits, ``"tf32"`` or ``"bf16"``.
    bandwidth_bytes_per_s
        Bytes read plus bytes written per second by a large copy [B/s].
    launch_overhead_ns
        Time from one tiny operator to the next [ns]: the floor of a step per operator that is launched by itself. A
        CUDA graph launches all of its kernels at once, and has no such floor.
    memory_bytes
        Capacity [B].
    measured_on
        Date (ISO) of the measurement.

    Examples
    --------
    >>> device = Device.here()            # doctest: +SKIP
    >>> device.rate_flops_per_s["float32"] / 1e9    # doctest: +SKIP
    118.4
    """

    name: str
    kind: str
    num_threads: int
    rate_flops_per_s: Mapping[str, float] = field(hash=False)
    bandwidth_bytes_per_s: float
    launch_overhead_ns: int
    memory_bytes: int
    torch_version: str
    measured_on: str
    float32_precision: str = "ieee"

    @classmethod
    @working("Measuring this machine")
    def here(cls, *, refresh: bool = False) -> Device:
        """This machine, measured in under 5 s the first time and read from the user's cache afterwards.

        The cache holds one file for everything that changes a rate: processor, accelerator and its driver, cores and
        threads, the precision of products (TF32), the environment, the torch version; ``refresh`` measures again.
        """
        path = _cache_path()
        if not refresh:
            with suppress(OSError, ValueError, TypeError):  # no cache, or a damaged one: measure
                return cls(**json.loads(path.read_text()))
        import torch

        with torch.random.fork_rng():  # somebody may be in the middle of a training
            device = _measure()
        with suppress(OSError):  # a cache that cannot be written only costs the next call its seconds
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(json.dumps(asdict(device)))
        return device

    @property
    def datasheet(self) -> Datasheet | None:
        """The published figures for this kind of accelerator, or None where we hold none."""
        return datasheet_of(self.name)

    @property
    def frame(self) -> pd.DataFrame:
        """Measured beside published: one row per ceiling, columns measured, published, reached_frac, source."""
        sheet = self.datasheet
        published: dict[str, float | None] = dict(sheet.rate_flops_per_s) if sheet else {}
        if self.float32_precision != "ieee":  # then the rate of products in fewer bits
            published["float32"] = published.get(self.float32_precision.replace("bf16", "bfloat16"))
        rows = {
            **{f"matrix rate {dtype} [FLOP/s]": (rate, published.get(dtype))
               for dtype, rate in self.rate_flops_per_s.items()},
            "memory bandwidth [B/s]": (self.bandwidth_bytes_per_s, sheet and sheet.bandwidth_bytes_per_s),
            "memory [B]": (self.memory_bytes, sheet and sheet.memory_bytes),
            "operator overhead [ns]": (self.launch_overhead_ns, None),
        }  # fmt: skip
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=["measured", "published"]).astype("Float64")
        frame["reached_frac"] = frame["measured"] / frame["published"]
        frame["source"] = f"{sheet.source}, {sheet.date}" if sheet else "no datasheet held"
        return frame.rename_axis("ceiling")

    def __repr__(self) -> str:
        rates = ", ".join(f"{dtype} {rate / 1e9:,.0f}" for dtype, rate in self.rate_flops_per_s.items())
        return (
            f"{self.name} ({self.kind}, {self.num_threads} threads)\n"
            f"  matrix rate [GFLOP/s]: {rates}\n"
            f"  memory bandwidth {self.bandwidth_bytes_per_s / 1e9:,.1f} GB/s, "
            f"operator overhead {self.launch_overhead_ns / 1e3:.1f} us, memory {self.memory_bytes / 2**30:,.0f} GiB"
        )

    def _repr_html_(self) -> str:
        rows = []
        for name, row in self.frame.iterrows():
            ceiling, unit = str(name).rstrip("]").split(" [")
            amounts = ["–" if pd.isna(row[each]) else readable(row[each], unit) for each in ("measured", "published")]
            reached = "–" if pd.isna(row["reached_frac"]) else f"{row['reached_frac']:.0%}"
            rows.append([ceiling, *amounts, reached, row["source"]])
        caption = f"{html.escape(self.name)} ({self.kind}, {self.num_threads} threads), measured on {self.measured_on}"
        return markup.table(["", "measured", "published", "reached", "source"], rows, caption=caption)


def provenance() -> dict[str, Any]:
    """Where and with what a measurement was made: device, kind, threads, torch and Python versions, date (ISO).

    Where torch is absent, nothing was measured: device, Python and date alone are told.
    """
    here = {"python": platform.python_version(), "date": datetime.date.today().isoformat()}
    try:
        import torch
    except ImportError:
        return {"device": _processor(), **here}
    return {
        "device": _name(),
        "kind": accelerator(),
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        **here,
    }


def accelerator() -> str:
    """The kind of this machine's accelerator, in torch's word, as ``"cuda"`` or ``"mps"``; ``"cpu"`` without one."""
    import torch

    kind = torch.accelerator.current_accelerator()
    return kind.type if kind is not None and torch.accelerator.is_available() else "cpu"


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has done all that it was given."""
    import torch

    if accelerator() != "cpu":
        torch.accelerator.synchronize()


def peak_counter() -> Any:
    """torch's module of the accelerator, if that counts the peak of its memory; None on the CPU and with MPS."""
    import torch

    module = torch.get_device_module(accelerator())
    return module if hasattr(module, "max_memory_allocated") else None


def usual_device() -> str:
    """Where models are built, and rates measured, unless told otherwise: where a peak is counted, else the CPU."""
    return accelerator() if peak_counter() else "cpu"


def fastest_ns(step: Callable[[], object], *, seconds: float) -> float:
    """Median of the fastest tenth of runs [ns]: a ceiling is what the machine reaches when nobody disturbs it.

    On an accelerator many runs are timed together: waiting for it after each would be a part of their time.
    """

    def turn_ns(number: int) -> int:
        start = time.perf_counter_ns()
        for _ in range(number):
            step()
        synchronize()
        return time.perf_counter_ns() - start

    turn_ns(1)
    number = 1
    while accelerator() != "cpu" and turn_ns(number) < _TURN_NS:
        number *= 2
    times: list[float] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        advance()
        times.append(turn_ns(number) / number)
    return statistics.median(sorted(times)[: max(1, len(times) // 10)])


def _name() -> str:
    import torch

    if usual_device() != "cpu":
        return str(torch.get_device_module(usual_device()).get_device_name())
    return _processor()


def _processor() -> str:
    with suppress(OSError):
        if found := re.search(r"^model name[^:\n]*:(.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def _precision() -> str:
    """How float32 is multiplied: where torch was not told, in full."""
    from torch import backends

    matmul = (backends.cuda if usual_device() == "cuda" else backends.mkldnn).matmul
    return str(matmul.fp32_precision).replace("none", "ieee")


def _cache_path() -> Path:
    """One file for all that changes a rate from one process to the next."""
    import torch
    from torch.backends import cuda, mkldnn

    where, driver = usual_device(), Path("/proc/driver/nvidia/version")
    sums = ("fp16_accumulation", "fp16_reduced_precision_reduction", "bf16_reduced_precision_reduction")
    key = (
        _VERSION, _name(), torch.__version__, torch.__config__.show(), torch.__config__.parallel_info(), _precision(),
        driver.read_text() if driver.exists() else "", cuda.preferred_blas_library(), mkldnn.enabled,
        where == "cpu" or torch.get_device_module(where).get_device_properties(),
        [getattr(cuda.matmul, f"allow_{name}") for name in sums],
        os.cpu_count() if not hasattr(os, "sched_getaffinity") else len(os.sched_getaffinity(0)),
        sorted(pair for pair in os.environ.items() if _MULTIPLYING.match(pair[0])),
    )  # fmt: skip
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "effkit" / f"device-{hashlib.sha256(repr(key).encode()).hexdigest()[:16]}.json"


def _measure() -> Device:
    import torch

    where = usual_device()
    small = where == "cpu"
    dtypes = [torch.float32, torch.bfloat16, *([] if small else [torch.float16])]
    rates, size = {}, 768 if small else 4096
    for dtype in dtypes:
        pair = [torch.randn(size, size, device=where).to(dtype) for _ in range(2)]
        product_ns = fastest_ns(partial(torch.matmul, *pair), seconds=0.6)
        rates[str(dtype).removeprefix("torch.")] = 2 * size**3 / product_ns * 1e9

    source = torch.ones(2**24 if small else 2**28, device=where)  # 64 MiB or 1 GiB: far more than any cache
    target = torch.empty_like(source)
    copy_ns = fastest_ns(lambda: target.copy_(source), seconds=0.4)

    tiny = torch.ones(1, device=where)

    def hundred() -> None:
        for _ in range(100):
            tiny.add_(1)

    return Device(
        name=_name(), kind=where, num_threads=torch.get_num_threads(), rate_flops_per_s=rates,
        bandwidth_bytes_per_s=2 * source.nbytes / copy_ns * 1e9,
        launch_overhead_ns=round(fastest_ns(hundred, seconds=0.3) / 100), memory_bytes=_memory(),
        torch_version=torch.__version__, measured_on=datetime.date.today().isoformat(),
        float32_precision=_precision(),
    )  # fmt: skip


def _memory() -> int:
    import torch

    if usual_device() != "cpu":
        return int(torch.get_device_module(usual_device()).get_device_properties(0).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
