"""A step that was not run: the phases and collectives of every rank, from what each costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from effkit.least_squares import Floats
from effkit.moe import costs, routing
from effkit.moe.recorded import Call, OfRank, Step
from effkit.moe.setting import Setting
from effkit.trace.names import ITEM_BYTES


class _Simulation:
    """The ranks' clocks as a step goes on; what they do is written down as the ranks of a run write it."""

    def __init__(self, setting: Setting, traffic: routing.Traffic, fitted: costs.Costs, ranks_per_node: int) -> None:
        self.setting, self.traffic, self.fitted, self.per_node = setting, traffic, fitted, ranks_per_node
        self.num_ranks = len(traffic.rows)
        self.now = np.zeros(self.num_ranks)
        self.link_free = np.zeros(self.num_ranks)
        self.phases: list[list[tuple[str, int, int]]] = [[] for _ in range(self.num_ranks)]
        self.calls: list[list[Call]] = [[] for _ in range(self.num_ranks)]

    def work(self, forward: bool, place: str, phase: str, share: float = 1.0) -> None:
        for rank in range(self.num_ranks):
            time_ns = share * self.fitted.phase_ns((forward, place, phase), self.setting, self.traffic, rank)
            self._did(phase, rank, self.now[rank] + time_ns)

    def start(self, kind: str, sent_bytes: Floats, *, overlap: bool = False) -> Floats:
        """A collective that all come to now; a rank's collectives run one after another. Returns when each leaves."""
        handing = self.fitted.handing
        arrived = np.maximum(self.now, self.link_free + (handing.between_ns if overlap else 0.0))
        ends = self.fitted.ends_ns(arrived, sent_bytes, self.per_node, overlap)
        for rank in range(self.num_ranks):
            times = round(arrived[rank]), round(ends[rank])
            self.calls[rank].append(Call(kind, *times, sent_bytes[rank].tolist(), sent_bytes[:, rank].tolist()))
        self.link_free = ends
        if overlap:
            for rank in range(self.num_ranks):
                self._did(kind, rank, self.now[rank] + handing.submit_ns)
        return ends

    def wait(self, kind: str, ends: Floats, *, overlap: bool = False) -> None:
        for rank in range(self.num_ranks):
            wakes = self.fitted.handing.wake_ns if overlap and ends[rank] > self.now[rank] else 0.0
            self._did(kind, rank, max(ends[rank] + wakes, self.now[rank]))

    def there_and_back(self, forward: bool) -> None:
        """The exchange with the experts in the middle, cut into its pieces (as ``travelling`` does it)."""
        degree = self.setting.degrees[0 if forward else 1]
        out, home = ("dispatch", "combine") if forward else ("combine", "dispatch")
        widths = [costs.message_bytes(self.setting, forward=forward, out=side) for side in (True, False)]
        whole = self.traffic.rows
        parts = [(c + 1) * whole // degree - c * whole // degree for c in range(degree)]
        pieces = [replace(self.traffic, rows=part).moved.astype(float) for part in parts]  # from each rank to each
        overlap = degree > 1
        on_the_way = [self.start(out, rows * widths[0], overlap=overlap) for rows in pieces]
        returning = []
        for ends, rows in zip(on_the_way, pieces, strict=True):
            self.wait(out, ends, overlap=overlap)
            self.work(forward, "during", "compress", 1 / degree)
            self.work(forward, "during", "experts", 1 / degree)
            returning.append(self.start(home, rows.T * widths[1], overlap=overlap))
        for ends in returning:
            self.wait(home, ends, overlap=overlap)

    def _did(self, phase: str, rank: int, until: float) -> None:
        self.phases[rank].append((phase, round(self.now[rank]), round(until)))
        self.now[rank] = until


def simulate(
    setting: Setting, number: int, num_ranks: int, ranks_per_node: int, fitted: costs.Costs,
    traffic: routing.Traffic | None = None,
) -> Step:  # fmt: skip
    """Step ``number`` of a setting on ``num_ranks`` ranks; with other ``traffic`` than its own, if given."""
    traffic = traffic or routing.traffic(setting, num_ranks, number)
    of = _Simulation(setting, traffic, fitted, ranks_per_node)
    for phase in ("gate", "permute", "compress"):
        of.work(True, "before", phase)
    of.wait("dispatch", of.start("dispatch", np.full((num_ranks, num_ranks), costs.COUNT_BYTES * setting.num_experts)))
    of.there_and_back(True)
    for phase in ("permute", "compress", "unpermute"):
        of.work(True, "after", phase)
    turn = of.now.copy()
    if setting.backward:
        for phase in ("unpermute", "compress", "permute"):
            of.work(False, "before", phase)
        of.there_and_back(False)
        if setting.num_replicas and num_ranks > 1:
            weights = 2 * setting.num_replicas * setting.hidden * setting.ffn
            share = 2 * weights * ITEM_BYTES[setting.dtype] // num_ranks
            of.wait("replicas", of.start("replicas", np.full((num_ranks, num_ranks), share)))
        for phase in ("replicas", "compress", "permute", "gate"):
            of.work(False, "after", phase)
    ranks = [
        OfRank(0, round(turn[rank]), round(of.now[rank]), of.phases[rank], of.calls[rank]) for rank in range(num_ranks)
    ]
    return Step(0, 0, number, ranks)
