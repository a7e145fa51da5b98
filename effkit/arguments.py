"""What is given to a public function, checked before anything runs: each refusal is one sentence."""

from __future__ import annotations

import inspect
import operator
import sys
from types import FunctionType
from typing import Any

LOSS = "(output) -> scalar, such as lambda output: criterion(output, labels)"
# By name, so that nothing is loaded for it. FullyShardedDataParallel has flat parameters, which nobody here follows
_FLAT = ("FullyShardedDataParallel",)
_SHARDED = ("DTensor", "FSDPModule", *_FLAT)
OPTIMIZER = "(parameters) -> optimizer, such as torch.optim.AdamW"


def described(value: Any) -> str:
    """What this is, for the end of a sentence."""
    if isinstance(value, type | FunctionType):
        return f"the {'class' if isinstance(value, type) else 'function'} {value.__name__}"
    return repr(value) if isinstance(value, str | int | float) else type(value).__name__


def checked_whole(name: str, value: Any, least: int) -> int:
    """The value as an int, if it is a whole number from ``least`` on; numpy's are, True is not."""
    try:
        integer = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        integer = None
    if integer is None or integer < least:
        raise ValueError(f"{name} is a whole number from {least} on; given: {value!r}")
    return integer


def checked_number(name: str, value: Any, least: float = 0.0, most: float = sys.float_info.max, said: str = "") -> Any:
    """The value as a number of Python's, if it lies in this range; NaN lies in none."""
    plain = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if isinstance(plain, bool) or not isinstance(plain, int | float) or not least <= plain <= most:
        raise ValueError(f"{name} is {said or f'a number from {least:g} on'}; given: {value!r}")
    return plain


def checked_amount(name: str, value: Any) -> Any:
    """The value as a number of Python's, if it is finite and above 0."""
    return checked_number(name, value, sys.float_info.min, said="a number above 0, and finite")


def checked_word(name: str, value: Any, words: Any) -> Any:
    """The value, if it is one of these words or numbers; True is none."""
    if not isinstance(value, str | int | None) or isinstance(value, bool) or value not in words:
        raise ValueError(f"{name} is one of {', '.join(map(str, words))}; given: {value!r}")
    return value


def checked_function(name: str, value: Any, form: str, *, num: int = 1, classes: bool = False) -> None:
    """TypeError unless this is None, or can be called with ``num`` arguments; a class only where ``classes`` may be."""
    try:
        possible = value is None or (callable(value) and (classes or not isinstance(value, type)))
        if possible and value is not None:
            inspect.signature(getattr(value, "forward", value)).bind(*range(num))
    except TypeError:
        possible = False
    except ValueError:  # built in: it does not say what it takes
        pass
    if not possible:
        raise TypeError(f"{name} is a function {form}; given: {described(value)}")


def checked_model(model: Any, *, runs: bool = True, peak: bool = False, shards: bool = False) -> None:
    """TypeError for what is no module; ValueError for one in shards, unless ``shards`` may be; where it ``runs``, also
    for one that holds no values, or is where nobody can tell when work has ended, or, where its ``peak`` is asked for,
    how much memory it takes."""
    import torch

    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a torch module, an instance with its parameters; given: {described(model)}")
    refused = _FLAT if shards else _SHARDED
    if any(kind.__name__ in refused for one in (*model.modules(), *model.parameters()) for kind in type(one).__mro__):
        raise ValueError(
            f"{type(model).__name__} is in shards (FSDP, DTensor): give the model as it is before it is sharded, and "
            "say how with world_size= and shard= of activations.forecast() or measure(); or let each rank call "
            "effkit.advice.record(folder, step, loader)"
        )
    if runs and any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__} is on the meta device and cannot run: give it memory with to_empty(device=...) "
            "and load its weights, or ask activations.forecast()"
        )
    for kind in {parameter.device.type for parameter in model.parameters()} - {"cpu"} if runs else ():
        waited_for, lacks = torch.accelerator.current_accelerator(), ""
        if waited_for is None or waited_for.type != kind:
            lacks = "torch cannot wait: times would be the host's"
        elif peak and not hasattr(torch.get_device_module(kind), "max_memory_allocated"):
            lacks = "torch counts no peak of memory; capture() can time its steps"
        if lacks:
            raise ValueError(f"{type(model).__name__} is on {kind}, for which {lacks}. Move it to the CPU")


def checked_training(
    model: Any, loss: Any, optimizer: Any, make_batch: Any, form: str, *, runs: bool = True, shards: bool = False
) -> None:
    """TypeError or ValueError unless training steps can be made of these; ``form`` is that of ``make_batch``."""
    checked_model(model, runs=runs, peak=True, shards=shards)
    checked_function("loss", loss, LOSS)
    checked_function("optimizer", optimizer, OPTIMIZER, classes=True)
    checked_function("make_batch", make_batch, form, num=2)


def checked_loader(loader: Any) -> None:
    """TypeError for what cannot be iterated."""
    if isinstance(loader, str) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        raise TypeError(f"loader yields batches, as a DataLoader or a list does; given: {described(loader)}")


def checked_step(step: Any, loader: Any) -> None:
    """TypeError unless this is a training step of the loader's batches, or of its own without a loader."""
    checked_function("step", step, "step(batch), or step() without a loader", num=0 if loader is None else 1)
    if loader is not None:
        checked_loader(loader)


def shapes(model: Any) -> list[tuple[int, ...]]:
    """Of its parameters: where they differ, so do two models."""
    return [tuple(parameter.shape) for parameter in model.parameters()]


def checked_same_model(model: Any, base_shapes: Any) -> None:
    """ValueError for a model whose parameters have other :func:`shapes` than that of the base."""
    if shapes(model) != base_shapes:
        raise ValueError(f"base is an account of another model: this {type(model).__name__} has parameters of other "
                         "shapes; measure it without base=")  # fmt: skip
