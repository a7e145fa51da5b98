"""What levers and reports are given: studies, which use them, so that they cannot name the classes themselves."""

from typing import Any

Training = Any  # effkit.advice.training_study.TrainingStudy
Recorded = Any  # effkit.advice.recorded_study.RecordedStudy
Reported = Any  # any effkit.advice.studies.Study
