"""TrainingStudy: a training loop, and what would help it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from effkit.advice import memory_levers, time_levers
from effkit.advice.levers import Advice, Lever, ranked
from effkit.advice.training_loop import TrainingLoop


class TrainingStudy(TrainingLoop):
    """A training loop, with levers on its time and its memory."""

    @cached_property
    def _tried(self) -> dict[int | None, list[Lever]]:
        """Levers on time by budget: to try them takes seconds."""
        return {}

    def _advise(self, goal: str, budget_bytes: int | None, **more: Any) -> Advice:
        if goal == "memory":
            return memory_levers.advise(self, budget_bytes, **more)
        if budget_bytes not in self._tried:
            self._tried[budget_bytes] = time_levers.levers(self, budget_bytes)
        return ranked(goal, self._tried[budget_bytes], **more)
