"""Device: what this machine can do, measured, beside what the datasheet of its kind says."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from effkit.datasheets import DATASHEETS, Datasheet
from effkit.whole_files import replacing

_VERSION = 1  # of the cached file


@dataclass(frozen=True)
class Device:
    """Ceilings of this machine.

    Attributes
    ----------
    name, kind
        ``"NVIDIA H200"`` and ``"cuda"``, or the processor's name and ``"cpu"``.
    rate_flops_per_s
        dtype name -> rate of a large matrix product [FLOP/s], 2·n³ operations counted.
    bandwidth_bytes_per_s
        Bytes read plus bytes written per second by a large copy [B/s].
    launch_overhead_ns
        Time from one tiny operator to the next [ns]: the floor of any step per operator.
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

    @classmethod
    def here(cls, *, refresh: bool = False) -> Device:
        """This machine, measured in under 5 s the first time and read from the user's cache afterwards.

        The cache holds one file per (processor, accelerator, threads, torch version); ``refresh`` measures again.
        """
        path = _cache_path()
        if not refresh:
            try:
                stored = json.loads(path.read_text())
                if stored.pop("version") == _VERSION:
                    return cls(**stored)
            except (OSError, ValueError, TypeError, KeyError, AttributeError):
                pass  # no cache, or one of another version: measure
        import torch

        with torch.random.fork_rng():  # somebody may be in the middle of a training
            device = _measure()
        with suppress(OSError):  # a cache that cannot be written only costs the next call its seconds
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_text(json.dumps({"version": _VERSION, **asdict(device)}))
        return device

    @property
    def datasheet(self) -> Datasheet | None:
        """The published figures for this kind of accelerator, or None where we hold none."""
        return next((sheet for sheet in DATASHEETS.values() if re.search(sheet.pattern, self.name)), None)

    @property
    def frame(self) -> pd.DataFrame:
        """Measured beside published: one row per ceiling, columns measured, published, reached_frac, source."""
        sheet = self.datasheet
        published = dict(sheet.rate_flops_per_s) if sheet else {}
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


def provenance() -> dict[str, Any]:
    """Where and with what a measurement was made: device, kind, threads, torch and Python versions, date (ISO)."""
    import torch

    return {
        "device": _name(),
        "kind": "cuda" if torch.cuda.is_available() else "cpu",
        "num_threads": torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def synchronize() -> None:
    """Wait until the accelerator, if there is one, has done all that it was given."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _name() -> str:
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        models = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")]  # fmt: skip
    except OSError:
        models = []
    return models[0] if models else platform.processor() or platform.machine()


def _cache_path() -> Path:
    import torch

    key = "|".join((_name(), str(os.cpu_count()), str(torch.get_num_threads()), torch.__version__))
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "effkit" / f"device-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _measure() -> Device:
    import torch

    cuda = torch.cuda.is_available()
    where, size = ("cuda", 4096) if cuda else ("cpu", 768)
    dtypes = [torch.float32, torch.bfloat16, *([torch.float16] if cuda else [])]
    rates = {str(dtype).removeprefix("torch."): _matrix_rate(dtype, size, where) for dtype in dtypes}

    source = torch.ones(2**28 if cuda else 2**24, device=where)  # 1 GiB or 64 MiB: far more than any cache
    target = torch.empty_like(source)
    copy_ns = _fastest_ns(lambda: target.copy_(source), seconds=0.4)

    tiny = torch.ones(1, device=where)

    def hundred() -> None:
        for _ in range(100):
            tiny.add_(1)

    memory = torch.cuda.get_device_properties(0).total_memory if cuda else _host_memory()
    return Device(
        name=_name(), kind=where, num_threads=torch.get_num_threads(), rate_flops_per_s=rates,
        bandwidth_bytes_per_s=2 * source.nbytes / copy_ns * 1e9,
        launch_overhead_ns=round(_fastest_ns(hundred, seconds=0.3) / 100), memory_bytes=memory,
        torch_version=torch.__version__, measured_on=datetime.date.today().isoformat(),
    )  # fmt: skip


def _matrix_rate(dtype: Any, size: int, where: str) -> float:
    import torch

    left, right = (torch.randn(size, size, device=where).to(dtype) for _ in range(2))
    return 2 * size**3 / _fastest_ns(lambda: left @ right, seconds=0.6) * 1e9


def _fastest_ns(step: Callable[[], object], *, seconds: float) -> float:
    """Median of the fastest tenth of runs [ns]: a ceiling is what the machine reaches when nobody disturbs it."""
    step()
    synchronize()
    times: list[int] = []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        start = time.perf_counter_ns()
        step()
        synchronize()
        times.append(time.perf_counter_ns() - start)
    return statistics.median(sorted(times)[: max(1, len(times) // 10)])


def _host_memory() -> int:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
