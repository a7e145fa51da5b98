"""Levers on a mixture of experts, as it would be on several ranks: the MoE lab, asked about the user's layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from effkit.advice.levers import Lever

if TYPE_CHECKING:
    from effkit.advice.training_study import TrainingStudy


def levers(study: TrainingStudy) -> list[Lever]:
    return []
