"""A study from inside of a trainer: callbacks for Hugging Face's Trainer and for Lightning's."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader

from effkit.advice.memory_history import MemoryHistory
from effkit.advice.recording_ranks import RankRecording, place
from effkit.advice.studies import Study
from effkit.advice.study_entry import checked_options, study
from effkit.training import forward, own_loss

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
_LOGS = ("log", "log_dict")  # of a LightningModule: they write into the trainer's own results

Result = TypeVar("Result")


class _Watching:
    """What the two callbacks share: each of several ranks records, and the history of memory is kept."""

    study: Study | None = None
    _recording: RankRecording | None = None
    _history: MemoryHistory | None = None

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__()
        self._memory_history, folder = options.pop("memory_history", False), options.pop("folder", None)
        self._folder = None if folder is None else Path(folder)
        self._options = options  # of study()

    def _begin(self, home: str | Path) -> bool:
        """To be called as training begins; returns whether this is the only rank, and may be studied now."""
        folder, (rank, num_ranks) = self._folder or Path(home) / "effkit", place()
        for left in (self._recording, self._history):  # by a training that broke off
            if left is not None:
                left.close()
        if self._memory_history:
            self._history = _tried(MemoryHistory, folder / "memory" / f"rank{rank}.pickle")
        if num_ranks > 1:
            self._recording = _tried(RankRecording, folder, self._options.get("num_batches", 4), rank, num_ranks)
        return num_ranks == 1

    def _step_taken(self) -> None:
        if self._recording is not None:
            _tried(self._recording.step_taken)

    def _end(self) -> None:
        if self._recording is not None:
            self.study = _tried(self._recording.finish)
        if self._history is not None:
            self._history.close()


def trainer_callback(
    *, loss: Callable[[Any], Any] | None = None, num_batches: int | None = None, num_ranks: int | None = None,
    link_bytes_per_s: float | None = None, folder: str | Path | None = None, memory_history: bool = False,
) -> Any:  # fmt: skip
    """A ``transformers.TrainerCallback`` that studies the training as it begins, and lets it go on unchanged.

    ::

        callback = ek.advice.trainer_callback()
        Trainer(model, args, train_dataset=texts, callbacks=[callback]).train()
        callback.study.advise()

    A step is what the trainer does for one batch: the batch goes to the model's device, forward (under autocast where
    ``args`` say bf16 or fp16), backward, the optimizer's own step. A loss of the trainer's own, clipping and
    accumulation are left out.

    Of several ranks each records some of the training's own steps, whatever is in them: its loss, accumulation,
    clipping, collectives. No step is added. When training ends, rank 0 writes the page of all ranks.

    Its options are those of :func:`effkit.study`, and two more. ImportError without transformers.

    Parameters
    ----------
    num_batches
        Of several ranks: steps to record, 4 unless given, after 2 that are not.
    folder
        Where ranks write their traces, and rank 0 ``report.html``; ``effkit`` in the trainer's own unless given. Ranks
        whose folder is another machine's are missing on the page.
    memory_history
        Keep what the CUDA allocator did last. When memory runs out, a warning says in one sentence who asked for how
        much and who holds most, and a snapshot is in ``memory`` in the folder.

    Returns
    -------
    TrainerCallback
        ``.study`` is the Study once training has begun; of several ranks, on rank 0, once it has ended. Where it could
        not be made ``.study`` stays None, and a warning says why: a training is not given up for it.
    """
    options = checked_options(**locals())
    try:
        from transformers import TrainerCallback
    except ImportError as error:
        raise ImportError("trainer_callback() needs the package transformers: pip install transformers") from error

    class StudyCallback(_Watching, TrainerCallback):
        def on_train_begin(
            self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None,
            train_dataloader: Any = None, **_: Any,
        ) -> None:  # fmt: skip
            casts = {"bf16": torch.bfloat16, "fp16": torch.float16}
            cast = next((dtype for name, dtype in casts.items() if getattr(args, name, False)), None)
            kind = next(model.parameters()).device.type

            def loss_of(batch: Any) -> torch.Tensor:
                with nullcontext() if cast is None else torch.autocast(kind, cast):
                    return own_loss(forward(model, batch))

            if self._begin(args.output_dir):
                self.study = _studied(model, train_dataloader, optimizer, loss_of, self._options)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._step_taken()

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._end()

    return StudyCallback(options)


def lightning_callback(
    *, loss: Callable[[Any], Any] | None = None, num_batches: int | None = None, num_ranks: int | None = None,
    link_bytes_per_s: float | None = None, folder: str | Path | None = None, memory_history: bool = False,
) -> Any:  # fmt: skip
    """A Lightning ``Callback`` that studies the training as it begins, and lets it go on unchanged.

    ::

        callback = ek.advice.lightning_callback()
        Trainer(callbacks=[callback]).fit(module, loader)
        callback.study.advise()

    A step is the module's ``training_step`` in the trainer's precision, backward, and its optimizer's step; what the
    module logs meanwhile is not kept. Clipping, accumulation and other hooks are left out. Otherwise as
    :func:`trainer_callback`, of ``lightning.pytorch`` or ``pytorch_lightning``, whichever is in use; ImportError with
    neither.
    """
    options = checked_options(**locals())
    base: Any = _lightning().Callback

    class StudyCallback(_Watching, base):
        _num_updates = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            def loss_of(batch: Any) -> torch.Tensor:
                with ExitStack() as stack:
                    if (precision := getattr(trainer, "precision_plugin", None)) is not None:
                        stack.enter_context(precision.train_step_context())
                    for name in _LOGS:
                        stack.enter_context(mock.patch.object(pl_module, name, _nothing, create=True))
                    output = pl_module.training_step(batch, 0)
                return own_loss(output["loss"] if isinstance(output, Mapping) else output)

            if not self._begin(trainer.default_root_dir):
                return
            loader, optimizers = trainer.train_dataloader, trainer.optimizers
            if len(optimizers) != 1 or not getattr(pl_module, "automatic_optimization", True):
                _excuse(f"the module takes its steps itself, or with {len(optimizers)} optimizers: give "
                        "effkit.study() a step of your own")  # fmt: skip
                return
            self.study = _studied(pl_module, loader, optimizers[0], loss_of, self._options)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if trainer.global_step != self._num_updates:  # gradients of several batches may go into one step
                self._num_updates = trainer.global_step
                self._step_taken()

        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            self._end()

    return StudyCallback(options)


def _lightning() -> Any:
    """The package that is in use, else the one that is there: a Trainer of one knows no Callback of the other."""
    for name in (*(name for name in _LIGHTNING if name in sys.modules), *_LIGHTNING):
        try:
            return import_module(name)
        except ImportError:
            continue
    raise ImportError("lightning_callback() needs the package lightning or pytorch_lightning: pip install lightning")


def _studied(
    model: torch.nn.Module, loader: Any, optimizer: Any, loss_of: Callable[[Any], torch.Tensor], options: dict[str, Any]
) -> Study | None:
    """The study of a trainer's step; None, and a warning, where it cannot be made."""
    update = unwrapped(optimizer)

    def step(batch: Any) -> None:
        model.train()
        update.zero_grad()
        loss_of(_moved(batch, model)).backward()
        update.step()

    return _tried(study, step=step, model=model, loader=own_loader(loader), **options)


def _tried(call: Callable[..., Result], *given: Any, **options: Any) -> Result | None:
    """What it returns; None, and a warning, where it fails: a training that was planned for days goes on."""
    try:
        return call(*given, **options)
    except Exception as error:
        _excuse(f"{type(error).__name__}: {error}")
        return None


def _excuse(reason: str) -> None:
    warnings.warn(f"effkit did not study this training, which goes on: {reason}", stacklevel=3)


def unwrapped(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer itself, not the one that accelerate or Lightning put around it."""
    while isinstance(inner := getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
        optimizer = inner
    return optimizer


def own_loader(loader: Any) -> Any:
    """A copy of the DataLoader itself: accelerate's counts iterations, and workers that persist are the training's."""
    loader = getattr(loader, "base_dataloader", loader)
    if not isinstance(loader, DataLoader):
        return loader
    copied = copy.copy(loader)
    copied._iterator = None
    return copied


def _moved(batch: Any, model: torch.nn.Module) -> Any:
    device = next(model.parameters()).device
    # transformers' BatchEncoding and its like are mappings that torch does not look into
    plain = dict(batch) if isinstance(batch, Mapping) or hasattr(batch, "keys") else batch
    return tree_map_only(torch.Tensor, lambda tensor: tensor.to(device), plain)


def _nothing(*_: Any, **__: Any) -> None:
    """Takes the place of a module's log(): a studied step writes nothing into the training's log."""
