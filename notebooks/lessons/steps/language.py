"""Small language models on English, as the meter of time to target drives them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch

from effkit import models
from lessons import corpora, meter
from lessons.steps.optimizers import Conda, Lamb, matrices_and_rest

LENGTH = 32  # letters of one piece
NUM_STEPS_KEPT = 40  # between two decompositions of Conda: our trainings are far shorter than its default
Draw = Callable[[], torch.Tensor]


@cache
def english_ids() -> tuple[torch.Tensor, torch.Tensor]:
    """Letters to train on, and 64 held-out pieces, shape (64, 32)."""
    learn, held = corpora.split(corpora.encode(corpora.english()))
    return learn, corpora.windows(held, 64, LENGTH)


def language_model(*, layers: int = 2, hidden: int = 64, seed: int = 0) -> Any:
    """A Llama (transformers) over letters; its feed-forward width is twice its width."""
    return models.text(
        layers=layers, hidden=hidden, ffn=2 * hidden, heads=2, vocabulary=corpora.VOCABULARY,
        max_input_cells=LENGTH, seed=seed,
    )  # fmt: skip


def pieces(ids: torch.Tensor, batch_size: int, generator: torch.Generator) -> Draw:
    """Draws batches, shape (batch_size, 32), at random from a text."""
    return lambda: corpora.windows(ids, batch_size, LENGTH, generator)


def own_loss(model: Any, batch: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next letter, a scalar [nats], of pieces of shape (pieces, letters)."""
    ids = batch.to(model.device)
    loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
    return loss


class Learning:
    """A language model learning letters; a :class:`lessons.meter.Training`.

    Parameters
    ----------
    model
        From :func:`language_model`, or one that takes and gives the same.
    updates
        Its optimizers; each parameter belongs to one.
    draw
        Gives the next batch.
    held
        Held-out pieces, shape (pieces, letters).
    phase
        Name of its steps.
    """

    def __init__(
        self,
        model: Any,
        updates: Sequence[torch.optim.Optimizer],
        draw: Draw,
        held: torch.Tensor,
        *,
        batch_size: int = 16,
        phase: str = "training",
    ) -> None:
        self.model, self.updates, self.draw, self.held = model, list(updates), draw, held
        self.phase, self.num_tokens = phase, batch_size * held.shape[1]

    def objective(self, batch: torch.Tensor) -> torch.Tensor:
        """What is made small; the model's own loss unless a method says otherwise."""
        return own_loss(self.model, batch)

    def step(self) -> None:
        """Forward, backward, update."""
        for update in self.updates:
            update.zero_grad()
        self.objective(self.draw()).backward()
        for update in self.updates:
            update.step()

    @torch.no_grad()
    def loss(self) -> float:
        """Held-out loss [nats per letter]."""
        return float(own_loss(self.model, self.held))


class WithBasis(Learning):
    """Learning by Conda, whose steps that find a new basis are a phase of their own."""

    def __init__(self, *args: Any, conda: Conda, **more: Any) -> None:
        super().__init__(*args, **more)
        self.conda = conda
        self._name()

    def _name(self) -> None:
        self.phase = "with decomposition" if self.conda.finds_basis_next else "training"

    def step(self) -> None:
        """As always; then the next step gets its name."""
        super().step()
        self._name()


# Best of {1, 2, 4} times 1e-3 (AdamW, Conda) or 1e-2 (LAMB, Muon) beforehand, over two other seeds
RATES: Mapping[str, float] = {"AdamW": 2e-3, "LAMB": 2e-2, "Muon": 2e-2, "Conda": 2e-3}


def optimizing(name: str, rate: float | None = None, *, batch_size: int = 16) -> Callable[[int], Learning]:
    """A start for the meter: one model, one optimizer.

    Muon and Conda move the matrices between embedding and output layer, AdamW everything else, at its own best rate.

    Parameters
    ----------
    name
        ``"AdamW"``, ``"LAMB"``, ``"Muon"`` or ``"Conda"``.
    rate
        Learning rate; unless given, the best one found beforehand at 16 pieces, whatever the batch.
    batch_size
        Pieces of 32 letters per step.

    Raises
    ------
    ValueError
        For another name.
    """
    if name not in RATES:
        raise ValueError(f"the optimizer is {name!r}, expected 'AdamW', 'LAMB', 'Muon' or 'Conda'")
    chosen = RATES[name] if rate is None else rate

    def start(seed: int) -> Learning:
        generator = meter.reproducible(seed)
        learn, held = english_ids()
        model = language_model(seed=seed)
        given = (model, pieces(learn, batch_size, generator), held)
        if name in ("AdamW", "LAMB"):
            make: Any = torch.optim.AdamW if name == "AdamW" else Lamb
            return Learning(model, [make(model.parameters(), lr=chosen)], *given[1:], batch_size=batch_size)
        inner, rest = matrices_and_rest(model)
        others = torch.optim.AdamW(rest, lr=RATES["AdamW"])
        if name == "Muon":
            return Learning(model, [torch.optim.Muon(inner, lr=chosen), others], *given[1:], batch_size=batch_size)
        conda = Conda(inner, lr=chosen, num_steps_kept=NUM_STEPS_KEPT)
        return WithBasis(model, [conda, others], *given[1:], batch_size=batch_size, conda=conda)

    return start
