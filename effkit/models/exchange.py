"""All-to-alls of rows between ranks, and the times of everything that a layer does around them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import record_function

from effkit.device import synchronize
from effkit.timing import Stopwatch


@dataclass
class Call:
    """One collective: what it is for, when this rank came to it and left it, and the bytes to and from each rank."""

    kind: str
    start: Any
    end: Any
    sent_bytes: list[int]
    received_bytes: list[int]


@dataclass
class Marks:
    """What one rank did when, in a step: phases of its own work one after another, and its collectives.

    On a GPU the stamps are events, on the host nanoseconds; :meth:`read` turns either into nanoseconds.
    """

    device: torch.device
    phases: list[tuple[str, Any]] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    _open: Any = None

    def clear(self) -> None:
        """Forget the step before."""
        self.leave()
        self.phases.clear()
        self.calls.clear()

    def begin(self) -> None:
        """Forget the step before, and let the clock of this one begin."""
        self.clear()
        synchronize()
        self._zero = self.now()
        synchronize()
        self._zero_ns = time.perf_counter_ns()

    def now(self) -> Any:
        return Stopwatch(self.device.type).mark()

    def read(self, stamp: Any) -> int:
        """The moment of a stamp on this rank's clock [ns]; on a GPU, after it has been synchronized."""
        if isinstance(stamp, int):
            return stamp
        return self._zero_ns + round(self._zero.elapsed_time(stamp) * 1e6)

    def enter(self, phase: str) -> None:
        """What comes now belongs to ``phase``; profilers see it as an annotation of that name."""
        self.leave()
        self._open = record_function(phase)
        self._open.__enter__()
        self.phases.append((phase, self.now()))

    def leave(self) -> None:
        """The phase that was entered last ends here."""
        if self._open is not None:
            self._open.__exit__(None, None, None)
            self._open = None
            self.phases.append(("", self.now()))


class Exchange:
    """The collectives between the ranks of a torch.distributed ``group`` (None: one rank alone), timed in ``marks``.

    Collectives that are to overlap with computing run one after another, in the order in which they were started, on a
    thread of their own (on GPUs with NCCL: a stream of their own). With ``barriers`` the ranks meet before each
    collective, which tells waiting from moving in another way.
    """

    def __init__(self, group: Any, marks: Marks, *, barriers: bool = False) -> None:
        self.group, self.marks, self.barriers = group, marks, barriers
        self.num_ranks = dist.get_world_size(group) if group is not None else 1
        self.rank = dist.get_rank(group) if group is not None else 0
        self.on_device = group is not None and dist.get_backend(group) == "nccl"
        self._thread: ThreadPoolExecutor | None = None
        self._stream = torch.cuda.Stream() if self.on_device else None

    def rows(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int], kind: str, *, overlap: bool = False
    ) -> Callable[[], torch.Tensor]:
        """Start to send ``rows`` [num_rows, width] to the ranks, ``sent[r]`` of them to rank r; call the result for
        what arrived: ``received[r]`` rows from rank r, in that order."""
        width = rows.element_size() * rows.shape[1]

        if self.group is None:
            return lambda: rows

        def run(source: torch.Tensor, target: torch.Tensor) -> None:
            dist.all_to_all_single(target, source, list(received), list(sent), group=self.group)

        shape = (sum(received), rows.shape[1])
        return self._start(run, rows, shape, kind, [n * width for n in sent], [n * width for n in received], overlap)

    def counts(self, counts: torch.Tensor) -> torch.Tensor:
        """Every rank's counts [num_experts], shape [num_ranks, num_experts], on the host."""
        if self.group is None:
            return counts.cpu()[None]

        def run(source: torch.Tensor, target: torch.Tensor) -> None:
            dist.all_gather(list(target.split(len(source))), source, group=self.group)

        size = [counts.numel() * counts.element_size()] * self.num_ranks
        shape = (self.num_ranks * len(counts),)
        return self._start(run, counts, shape, "dispatch", size, size, False)().cpu().view(self.num_ranks, -1)

    def sum(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add these up over the ranks, in place."""
        if self.group is None or not gradients:
            return
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])

        def run(source: torch.Tensor, target: torch.Tensor) -> None:
            target.copy_(source)
            dist.all_reduce(target, group=self.group)

        # a ring sends every number twice, but for each rank's own share
        share = [2 * flat.numel() * flat.element_size() // self.num_ranks] * self.num_ranks
        summed = self._start(run, flat, (flat.numel(),), "replicas", share, share, False)()
        for gradient, part in zip(gradients, summed.split([grad.numel() for grad in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    def close(self) -> None:
        """End the thread."""
        if self._thread is not None:
            self._thread.shutdown()

    def _start(
        self, run: Callable[..., None], source: torch.Tensor, shape: tuple[int, ...], kind: str,
        sent_bytes: list[int], received_bytes: list[int], overlap: bool,
    ) -> Callable[[], torch.Tensor]:  # fmt: skip
        device = source.device

        def call(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            if self.barriers:
                self._timed(kind + " barrier", [], [], lambda: dist.barrier(self.group))
            self._timed(kind, sent_bytes, received_bytes, lambda: run(source, target))
            return target

        if (stream := self._stream) is not None:
            target = source.new_empty(shape)
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                call(source, target)
            source.record_stream(stream)
            target.record_stream(stream)

            def arrived() -> torch.Tensor:
                torch.cuda.current_stream().wait_stream(stream)
                return target

            return arrived
        # without NCCL a GPU's rows go through the host
        source = source.cpu().contiguous()
        target = source.new_empty(shape)
        if not overlap:
            call(source, target)
            return lambda: target.to(device)
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="exchange")
        future: Future[torch.Tensor] = self._thread.submit(call, source, target)
        return lambda: future.result().to(device)

    def _timed(self, kind: str, sent: list[int], received: list[int], run: Callable[[], None]) -> None:
        # host time where the host moves the bytes, even of rows that live on a GPU
        now = self.marks.now if self.on_device else time.perf_counter_ns
        with record_function(kind):
            start = now()
            run()
            self.marks.calls.append(Call(kind, start, now(), sent, received))
