"""AdamW whose moments live in host memory and are updated partly there, partly on the GPU; and which part where.

After Deep Optimizer States (arXiv 2410.21316).
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch.optim.adamw import adamw

from effkit.training import loss_of

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
    """Choose how many subgroups :class:`InterleavedAdamW` updates on the GPU.

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


class InterleavedAdamW(torch.optim.Optimizer):
    """AdamW whose moments live in host memory (pinned where there is a GPU), in subgroups of whole parameters.

    Every ``stride``-th subgroup's moments are moved to the parameters' device, used there and moved back on side
    streams, while the CPU updates the subgroups between them; at most two are on the device at once. Without a GPU
    the same copies are made within host memory, and the result is torch.optim.AdamW(fused=True)'s bit for bit. State
    dicts are torch.optim.AdamW's.

    The host also keeps a copy of the parameters that it updates, so that only gradients come down. It is renewed when
    a parameter has been changed in place since (as ``load_state_dict`` does), but changes through ``.data`` go
    unnoticed.

    Parameters
    ----------
    params, lr, betas, eps, weight_decay
        As in torch.optim.AdamW; all parameters on one device.
    stride
        Every how many subgroups the device updates one, from the first; need not be a whole number (4 / 3: three of
        four); 0 for none. Chosen for this machine by :func:`interleave` unless given.
    num_subgroups
        In how many parts of about equal size the parameters fall, in order (fewer where there are fewer parameters).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        stride: float | Fraction | None = None,
        num_subgroups: int = 16,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        if num_subgroups < 1 or (stride is not None and stride != 0 and stride < 1):
            raise ValueError(
                f"num_subgroups is at least 1, and stride too unless 0; given: {num_subgroups} and {stride}"
            )
        ours = [parameter for settings in self.param_groups for parameter in settings["params"]]
        if len({parameter.device for parameter in ours}) > 1:
            raise ValueError("all parameters are on one device; given: several; move the model to one first")
        self.device = ours[0].device
        self._pinned = self.device.type == "cuda"
        total = sum(parameter.numel() for parameter in ours)
        if stride is None:
            stride = interleave(Rates.here(), total, num_subgroups=num_subgroups).stride or 0
        # as a fraction, so that the multiples of 4 / 3 are exact
        self.stride, self.num_subgroups = Fraction(stride).limit_denominator(10_000), num_subgroups
        # parameter -> its copy on the host, and the version of the parameter that this is
        self._copies: dict[torch.Tensor, tuple[torch.Tensor, int]] = {}
        self._current, self._up, self._down = _Lane(self.device, side=False), _Lane(self.device), _Lane(self.device)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what ``closure`` returns."""
        loss = loss_of(closure)
        self._up.after(self._current)
        self._down.after(self._current)
        subgroups = self._subgroups()
        on_device = [self._is_on_device(index) for index in range(len(subgroups))]
        to_fetch = iter([members for members, there in zip(subgroups, on_device, strict=True) if not there])
        fetched = self._fetch(next(to_fetch, []))
        flying: deque[Callable[[], None]] = deque()
        for members, there in zip(subgroups, on_device, strict=True):
            if there:
                if len(flying) == 2:
                    flying.popleft()()
                flying.append(self._update_on_device(members))
            else:
                # the next one comes down while the CPU is busy with this one
                now, fetched = fetched, self._fetch(next(to_fetch, []))
                self._update_on_host(members, *now)
        self._current.after(self._up)
        self._down.mark()()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state of this optimizer or of torch.optim.AdamW; moments go to host memory."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = state[name].pin_memory() if self._pinned else state[name]

    def _subgroups(self) -> list[list[_Member]]:
        """Parameters with gradients, in parts of about equal size; makes the state of those that have none."""
        ours = [_Member(p, s) for s in self.param_groups for p in s["params"] if p.grad is not None]
        total = sum(member.parameter.numel() for member in ours)
        parts: dict[int, list[_Member]] = {}
        before = 0
        for member in ours:
            size = member.parameter.numel()
            parts.setdefault((2 * before + size) * self.num_subgroups // (2 * total + 1), []).append(member)
            before += size
            state = self.state[member.parameter]
            if not state:
                state["step"] = torch.zeros(())
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(member.parameter, device="cpu", pin_memory=self._pinned)
        return list(parts.values())

    def _is_on_device(self, index: int) -> bool:
        """Whether a multiple of the stride lies in (index - 1, index]."""
        return self.stride > 0 and index // self.stride > (index - 1) // self.stride

    def _fetch(self, members: list[_Member]) -> tuple[list[torch.Tensor], Callable[[], None]]:
        """Gradients on their way to the host, and what waits for them; stale copies of parameters come along."""
        with self._down.work():
            gradients = [self._host_like(m.gradient).copy_(m.gradient, non_blocking=True) for m in members]
            for parameter, _ in members:
                copy, version = self._copies.get(parameter, (None, -1))
                if copy is None or version != parameter._version:
                    copy = self._host_like(parameter) if copy is None else copy
                    self._copies[parameter] = copy.copy_(parameter, non_blocking=True), parameter._version
        return gradients, self._down.mark()

    def _host_like(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(tensor, device="cpu", pin_memory=self._pinned, requires_grad=False)

    def _update_on_host(self, members: list[_Member], gradients: list[torch.Tensor], wait: Callable[[], None]) -> None:
        wait()
        copies = [self._copies[member.parameter][0] for member in members]
        self._adamw(members, copies, gradients, *self._moments(members))
        with self._up.work():
            for (parameter, _), updated in zip(members, copies, strict=True):
                parameter.copy_(updated, non_blocking=True)
                self._copies[parameter] = updated, parameter._version

    def _update_on_device(self, members: list[_Member]) -> Callable[[], None]:
        """Starts it; returns what waits until the moments are back on the host."""
        homes = self._moments(members)
        with self._up.work():
            guests = [
                [torch.empty_like(t, device=self.device).copy_(t, non_blocking=True) for t in home] for home in homes
            ]
        self._current.after(self._up)
        self._adamw(members, [m.parameter for m in members], [m.gradient for m in members], *guests)
        self._down.after(self._current)
        with self._down.work():
            for home, guest in zip(chain(*homes), chain(*guests), strict=True):
                home.copy_(guest, non_blocking=True)
                for lane in (self._current, self._down):
                    lane.keep(guest)
        return self._down.mark()

    def _moments(self, members: list[_Member]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        states = [self.state[member.parameter] for member in members]
        return [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states]

    def _adamw(self, members: list[_Member], *tensors: list[torch.Tensor]) -> None:
        """torch's fused update of parameters, given gradients and both moments, wherever they are."""
        for member, parameter, gradient, first, second in zip(members, *tensors, strict=True):
            step, settings = self.state[member.parameter]["step"], member.settings
            beta1, beta2 = settings["betas"]
            # the kernel counts its own step, on the device of the parameter
            steps = [torch.full((), float(step), device=parameter.device)]
            adamw(
                [parameter], [gradient], [first], [second], [], steps, fused=True, amsgrad=False, maximize=False,
                beta1=beta1, beta2=beta2, lr=settings["lr"], weight_decay=settings["weight_decay"], eps=settings["eps"],
            )  # fmt: skip
            step += 1


class _Member(NamedTuple):
    parameter: torch.Tensor
    settings: dict[str, Any]

    @property
    def gradient(self) -> torch.Tensor:
        gradient = self.parameter.grad
        assert gradient is not None
        return gradient


class _Lane:
    """A CUDA stream, a new one or the current; without a GPU nothing, since work is done in order there anyway."""

    def __init__(self, device: torch.device, *, side: bool = True) -> None:
        self._device = device if device.type == "cuda" else None
        self._side = torch.cuda.Stream(device) if side and self._device else None

    @property
    def _stream(self) -> torch.cuda.Stream:
        return self._side or torch.cuda.current_stream(self._device)

    def work(self) -> AbstractContextManager[Any]:
        return torch.cuda.stream(self._stream) if self._device else nullcontext()

    def after(self, other: _Lane) -> None:
        """What comes from now on waits for what ``other`` has been given until now."""
        if self._device:
            self._stream.wait_stream(other._stream)

    def mark(self) -> Callable[[], None]:
        """What waits, when called, until all that has been given until now is done."""
        return self._stream.record_event().synchronize if self._device else lambda: None

    def keep(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor that was made in another lane until this one is done with it."""
        if self._device:
            tensor.record_stream(self._stream)


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
