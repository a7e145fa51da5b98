"""A batch sampler to take home: the plan's strategy, dealt to ranks, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from torch.utils.data import Sampler

from effkit.padding.buckets import Ints
from effkit.padding.rank_sharding import Batched, Step, deal


class Planned(Batched, Protocol):
    """Batches that can be planned anew; :class:`effkit.padding.Plan` says what each is."""

    @property
    def row_starts(self) -> Ints | None: ...
    @property
    def batch_starts(self) -> Ints: ...
    @property
    def num_rows(self) -> int: ...
    def replanned(self, seed: int) -> Planned: ...


class BatchSampler(Sampler[list[int]]):
    """Yields lists of example indices; pass it as ``DataLoader(dataset, batch_sampler=…)``.

    Each epoch is planned anew from ``(seed, epoch)``; where the strategy leaves nothing to chance (``sorted``,
    ``token_budget``, ``pack``), only the order of the steps changes. Every example comes exactly once per epoch over
    all ranks, all ranks take the same number of steps, and at each step they draw from the same bucket. What a bucket
    has left over is split until it goes round, or joins the next bucket; no batch grows beyond what was planned.

    Parameters
    ----------
    plan
        Gives lengths, strategy and limits.
    rank, world_size
        Which share this process takes.
    seed
        With the epoch, decides everything.

    Examples
    --------
    >>> sampler = plan.batch_sampler(rank=0, world_size=8)     # doctest: +SKIP
    >>> sampler.set_epoch(3)                                   # doctest: +SKIP
    >>> loader = DataLoader(dataset, batch_sampler=sampler)    # doctest: +SKIP
    """

    def __init__(self, plan: Planned, *, rank: int = 0, world_size: int = 1, seed: int = 0) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is in 0..world_size-1; given: rank {rank} of {world_size}")
        if plan.row_starts is not None and len(plan.batch_starts) != plan.num_rows:
            raise ValueError(
                "a packed batch of several rows cannot be told apart in a flat list of indices: plan with "
                "batch_size=1, so that each batch is one packed row"
            )
        self.plan, self.rank, self.world_size, self.seed = plan, rank, world_size, seed
        self.epoch = self.step = 0
        self._planned: tuple[int, list[Step]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch; without this, epochs follow one another."""
        self.epoch, self.step = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """Where we are: ``seed, epoch, step`` (steps already handed out).

        A DataLoader with workers asks ahead of time; then save the number of steps *you* have trained.
        """
        return {"seed": self.seed, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where ``state`` was taken: the rest of that epoch comes out as it would have."""
        missing = {"seed", "epoch", "step"} - set(state)
        if missing:
            raise ValueError(f"a sampler state holds seed, epoch and step; missing: {', '.join(sorted(missing))}")
        self.seed, self.epoch, self.step = state["seed"], state["epoch"], state["step"]
        self._planned = None

    def __len__(self) -> int:
        return len(self._steps()) - self.step

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._steps()
        while self.step < len(steps):
            batch = steps[self.step][self.rank]
            self.step += 1
            yield batch.tolist()
        self.epoch, self.step = self.epoch + 1, 0

    def _steps(self) -> list[Step]:
        if self._planned is None or self._planned[0] != self.epoch:
            mixed = np.random.SeedSequence([self.seed, self.epoch])
            planned = self.plan.replanned(int(mixed.generate_state(1)[0]))
            self._planned = self.epoch, deal(planned, self.world_size, np.random.default_rng(mixed))
        return self._planned[1]
