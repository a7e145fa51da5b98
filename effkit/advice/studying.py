"""study(): the door."""

from __future__ import annotations

from typing import Any

from effkit.advice.studies import Study


def study(step=None, model=None, loader=None, **options: Any) -> Study:
    from effkit.advice.training_study import TrainingStudy
    return TrainingStudy(step, model, loader, **options)
