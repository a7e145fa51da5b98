"""An accelerator without hardware: a queue whose work ends only when somebody waits for it.

It keeps torch's contract, and no more: what is given returns at once and runs in order; ``synchronize`` waits for all
of it; an event is reached when what was given before it is done, and its time cannot be read earlier.
"""

from __future__ import annotations

import time

import torch

COUNTED = ("cuda", "xpu")  # of whose memory torch counts a peak


class Queue:
    """One stream of work, on the host's clock."""

    def __init__(self) -> None:
        self.done_ns = 0
        self.peak_bytes = 0

    def give(self, seconds: float) -> None:
        """Work that takes so long, after what was given before."""
        self.done_ns = max(self.done_ns, time.perf_counter_ns()) + round(seconds * 1e9)

    def synchronize(self, *_) -> None:
        time.sleep(max(0, self.done_ns - time.perf_counter_ns()) / 1e9)

    def event(self, enable_timing: bool = False) -> Event:
        assert enable_timing, "an event that is not asked for times has none"
        return Event(self)


class Event:
    """A moment in a queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self.reached_ns = queue, None

    def record(self) -> None:
        self.reached_ns = max(self._queue.done_ns, time.perf_counter_ns())

    def elapsed_time(self, other: Event) -> float:
        if time.perf_counter_ns() < other.reached_ns:
            raise RuntimeError("device not ready")
        return (other.reached_ns - self.reached_ns) / 1e6


def installed(monkeypatch, kind: str) -> Queue:
    """torch finds an accelerator of this kind, and its work is in the queue that is returned."""
    queue, module = Queue(), getattr(torch, kind)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "synchronize", queue.synchronize)
    monkeypatch.setattr(module, "Event", queue.event)
    if kind in COUNTED:
        monkeypatch.setattr(module, "get_device_name", lambda *_: "an accelerator")
        monkeypatch.setattr(module, "reset_peak_memory_stats", lambda: setattr(queue, "peak_bytes", 0))
        monkeypatch.setattr(module, "max_memory_allocated", lambda: queue.peak_bytes)
    return queue
