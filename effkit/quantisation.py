"""Tensors in eight bits per value with a scale per group: saved activations, optimizer states, rows of messages."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from effkit.arguments import checked_word


class Format(NamedTuple):
    """An eight-bit format: its dtype, its largest code and its smallest above 0."""

    dtype: torch.dtype
    largest: float
    smallest: float


E4M3 = Format(torch.float8_e4m3fn, 448.0, 2.0**-9)
UINT8 = Format(torch.uint8, 255.0, 1.0)
SIGNED = {"int8": Format(torch.int8, 127.0, 1.0), "fp8_e4m3": E4M3}
# for values that are never negative: an integer need not keep a sign, E4M3 has no unsigned sibling
UNSIGNED = {"int8": UINT8, "fp8_e4m3": E4M3}
# of saved activations; integers count from the least value of a group
AFFINE = {"int8": UINT8, "fp8_e4m3": E4M3, "fp8_e5m2": Format(torch.float8_e5m2, 57344.0, 2.0**-16)}
FORMATS = tuple(AFFINE)
GROUP = 128  # values that share a scale in messages (DeepEP, DeepSeek-V3 2412.19437 section 3.3)

# Values that are in float32 at a time. On a CPU they stay in its cache; on a GPU few kernels have to be launched.
_CHUNK, _GPU_CHUNK = 1 << 18, 1 << 22
_LEAST_LOG_RANGE = 0.01  # of a group whose values are all alike; its power would be infinite


class Quantised(NamedTuple):
    """A tensor in eight bits per value: each is ``scale * code + low``.

    ``codes`` [numel] lie in the order of the contiguous tensor; ``scales`` and ``lows`` (the least value of a group,
    None for float8, where it is 0) are float32, one per group; ``shape`` and ``dtype`` are those of the tensor.
    """

    codes: Tensor
    scales: Tensor
    lows: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    group: int | str


def quantise(x: Tensor, dtype: str = "int8", group: int | str = 128, num_heads: int | None = None) -> Quantised:
    """A floating-point tensor, of any shape and strides, in eight bits per value.

    ``int8`` (codes are unsigned) divides the range of each group into 255 equal steps, ``scale = (max - min) / 255``:
    the error is at most half a step. It is affine, since what follows a ReLU, a GELU or a softmax has one sign and
    would waste half of the codes. Scales and minima stay in float32, so that their rounding adds nothing; with groups
    of 128 that is 136 bytes instead of 512. ``fp8_e4m3`` and ``fp8_e5m2`` scale the largest magnitude of each group to
    the largest of the format (448 and 57344) and round: a relative error of at most 2^-4 and 2^-3 for normal numbers.

    A group that holds an inf or a nan comes back without any finite value: the overflow stays visible. ``group``:
    values in a row that share a scale (the last group may be short); ``"tensor"``: all; ``"head"``: the same slice of
    ``last dimension / num_heads`` channels in all rows (Mesa, arXiv 2111.11124, section 3.1).
    """
    if not x.is_floating_point():
        raise TypeError(f"quantise() takes a floating-point tensor; given: {x.dtype}: keep others as they are")
    check_options(dtype, group, num_heads)
    if num_heads and (x.ndim == 0 or x.shape[-1] % num_heads):
        raise ValueError(
            f"num_heads={num_heads} does not divide the last dimension of {tuple(x.shape)}: give the number of heads "
            'that it holds, or group="tensor"'
        )
    form = AFFINE[dtype]
    flat = x.detach().contiguous().view(-1)
    num_scales = -(-flat.numel() // group) if isinstance(group, int) else num_heads or 1
    scales = torch.zeros(num_scales, dtype=torch.float32, device=x.device)
    lows = None if form.dtype.is_floating_point else torch.zeros_like(scales)
    codes = torch.empty(flat.shape, dtype=form.dtype, device=x.device)
    for cut, grid, of_groups, per_group in _layout(tuple(x.shape), scales, group):
        values, scale = flat[cut].view(grid), scales[of_groups].view(per_group)
        shared = [dim for dim, num in enumerate(per_group) if num == 1]
        low, high = values.amin(shared, keepdim=True).float(), values.amax(shared, keepdim=True).float()
        scale.copy_((torch.maximum(high, -low) if lows is None else high.sub_(low)).div_(form.largest))
        if lows is not None:
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
    num, heads = prod(shape), scales.numel()
    if num and group == "tensor":
        yield slice(None), (num, 1), slice(None), (1, 1)
    elif num and group == "head":
        yield slice(None), (-1, heads, shape[-1] // heads), slice(None), (1, heads, 1)
    elif isinstance(group, int):
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


def check_options(dtype: str, group: int | str, num_heads: int | None) -> None:
    """Raise a ValueError unless :func:`quantise` knows this dtype and this group."""
    checked_word("dtype", dtype, FORMATS)
    if group not in ("tensor", "head") and (isinstance(group, bool) or not (isinstance(group, int) and group >= 1)):
        raise ValueError(f'group is a number of values from 1 up, "tensor" or "head"; given: {group!r}')
    if (group == "head") != (num_heads is not None) or (num_heads is not None and num_heads < 1):
        raise ValueError(
            f'num_heads is the number of heads, given with group="head" and with no other; given: {num_heads!r} with '
            f"group={group!r}"
        )


class QuantisedState(NamedTuple):
    """An optimizer's state: ``codes`` [groups, group], ``largest`` value and ``power`` [groups, 1] in float32."""

    codes: Tensor
    largest: Tensor
    power: Tensor


def quantise_state(values: Tensor, form: Format, group: int, *, expand: bool) -> QuantisedState:
    """Float32 values of any shape in groups of neighbours, each with its own scale; fewer values are one group.

    With ``expand``, values x of a group become sign(x) |x|^k first, where k makes the group's dynamic range that of
    the format (COAT, arXiv 2410.19313, Section 4)::

        k = log(largest code / smallest code above 0) / log(max |x| / min |x|)

    over the x that are not 0. Here |x| is divided by max |x| before the power instead of after, which is the same
    number without overflow. The last group is filled up with zeros, which the minimum leaves out.
    """
    size = min(group, values.numel())
    rows = functional.pad(values.flatten(), (0, -values.numel() % size)).view(-1, size)
    magnitudes = rows.abs()
    largest = magnitudes.amax(dim=1, keepdim=True)
    power = torch.ones_like(largest)
    if expand:
        least = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(dim=1, keepdim=True)
        log_range = (largest.log() - least.log()).clamp_min(_LEAST_LOG_RANGE)  # a group of zeros has -inf here
        power = torch.tensor(form.largest / form.smallest, device=values.device).log() / log_range
    # a group of zeros stays one
    scaled = magnitudes.div_(largest.clamp_min(torch.finfo(torch.float32).tiny)).pow_(power).mul_(form.largest)
    codes = scaled.copysign_(rows)
    return QuantisedState((codes if form.dtype.is_floating_point else codes.round_()).to(form.dtype), largest, power)


def dequantise_state(state: QuantisedState, form: Format, shape: torch.Size) -> Tensor:
    """The values of :func:`quantise_state` again, in float32 and this shape."""
    codes = state.codes.float()
    magnitudes = codes.abs().div_(form.largest).pow_(1 / state.power).mul_(state.largest)
    return magnitudes.copysign_(codes).flatten()[: shape.numel()].view(shape)


def quantise_rows(rows: Tensor) -> Tensor:
    """Rows [num_rows, hidden] in E4M3, and behind each the float32 scales of its groups of 128: uint8 bytes.

    >>> quantise_rows(torch.ones(2, 256)).shape  # a byte per value, and two scales of four bytes
    torch.Size([2, 264])
    """
    groups = rows.float().reshape(len(rows), rows.shape[1] // GROUP, GROUP)
    scale = groups.abs().amax(-1).clamp(min=1e-12) / E4M3.largest
    codes = (groups / scale[..., None]).to(E4M3.dtype).view(rows.shape)
    return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8).view(len(rows), -1)], dim=1)


def dequantise_rows(message: Tensor, hidden: int) -> Tensor:
    """The rows of :func:`quantise_rows` again, in float32."""
    codes = message[:, :hidden].contiguous().view(E4M3.dtype).float().view(len(message), hidden // GROUP, GROUP)
    return (codes * message[:, hidden:].contiguous().view(torch.float32)[..., None]).view(len(message), hidden)
