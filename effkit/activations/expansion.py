"""Optimizer states in eight bits: a scale per group, and COAT's expansion of a group to the whole range of a format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn import functional

_LEAST_LOG_RANGE = 0.01  # of a group whose values are all alike; its power would be infinite


@dataclass(frozen=True)
class Format:
    """An eight-bit format: its dtype, its largest code and its smallest above 0."""

    dtype: torch.dtype
    largest: float
    smallest: float


SIGNED = {
    "int8": Format(torch.int8, 127.0, 1.0),
    "fp8_e4m3": Format(torch.float8_e4m3fn, 448.0, 2.0**-9),
}
# the same for values that are never negative: an integer need not keep a sign, E4M3 has no unsigned sibling
UNSIGNED = {**SIGNED, "int8": Format(torch.uint8, 255.0, 1.0)}


class Packed(NamedTuple):
    """Values in groups: ``codes`` [groups, group], ``largest`` and ``power`` [groups, 1] in float32."""

    codes: torch.Tensor
    largest: torch.Tensor
    power: torch.Tensor


def pack(values: torch.Tensor, form: Format, group: int, *, expand: bool) -> Packed:
    """Quantise values in groups of neighbours, each with its own scale.

    With ``expand``, values x of a group become sign(x) |x|^k first, where k makes the group's dynamic range that of
    the format (COAT, arXiv 2410.19313, Section 4)::

        k = log(largest code / smallest code above 0) / log(max |x| / min |x|)

    over the x that are not 0. Here |x| is divided by max |x| before the power instead of after, which is the same
    number without overflow. A group smaller than ``group`` is filled up with zeros, which the minimum leaves out.

    Parameters
    ----------
    values
        Any shape, float32.
    group
        Values per group; a tensor of fewer values is one group.
    """
    size = min(group, values.numel())
    flat = values.flatten()
    rows = functional.pad(flat, (0, -flat.numel() % size)).view(-1, size)
    magnitudes = rows.abs()
    largest = magnitudes.amax(dim=1, keepdim=True)
    power = torch.ones_like(largest)
    if expand:
        least = magnitudes.masked_fill(magnitudes == 0, torch.inf).amin(dim=1, keepdim=True)
        log_range = (largest.log() - least.log()).clamp_min(_LEAST_LOG_RANGE)
        # a group of zeros has no range: -inf here, clamped
        power = torch.tensor(form.largest / form.smallest, device=values.device).log() / log_range
    # a group of zeros stays one
    scaled = magnitudes.div_(largest.clamp_min(torch.finfo(torch.float32).tiny)).pow_(power).mul_(form.largest)
    codes = scaled.copysign_(rows)
    if not form.dtype.is_floating_point:
        codes.round_()
    return Packed(codes.to(form.dtype), largest, power)


def unpack(packed: Packed, form: Format, shape: torch.Size) -> torch.Tensor:
    """The values of ``pack`` again, in float32, with their first ``shape``."""
    codes = packed.codes.float()
    magnitudes = codes.abs().div_(form.largest).pow_(1 / packed.power).mul_(packed.largest)
    return magnitudes.copysign_(codes).flatten()[: shape.numel()].view(shape)
