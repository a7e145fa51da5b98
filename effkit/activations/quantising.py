"""Tensors in eight bits per value: integers between a group's extremes, or scaled floats."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

_FLOATS = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
FORMATS = ("int8", *_FLOATS)
_LEVELS = 255
# Values that are in float32 at a time. On a CPU they stay in its cache; on a GPU few kernels have to be launched.
_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 22


class Quantised(NamedTuple):
    """A tensor in eight bits per value.

    Attributes
    ----------
    codes
        [numel] uint8 or float8, in the order of the contiguous tensor.
    scales
        float32, one per group: the value of a code is ``scale * code + low``.
    lows
        float32, the smallest value of each group; ``None`` for float8, where it is 0.
    shape, dtype, group
        Of the tensor that was given, and what shares a scale.
    """

    codes: Tensor
    scales: Tensor
    lows: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int | str


def quantise(x: Tensor, dtype: str = "int8", group: int | str = 128, num_heads: int | None = None) -> Quantised:
    """The tensor in eight bits per value, and a scale per group.

    ``int8`` (codes are unsigned) divides the range of each group into 255 equal steps, ``scale = (max - min) / 255``:
    the error is at most half a step. It is affine, since what follows a ReLU, a GELU or a softmax has one sign and
    would waste half of the codes. Scales and minima stay in float32, so that their rounding adds nothing; with groups
    of 128 that is 136 bytes instead of 512. ``fp8_e4m3`` and ``fp8_e5m2`` scale the largest magnitude of each group to
    the largest of the format (448 and 57344) and round: a relative error of at most 2^-4 and 2^-3 for normal numbers.

    A group that holds an inf or a nan comes back without any finite value: the overflow stays visible.

    Parameters
    ----------
    x
        Floating point, any shape and strides.
    dtype
        One of the above.
    group
        Values in a row that share a scale (the last group may be short); ``"tensor"``: all; ``"head"``: the same
        slice of ``last dimension / num_heads`` channels in all rows (Mesa, arXiv 2111.11124, section 3.1).
    num_heads
        For ``"head"``: divides the last dimension.

    Returns
    -------
    Quantised
        For :func:`dequantise`.
    """
    _check(x, dtype, group, num_heads)
    flat = x.detach().contiguous().view(-1)
    num_scales = -(-flat.numel() // group) if isinstance(group, int) else num_heads if group == "head" else 1
    scales = torch.zeros(num_scales or 0, dtype=torch.float32, device=x.device)
    lows = torch.zeros_like(scales) if dtype == "int8" else None
    codes = torch.empty(flat.shape, dtype=_FLOATS.get(dtype, torch.uint8), device=x.device)
    for cut, grid, of_groups, per_group in _layout(tuple(x.shape), scales, group):
        values, scale = flat[cut].view(grid), scales[of_groups].view(per_group)
        shared = [dim for dim, num in enumerate(per_group) if num == 1]
        low, high = values.amin(shared, keepdim=True).float(), values.amax(shared, keepdim=True).float()
        if lows is None:
            scale.copy_(torch.maximum(high, -low).div_(torch.finfo(codes.dtype).max))
        else:
            scale.copy_(high.sub_(low).div_(_LEVELS))
            lows[of_groups].view(per_group).copy_(low)
        # a group of equal values has no step, and all of its codes are 0
        per_step = scale.reciprocal().nan_to_num_(nan=0.0, posinf=0.0)
        for part, steps, start, out in _chunks(values, per_step, low, codes[cut].view(grid)):
            out.copy_(part.float().mul(steps) if lows is None else part.float().sub(start).mul_(steps).round_())
    return Quantised(codes, scales, lows, tuple(x.shape), x.dtype, group)


def dequantise(q: Quantised) -> Tensor:
    """The tensor that was quantised, contiguous, in its shape and dtype."""
    flat = torch.empty(q.codes.shape, dtype=q.dtype, device=q.codes.device)
    for cut, grid, of_groups, per_group in _layout(q.shape, q.scales, q.group):
        scale = q.scales[of_groups].view(per_group)
        low = scale if q.lows is None else q.lows[of_groups].view(per_group)
        for out, step, start, code in _chunks(flat[cut].view(grid), scale, low, q.codes[cut].view(grid)):
            exact = out if q.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
            _decode(code, exact).mul_(step)
            if q.lows is not None:
                exact.add_(start)
            if exact is not out:
                out.copy_(exact)
    return flat.view(q.shape)


def _decode(codes: Tensor, out: Tensor) -> Tensor:
    if codes.dtype != torch.float8_e4m3fn or codes.device.type != "cpu":
        return out.copy_(codes)
    # torch's own conversion is 8 times slower on a CPU. The bits, moved, are a float16 whose exponent is less by 8.
    half = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000).view(torch.float16)
    return out.copy_(half).mul_(2**8)


def _layout(
    shape: tuple[int, ...], scales: Tensor, group: int | str
) -> Iterator[tuple[slice, tuple[int, ...], slice, tuple[int, ...]]]:
    """Which values, as what grid [rows, ...], go with which scales, as what [rows or 1, ...] that broadcasts to it."""
    num = prod(shape)
    if num == 0:
        return
    if group == "tensor":
        yield slice(None), (num, 1), slice(None), (1, 1)
    elif group == "head":
        heads = scales.numel()
        yield slice(None), (-1, heads, shape[-1] // heads), slice(None), (1, heads, 1)
    else:
        assert isinstance(group, int)
        whole, rest = divmod(num, group)
        if whole:
            yield slice(whole * group), (whole, group), slice(whole), (whole, 1)
        if rest:
            yield slice(whole * group, None), (1, rest), slice(whole, None), (1, 1)


def _chunks(values: Tensor, scale: Tensor, low: Tensor, codes: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of each, so many that a float32 copy of them is small."""
    rows = values.shape[0]
    step = max(1, (_CHUNK if values.device.type == "cpu" else _GPU_CHUNK) * rows // values.numel())
    per_row = (t.expand(rows, *t.shape[1:]) for t in (scale, low))
    return zip(*(t.split(step) for t in (values, *per_row, codes)), strict=True)


def _check(x: Tensor, dtype: str, group: int | str, num_heads: int | None) -> None:
    if not x.is_floating_point():
        raise TypeError(f"quantise() takes a floating-point tensor; given: {x.dtype}: keep others as they are")
    check_options(dtype, group, num_heads)
    if group == "head" and num_heads and (x.ndim == 0 or x.shape[-1] % num_heads):
        raise ValueError(
            f"num_heads={num_heads} does not divide the last dimension of {tuple(x.shape)}: give the number of heads "
            'that it holds, or group="tensor"'
        )


def check_options(dtype: str, group: int | str, num_heads: int | None) -> None:
    """Raise a ValueError unless :func:`quantise` knows this dtype and this group."""
    if dtype not in FORMATS:
        raise ValueError(f"dtype is one of {', '.join(FORMATS)}; given: {dtype!r}")
    if group not in ("tensor", "head") and not (isinstance(group, int) and group >= 1):
        raise ValueError(f'group is a number of values from 1 up, "tensor" or "head"; given: {group!r}')
    if (group == "head") != (num_heads is not None) or (num_heads is not None and num_heads < 1):
        raise ValueError(
            f'num_heads is the number of heads, given with group="head" and with no other; given: {num_heads!r} with '
            f"group={group!r}"
        )
