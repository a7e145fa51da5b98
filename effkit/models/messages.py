"""How rows are written into messages: as they are, in bfloat16, or in 8-bit floats with scales."""

from __future__ import annotations

import torch

from effkit.quantisation import GROUP, dequantise_rows, quantise_rows


def form_of(message_dtype: str, *, forward: bool, out: bool) -> str:
    """How rows are written on their way to the experts (``out``) or back; 8-bit floats go forward and out alone."""
    return "bfloat16" if message_dtype == "float8" and not (forward and out) else message_dtype


def pack(rows: torch.Tensor, form: str) -> torch.Tensor:
    """Rows [num_rows, hidden] as the bytes of a message, uint8 [num_rows, bytes per row]."""
    if form == "same":
        return rows.contiguous().view(torch.uint8)
    if form == "bfloat16":
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8)
    if not len(rows):  # torch does not view nothing as bytes
        return rows.new_empty(0, row_bytes(form, rows.shape[1], rows.element_size()), dtype=torch.uint8)
    return quantise_rows(rows)


def unpack(message: torch.Tensor, form: str, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """The rows [num_rows, hidden] of a message, in ``dtype``."""
    if form == "same":
        return message.view(dtype)
    if form == "bfloat16":
        return message.view(torch.bfloat16).to(dtype)
    if not len(message):
        return torch.empty(0, hidden, dtype=dtype, device=message.device)
    return dequantise_rows(message, hidden).to(dtype)


def row_bytes(form: str, hidden: int, item_bytes: int) -> int:
    """Bytes of one row in a message."""
    return {"same": hidden * item_bytes, "bfloat16": 2 * hidden}.get(form, hidden + 4 * (hidden // GROUP))
