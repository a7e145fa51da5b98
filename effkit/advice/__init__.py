"""Advice: one's own model, the four analyses together, what would help, ranked by predicted gain."""

from __future__ import annotations

from effkit.advice.levers import Advice, Lever
from effkit.advice.studies import Study
from effkit.advice.studying import study

__all__ = ["Advice", "Lever", "Study", "study"]
