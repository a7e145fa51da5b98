"""Models that help others learn: SALT (arXiv 2410.18779) early in a training, MiniPLM (2410.17215) before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pandas as pd
import torch
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from lessons import corpora, meter
from lessons.steps.language import LENGTH, RATES, Learning, english_ids, language_model, own_loss, pieces

TEACHER, REFERENCE = (2, 64, 150), (1, 32, 75)  # for MiniPLM: layers, width, steps of training
NUM_PIECES, SCORED_AT_ONCE = 2048, 128  # of MiniPLM's pool
NOISE_FRAC = 0.5  # of the pool that they were trained on
KEPT_FRAC = 0.5  # of the pool, the better half
_RATE = RATES["AdamW"]


def adamw(model: torch.nn.Module, rate: float = _RATE) -> torch.optim.Optimizer:
    """AdamW over all of a model."""
    return torch.optim.AdamW(model.parameters(), lr=rate)


def towards(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the student's next letters under the teacher's, a scalar [nats].

    Parameters
    ----------
    student, teacher
        Logits, shape (pieces, letters, vocabulary); the last letter's are not used, as in the model's own loss.
    """
    wanted = teacher[:, :-1].softmax(-1).flatten(0, 1)
    return functional.cross_entropy(student[:, :-1].flatten(0, 1), wanted)


class SmallTeacher(Learning):
    """SALT without its selection of data: a small teacher learns, then helps a larger student for its first steps.

    Phases: ``"teacher's own training"``, ``"with teacher"``, ``"alone"``. The student's loss stands still in the first.

    Parameters
    ----------
    seed
        Of weights and of batches.
    num_teacher_steps
        Steps of the teacher's own training.
    num_helped_steps
        The student's steps with the teacher's soft labels, half and half with the text itself.

    Raises
    ------
    ValueError
        When a number of steps is negative.
    """

    def __init__(self, seed: int, num_teacher_steps: int, num_helped_steps: int) -> None:
        if num_teacher_steps < 0 or num_helped_steps < 0:
            raise ValueError(
                f"{num_teacher_steps} steps for the teacher, {num_helped_steps} with it; expected none below 0"
            )
        generator = meter.reproducible(seed)
        learn, held = english_ids()
        student = language_model(seed=seed)
        super().__init__(student, [adamw(student)], pieces(learn, 16, generator), held)
        teacher = language_model(layers=1, hidden=48, seed=seed + 1000)
        self.teacher = Learning(teacher, [adamw(teacher, 2 * _RATE)], self.draw, held)
        self._left = {"teacher's own training": num_teacher_steps, "with teacher": num_helped_steps}
        self._untaught = super().loss()
        self._name()

    def _name(self) -> None:
        self.phase = next((name for name, left in self._left.items() if left), "alone")

    def objective(self, batch: torch.Tensor) -> torch.Tensor:
        """Half the text, half the teacher, while it helps."""
        if self.phase == "alone":
            return own_loss(self.model, batch)
        ids = batch.to(self.model.device)
        with torch.no_grad():
            taught = self.teacher.model(input_ids=ids).logits
        output = self.model(input_ids=ids, labels=ids)
        half: torch.Tensor = 0.5 * output.loss + 0.5 * towards(output.logits, taught)
        return half

    def step(self) -> None:
        """One step of whoever's turn it is."""
        if self.phase == "teacher's own training":
            self.teacher.step()
        else:
            super().step()
        if self.phase in self._left:
            self._left[self.phase] -= 1
            self._name()

    def loss(self) -> float:
        """The student's held-out loss."""
        return self._untaught if self.phase == "teacher's own training" else super().loss()


def salt(num_teacher_steps: int = 150, num_helped_steps: int = 60) -> Callable[[int], SmallTeacher]:
    """A start for the meter; with 0 helped steps it is the student alone, and needs no teacher."""
    return lambda seed: SmallTeacher(seed, num_teacher_steps if num_helped_steps else 0, num_helped_steps)


@dataclass(frozen=True, eq=False)
class Teacher:
    """A model that was trained beforehand, and the FLOPs of the products that it took."""

    model: Any
    flops: int


@cache
def pool(noise_frac: float = 0.0) -> torch.Tensor:
    """Pieces of English to choose from, shape (2048, 32), of which the first ``noise_frac`` have shuffled letters.

    Raises
    ------
    ValueError
        When the fraction is not in [0, 1).
    """
    if not 0 <= noise_frac < 1:
        raise ValueError(f"noise_frac is {noise_frac}, expected a fraction in [0, 1)")
    generator = torch.Generator().manual_seed(7)
    chosen = corpora.windows(english_ids()[0], NUM_PIECES, LENGTH, generator)
    for row in chosen[: round(noise_frac * NUM_PIECES)]:
        row.copy_(row[torch.randperm(LENGTH, generator=generator)])
    return chosen


def from_pieces(chosen: torch.Tensor, batch_size: int, generator: torch.Generator) -> Callable[[], torch.Tensor]:
    """Draws batches, shape (batch_size, 32), at random from a set of pieces."""
    return lambda: chosen[torch.randint(len(chosen), (batch_size,), generator=generator)]


@cache
def helper(layers: int, hidden: int, num_steps: int) -> Teacher:
    """A model trained on a pool of which half is noise, so that it was told of neither which is which."""
    generator = meter.reproducible(99)
    model = language_model(layers=layers, hidden=hidden, seed=99)
    training = Learning(model, [adamw(model)], from_pieces(pool(NOISE_FRAC), 16, generator), english_ids()[1])
    with FlopCounterMode(display=False) as counter:
        training.step()
    for _ in range(num_steps - 1):
        training.step()
    return Teacher(model, counter.get_total_flops() * num_steps)


@torch.no_grad()
def log_likelihood(model: Any, chosen: torch.Tensor) -> torch.Tensor:
    """Log-probability of each piece after its first letter [nats], shape (pieces,)."""
    ids = chosen.to(model.device)
    logits = model(input_ids=ids).logits[:, :-1]
    of_letters: torch.Tensor = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])
    return of_letters.sum((1, 2)).cpu()


class Selected(Learning):
    """MiniPLM: the pool is scored once, the better half kept, and a student learns from that.

    The score of a piece is its log-probability by the larger model less that by the smaller (arXiv 2410.17215:
    difference sampling). Phases: ``"scoring"`` (128 pieces a step) and ``"training"``.

    Parameters
    ----------
    seed
        Of weights and of batches.
    teacher, reference
        The larger model and the smaller; None for both: no selection, all of the pool is learned from.
    noise_frac
        Which pool.
    """

    def __init__(self, seed: int, teacher: Any = None, reference: Any = None, *, noise_frac: float = 0.0) -> None:
        self.generator = meter.reproducible(seed)
        student = language_model(layers=1, hidden=48, seed=seed)
        self.pool = pool(noise_frac)
        super().__init__(
            student, [adamw(student, 2 * _RATE)], from_pieces(self.pool, 16, self.generator), english_ids()[1]
        )
        self.scorers = (teacher, reference)
        self.kept: torch.Tensor | None = None  # positions in the pool
        self._scores: list[torch.Tensor] = []
        self._untaught = super().loss()
        if teacher is not None:
            self.phase, self.num_tokens = "scoring", SCORED_AT_ONCE * LENGTH

    def step(self) -> None:
        """Score the next 128 pieces, or learn."""
        if self.phase != "scoring":
            super().step()
            return
        first = SCORED_AT_ONCE * len(self._scores)
        chosen = self.pool[first : first + SCORED_AT_ONCE]
        large, small = (log_likelihood(model, chosen) for model in self.scorers)
        self._scores.append(large - small)
        if first + SCORED_AT_ONCE >= len(self.pool):
            self.kept = torch.cat(self._scores).topk(round(KEPT_FRAC * len(self.pool))).indices
            self.draw = from_pieces(self.pool[self.kept], 16, self.generator)
            self.phase, self.num_tokens = "training", 16 * LENGTH

    def loss(self) -> float:
        """The student's held-out loss on English."""
        return self._untaught if self.phase == "scoring" else super().loss()


def miniplm(select: bool = True, *, noise_frac: float = 0.0) -> Callable[[int], Selected]:
    """A start for the meter: a student on the better half of the pool, or on all of it."""
    models = [helper(*sizes).model for sizes in (TEACHER, REFERENCE)] if select else []
    return lambda seed: Selected(seed, *models, noise_frac=noise_frac)


def miniplm_costs(num_steps: int = 100) -> pd.DataFrame:
    """What selection costs beside a student of so many steps: ``flops`` per item, and ``paid``: once or by each."""
    student, teacher, reference = Selected(0), helper(*TEACHER), helper(*REFERENCE)
    batch = pool()[:16]
    with FlopCounterMode(display=False) as training:
        student.step()
    with FlopCounterMode(display=False) as asking:
        log_likelihood(teacher.model, batch)
    with FlopCounterMode(display=False) as scoring:
        for model in (teacher.model, reference.model):
            log_likelihood(model, batch)
    flops = {
        "teacher's own training": teacher.flops,
        "reference's own training": reference.flops,
        "scoring the pool": scoring.get_total_flops() * len(pool()) // len(batch),
        "student's training": training.get_total_flops() * num_steps,
        "instead of scoring: teacher asked in every step": asking.get_total_flops() * num_steps,
    }
    paid = ["once"] * 3 + ["by each student"] * 2
    return pd.DataFrame(
        {"flops": pd.Series(flops), "paid": pd.Series(dict(zip(flops, paid, strict=True)))}
    ).rename_axis("item")


def noise_left(noise_frac: float) -> float:
    """Share of shuffled pieces among those that are kept from a pool of which so much is shuffled."""
    training = miniplm(noise_frac=noise_frac)(0)  # the scores are the same for every seed
    while training.phase == "scoring":
        training.step()
    assert training.kept is not None  # it has been scored
    return float((training.kept < round(noise_frac * len(training.pool))).float().mean())


def students(once: float, each: float, whole: float) -> int:
    """The fewest students for which choosing pays: ``once`` is paid by all together, each one then takes ``each``.

    Without choosing each takes ``whole``; all three in FLOPs. ValueError when choosing saves a student nothing.
    """
    if each >= whole:
        raise ValueError(f"a student takes {each:g} FLOPs with choosing and {whole:g} without: it never pays")
    return math.floor(once / (whole - each)) + 1
