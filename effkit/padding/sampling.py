"""A batch sampler to take home: the plan's strategy, dealt to ranks, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler

from effkit.arguments import checked_whole
from effkit.padding.rank_sharding import Batched, Step, deal


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
        Which share this process takes. With ``rank=None``, all shares, rank after rank at each step: so it is under
        accelerate (and the Trainer), which deals every ``world_size``-th batch to a process itself, and so refuses a
        share that was dealt already.
    seed
        With the epoch, decides everything.

    Examples
    --------
    >>> sampler = plan.batch_sampler(rank=0, world_size=8)     # doctest: +SKIP
    >>> sampler.set_epoch(3)                                   # doctest: +SKIP
    >>> loader = DataLoader(dataset, batch_sampler=sampler)    # doctest: +SKIP

    Under accelerate: ``accelerator.prepare(DataLoader(dataset, batch_sampler=plan.batch_sampler(None, 8)))``.
    """

    def __init__(self, plan: Batched, *, rank: int | None = 0, world_size: int = 1, seed: int = 0) -> None:
        if (0 if rank is None else rank) not in range(checked_whole("world_size", world_size, 0)):
            raise ValueError(f"rank is in 0..world_size-1; given: rank {rank} of {world_size}")
        if plan.row_starts is not None and len(plan.batch_starts) != plan.num_rows:
            raise ValueError(
                "a packed batch of several rows cannot be told apart in a flat list of indices: plan with "
                "batch_size=1, so that each batch is one packed row"
            )
        self.plan, self.rank, self.world_size, self.seed = plan, rank, world_size, seed
        self.epoch = self.step = 0
        self._planned: tuple[int, list[Step]] | None = None

    @property
    def batch_size(self) -> None:
        """None: batches have different sizes. Who shards a sampler asks; ValueError where that was done already."""
        if self.rank is not None and self.world_size > 1:
            raise ValueError(
                f"this batch sampler holds the share of rank {self.rank} of {self.world_size}, and would be sharded a "
                f"second time: give batch_sampler(rank=None, world_size={self.world_size}), which accelerate deals out"
            )

    @staticmethod
    def blocks(lengths: Iterable[int]) -> dict[str, Any]:
        """Of one packed row: ``position_ids`` [1, T], and where its examples of these ``lengths`` begin and end.

        For a collate function, as keyword arguments of a transformers model beside ``input_ids`` [1, T] and without
        an ``attention_mask``. ``flash_attention_2`` (variable-length kernels) needs the boundaries ``cu_seq_lens_q``,
        ``cu_seq_lens_k`` [examples + 1] and ``max_length_q``, ``max_length_k``; ``sdpa`` and ``eager`` build a block
        mask of the positions; an attention that reads neither mixes neighbours.

        >>> BatchSampler.blocks([2, 3])["position_ids"].tolist(), BatchSampler.blocks([2, 3])["cu_seq_lens_q"].tolist()
        ([[0, 1, 0, 1, 2]], [0, 2, 5])
        """
        sizes = torch.tensor(list(lengths))
        bounds = torch.nn.functional.pad(sizes.cumsum(0), (1, 0)).int()
        positions = torch.cat([torch.arange(int(size)) for size in sizes])[None]
        longest = int(sizes.max())
        return {"position_ids": positions, "cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": longest,
                "max_length_k": longest}  # fmt: skip

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
        return (len(self._steps()) - self.step) * (self.world_size if self.rank is None else 1)

    def __iter__(self) -> Iterator[list[int]]:
        steps = self._steps()
        while self.step < len(steps):
            dealt = steps[self.step]
            self.step += 1
            yield from (batch.tolist() for batch in (dealt if self.rank is None else [dealt[self.rank]]))
        self.epoch, self.step = self.epoch + 1, 0

    def _steps(self) -> list[Step]:
        if self._planned is None or self._planned[0] != self.epoch:
            mixed = np.random.SeedSequence([self.seed, self.epoch])
            planned = self.plan.replanned(int(mixed.generate_state(1)[0]))
            self._planned = self.epoch, deal(planned, self.world_size, np.random.default_rng(mixed))
        return self._planned[1]
