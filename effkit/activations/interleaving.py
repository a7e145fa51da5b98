"""How much of an optimizer whose moments live in host memory to update there, and how much on the GPU.

After Deep Optimizer States (arXiv 2410.21316).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch

# Bytes per float32 parameter that cross the link each way: a gradient down and a parameter up, or both moments
_CPU_BYTES, _GPU_BYTES = 4, 8


@dataclass(frozen=True)
class Rates:
    """What bounds an interleaved update.

    Attributes
    ----------
    cpu_params_per_s, gpu_params_per_s
        AdamW updates of float32 parameters whose moments are at hand [parameters/s].
    link_bytes_per_s
        Copies between pinned host memory and the GPU [B/s], the slower of the two directions.

    What a machine does not have is None.
    """

    cpu_params_per_s: float
    gpu_params_per_s: float | None = None
    link_bytes_per_s: float | None = None

    @classmethod
    def here(cls, num_params: int = 1 << 22, repeats: int = 5) -> Rates:
        """Measure this machine, on ``num_params`` parameters: the median of ``repeats``, in well under a second."""
        cpu = num_params / _seconds(_some_update("cpu", num_params), repeats)
        if not torch.cuda.is_available():
            return cls(cpu)
        host = torch.empty(4 * num_params, dtype=torch.uint8, pin_memory=True)
        there = host.cuda()
        slower = max(_seconds(copy, repeats) for copy in (lambda: host.copy_(there), lambda: there.copy_(host)))
        return cls(cpu, num_params / _seconds(_some_update("cuda", num_params), repeats), host.nbytes / slower)


@dataclass(frozen=True)
class Interleaving:
    """The best way to update and its predicted times.

    Attributes
    ----------
    gpu_subgroups, num_subgroups
        How many of how many subgroups are updated on the GPU, spread evenly.
    seconds
        Predicted time of an update this way [s].
    cpu_seconds, gpu_seconds
        The same with all subgroups on the CPU, and with all on the GPU [s] (None where there is no GPU).
    bound
        What takes that long: ``"cpu"``, ``"gpu"`` or ``"link"``.
    """

    gpu_subgroups: int
    num_subgroups: int
    seconds: float
    cpu_seconds: float
    gpu_seconds: float | None
    bound: str

    @property
    def stride(self) -> Fraction | None:
        """Every how many subgroups the GPU updates one; not always a whole number. None for none."""
        return Fraction(self.num_subgroups, self.gpu_subgroups) if self.gpu_subgroups else None


def interleave(rates: Rates, num_params: int, *, num_subgroups: int = 16) -> Interleaving:
    """Choose how many subgroups :class:`effkit.activations.host_states.InterleavedAdamW` updates on the GPU.

    With a fraction g of the N parameters on the GPU, CPU, GPU and both directions of the link are busy at the same
    time, and the slowest of them bounds the update, which is the idea of the paper's performance model::

        seconds(g) = N * max((1 - g) / C,  g / G,  (4 (1 - g) + 8 g) / L)

    with C and G the update rates of CPU and GPU [parameters/s] and L the link's rate in each direction [B/s]. The
    bytes are those of float32 parameters that live on the GPU: for what the CPU updates, a gradient (4 bytes) comes
    down and a parameter (4) goes up; for what the GPU updates, both moments (8) go up and come down. (The paper keeps
    half-precision parameters on the GPU, so its bytes are others.) If the GPU is fast, the best g is where the CPU and
    the link take equally long, (L - 4 C) / (L + 4 C), but all is on the CPU where that is below 0.

    Assumed: the link carries both directions at once at full rate, the CPU's update and the link do not fight for host
    memory, and the transfers of the first and the last subgroup, which nothing hides, are left out. So real updates
    take longer.

    Parameters
    ----------
    num_params
        N.
    num_subgroups
        g is a multiple of 1 / num_subgroups; of equal times, the one with least on the GPU wins.

    Examples
    --------
    >>> best = interleave(Rates(1.5e9, 2e11, 25e9), 1_000_000_000, num_subgroups=10)
    >>> best.gpu_subgroups, best.bound, round(best.cpu_seconds, 3), round(best.gpu_seconds, 3), round(best.seconds, 3)
    (6, 'cpu', 0.667, 0.32, 0.267)
    """
    if min(num_params, num_subgroups) < 1:
        raise ValueError(f"num_params and num_subgroups are at least 1; given: {num_params} and {num_subgroups}")
    cpu, gpu, link = rates.cpu_params_per_s, rates.gpu_params_per_s, rates.link_bytes_per_s
    if gpu is None or link is None:
        alone = num_params / cpu
        return Interleaving(0, num_subgroups, alone, alone, None, "cpu")

    def busy(count: int) -> dict[str, float]:
        part = count / num_subgroups
        each_way = _CPU_BYTES * (1 - part) + _GPU_BYTES * part
        return {
            "cpu": num_params * (1 - part) / cpu,
            "gpu": num_params * part / gpu,
            "link": num_params * each_way / link,
        }

    seconds = [max(busy(count).values()) for count in range(num_subgroups + 1)]
    best = seconds.index(min(seconds))
    times = busy(best)
    bound = max(times, key=lambda name: times[name])
    return Interleaving(best, num_subgroups, seconds[best], seconds[0], seconds[-1], bound)


def _some_update(device: str, num_params: int) -> Callable[[], Any]:
    parameter = torch.nn.Parameter(torch.ones(num_params, device=device))
    parameter.grad = torch.ones_like(parameter)
    return torch.optim.AdamW([parameter], fused=True).step


def _seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median time of a call [s], the GPU's part of it included, after one that warms up."""
    taken = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        call()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken[1:])
