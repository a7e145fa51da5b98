"""Protocols: what levers and reports may ask of a study, so that they need not import the studies that use them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import pandas as pd
import torch

from effkit.account import Account
from effkit.advice.examples import Examples
from effkit.advice.experts import Experts
from effkit.advice.leaks import Kept
from effkit.advice.overviews import Overview
from effkit.advice.probing import Peaks, Step
from effkit.advice.step_hooks import Heard
from effkit.captured import Capture
from effkit.padding import Plan
from effkit.receipt import Receipt


class Reported(Protocol):
    """What a report shows: any study."""

    what: str
    receipts: list[Receipt]

    def overview(self) -> Overview: ...


class Training(Protocol):
    """A training loop whose step can be run; :class:`effkit.advice.training_study.TrainingStudy` says what each is."""

    step: Step
    model: torch.nn.Module
    batches: list[Any]
    examples: Examples | None
    epoch: Account | None
    heard: Heard
    rows_ns: dict[str, float]
    steps_ns: list[int]
    waiting_ns: float
    loop_ns: float
    num_ranks: int

    @property
    def computing_ns(self) -> float: ...
    @property
    def largest(self) -> Any: ...
    @property
    def peaks(self) -> Peaks: ...
    @property
    def account(self) -> Account: ...
    @property
    def memory(self) -> Account: ...
    @property
    def kept(self) -> Kept: ...
    @property
    def lab_base(self) -> Account: ...
    @property
    def experts(self) -> Experts | None: ...
    @property
    def expert_layer(self) -> Account: ...
    def held(self) -> AbstractContextManager[None]: ...
    def measured_plan(self, also: Plan | None) -> Account: ...
    def _noted(self, receipt: Receipt) -> None: ...


class Recorded(Protocol):
    """A run that is over; :class:`effkit.advice.recorded_study.RecordedStudy` says what each is."""

    trace: str | Any | Sequence[str | Any] | None
    step: str | None

    @property
    def time(self) -> Account | None: ...
    @property
    def of_ranks(self) -> Account | None: ...
    @property
    def inside(self) -> Capture: ...
    @property
    def operators(self) -> pd.DataFrame: ...
    @property
    def num_steps(self) -> int: ...
    @property
    def saw_device(self) -> bool: ...
