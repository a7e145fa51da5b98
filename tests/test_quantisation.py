"""The quantisers give the codes and scales that they gave when these were stored, to the bit, on any processor."""

import hashlib

import torch

from effkit.models.messages import pack
from effkit.quantisation import SIGNED, UNSIGNED, quantise, quantise_state

NUM_ROWS, WIDTH = 37, 256


def values(dtype=torch.float32):
    """Whole numbers over powers of two: exact in each dtype, of four orders of magnitude, a tenth of them zero."""
    draw = torch.Generator().manual_seed(3)
    whole = torch.randint(-127, 128, (NUM_ROWS, WIDTH), generator=draw)
    size = torch.randint(0, 13, (NUM_ROWS, WIDTH), generator=draw)
    return torch.where(torch.rand(NUM_ROWS, WIDTH, generator=draw) < 0.1, 0, whole * 2.0**-size).to(dtype)


STORED = {
    "int8 128": "261ec1978edd",
    "int8 100": "0225fb7c7916",
    "int8 tensor": "838fcd73dc6e",
    "int8 head": "1d24c3e6cd3f",
    "fp8_e4m3 128": "1a02c308c3bb",
    "fp8_e4m3 100": "3fddd3579dc8",
    "fp8_e4m3 tensor": "9f3697772abf",
    "fp8_e4m3 head": "4e140b3b0285",
    "fp8_e5m2 128": "95c1e4bdd5ac",
    "fp8_e5m2 100": "b122e2133b16",
    "fp8_e5m2 tensor": "18b39737ce2f",
    "fp8_e5m2 head": "afb34afc640d",
    "state int8 torch.int8 True False": "e1ab5fde2e20",
    "state int8 torch.int8 True True": "684d415bb5b0",
    "state int8 torch.uint8 False False": "35f3987866b2",
    "state int8 torch.uint8 False True": "f4b85e99b75d",
    "state fp8_e4m3 torch.float8_e4m3fn True False": "d68a3b76f74e",
    "state fp8_e4m3 torch.float8_e4m3fn True True": "6a1cb81d8508",
    "state fp8_e4m3 torch.float8_e4m3fn False False": "7a0ad8c9e261",
    "state fp8_e4m3 torch.float8_e4m3fn False True": "e85d2e9a130f",
    "message torch.float32": "83f27b829d74",
    "message torch.bfloat16": "83f27b829d74",
}


def digest(*tensors):
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:12]


def codes_of():
    """Each format, and each way that it is used, with its digest."""
    found = {}
    for dtype in ("int8", "fp8_e4m3", "fp8_e5m2"):
        for group, heads in ((128, None), (100, None), ("tensor", None), ("head", 4)):
            q = quantise(values(), dtype, group, heads)
            found[f"{dtype} {group}"] = digest(q.codes, q.scales, *([] if q.lows is None else [q.lows]))
    for name in SIGNED:
        for form, x in ((SIGNED[name], values()), (UNSIGNED[name], values().square())):
            for expand in (False, True):
                state = quantise_state(x, form, 100, expand=expand)
                found[f"state {name} {form.dtype} {x.min() < 0} {expand}"] = digest(state.codes, state.largest)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"message {dtype}"] = digest(pack(values(dtype), "float8"))
    return found


def test_codes_and_scales_are_the_stored_ones():
    assert codes_of() == STORED
