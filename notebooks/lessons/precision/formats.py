"""Numbers in fewer bits: a tensor cast to a format and back, and a model that computes with some tensors cast."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lessons.precision.small_language import matrices

# How many bits, and the torch type of a float; integers are symmetric around 0
_BITS = {"float32": 32, "bfloat16": 16, "fp8_e4m3": 8, "fp8_e5m2": 8, "int8": 8, "int4": 4}
_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FORMATS = tuple(_BITS)
ROLES = ("weights", "activations", "gradients")
_SCALE_BYTES = 4


def cast(x: Tensor, number_format: str) -> Tensor:
    """The tensor rounded to a format, back in its own dtype: what a computation in that format would see.

    Eight and four bits have one scale per tensor, by which the largest magnitude is the largest number of the format
    (127 and 7 for integers, 448 for e4m3, 57344 for e5m2), and are rounded to the nearest; float32 and bfloat16 need no
    scale. The 8-bit floats are those of arXiv 2209.05433, as torch has them.

    Parameters
    ----------
    x
        Any shape.
    number_format
        One of ``FORMATS``.

    Raises
    ------
    ValueError
        For another format.
    """
    _check(number_format)
    if number_format == "float32":
        return x.clone()
    if number_format == "bfloat16":
        return x.to(torch.bfloat16).to(x.dtype)
    largest = x.abs().amax()
    most = torch.finfo(_FLOATS[number_format]).max if number_format in _FLOATS else 2 ** (_BITS[number_format] - 1) - 1
    scale = torch.where(largest > 0, largest / most, torch.ones_like(largest))
    scaled = x / scale
    rounded = scaled.to(_FLOATS[number_format]).to(x.dtype) if number_format in _FLOATS else scaled.round()
    return rounded * scale


def size_bytes(x: Tensor, number_format: str) -> int:
    """Bytes of the tensor in a format, its float32 scale included; two of four bits share a byte."""
    _check(number_format)
    return -(-x.numel() * _BITS[number_format] // 8) + (_SCALE_BYTES if _BITS[number_format] <= 8 else 0)


def times_coarser(number_format: str, than: str) -> float:
    """How many times as large the rounding step of a format is as another's, both floats or both integers.

    A float's step is 2^-m of its value, with m bits of mantissa; that of an integer of b bits is the largest magnitude
    over 2^(b - 1) - 1.

    >>> times_coarser("fp8_e5m2", "fp8_e4m3"), round(times_coarser("int4", "int8"), 2)
    (2.0, 18.14)
    """
    whole = [name.startswith("int") for name in (number_format, than)]
    if whole[0] != whole[1]:
        raise ValueError(f"{number_format} and {than}: expected two floats or two integers, whose steps are alike")
    return _step(number_format) / _step(than)


def _step(number_format: str) -> float:
    _check(number_format)
    if number_format.startswith("int"):
        return 1 / (2 ** (_BITS[number_format] - 1) - 1)
    return torch.finfo(_FLOATS.get(number_format) or getattr(torch, number_format)).eps


@contextmanager
def low_precision(model: nn.Module, number_format: str, roles: Collection[str]) -> Iterator[None]:
    """Within it, the linear layers of the blocks compute with tensors that are cast.

    Weights are cast once, when it is entered, and are their exact selves again afterwards: an optimizer that steps
    outside of it keeps float32 masters. Activations are what a layer reads, gradients what comes back to its output;
    rounding counts as having slope 1.

    Parameters
    ----------
    roles
        Some of ``ROLES``.

    Raises
    ------
    ValueError
        For another format or role.
    """
    _check(number_format)
    unknown = set(roles) - set(ROLES)
    if unknown:
        raise ValueError(f"roles are some of {', '.join(ROLES)}; given: {', '.join(sorted(unknown))}")
    layers = list(matrices(model).values())
    exact = [layer.weight.detach().clone() for layer in layers]

    def read(_: nn.Module, given: Any) -> Any:
        x = given[0]
        return (x + (cast(x.detach(), number_format) - x.detach()), *given[1:])

    def listen(_: nn.Module, __: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: cast(gradient, number_format))

    handles = []
    try:
        for layer, weight in zip(layers, exact, strict=True):
            if "weights" in roles:
                layer.weight.data.copy_(cast(weight, number_format))
            if "activations" in roles:
                handles.append(layer.register_forward_pre_hook(read))
            if "gradients" in roles:
                handles.append(layer.register_forward_hook(listen))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer, weight in zip(layers, exact, strict=True):
            layer.weight.data.copy_(weight)


def weight_bytes(model: nn.Module, number_format: str) -> int:
    """Bytes of the weights that :func:`low_precision` casts."""
    return sum(size_bytes(layer.weight, number_format) for layer in matrices(model).values())


def _check(number_format: str) -> None:
    if number_format not in _BITS:
        raise ValueError(f"the format is {number_format!r}, expected one of {', '.join(FORMATS)}")
