"""Advice: one's own model, the four analyses together, what would help, ranked by predicted gain."""

from typing import TYPE_CHECKING

from effkit.lazy import lazily

if TYPE_CHECKING:
    from effkit.advice.callbacks import lightning_callback, trainer_callback
    from effkit.advice.levers import Advice, Lever
    from effkit.advice.overviews import Overview
    from effkit.advice.recording_ranks import record
    from effkit.advice.studies import Study
    from effkit.advice.study_entry import study

__all__ = ["Advice", "Lever", "Overview", "Study", "lightning_callback", "record", "study", "trainer_callback"]

__getattr__ = lazily(__name__, {
    "callbacks": ["lightning_callback", "trainer_callback"], "levers": ["Advice", "Lever"], "overviews": ["Overview"],
    "recording_ranks": ["record"], "studies": ["Study"], "study_entry": ["study"],
})  # fmt: skip

__dir__ = __all__.copy  # what a reader's Tab shows
