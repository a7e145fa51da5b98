"""Matrix products by shape: their FLOPs, and how near they come to what their device's datasheet allows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from effkit.datasheets import Datasheet
from effkit.trace.names import ITEM_BYTES

# Operators that multiply two matrices, or as many of each as there are in a batch: where the first of them is given
_FIRST: Mapping[str, int] = {
    "aten::mm": 0, "aten::bmm": 0, "aten::_scaled_mm": 0, "aten::addmm": 1, "aten::baddbmm": 1,
    "aten::_addmm_activation": 1,
}  # fmt: skip
# A recording does not say whether float32 was multiplied as TF32, which no product can be faster than
_PUBLISHED = {"float": "tf32", "Float8_e5m2": "float8_e4m3fn", "Half": "float16", "BFloat16": "bfloat16",
              "Float8_e4m3fn": "float8_e4m3fn"}  # fmt: skip
_COLUMNS = ["calls", "flops", "size_bytes", "mean_ns", "flops_per_s", "rate_flops_per_s", "floor_ns", "reached_frac"]


def products(parts: Sequence[pd.DataFrame], sheet: Datasheet | None) -> pd.DataFrame:
    """The products among the operators of all ranks that ran on a device, the most expensive first."""
    keys = ["operator", "shapes", "dtypes"]
    table = pd.concat(parts).drop(columns="calls").rename(columns={"launching": "calls"})
    table = table[table["operator"].isin(_FIRST) & table["shapes"].notna() & (table["calls"] > 0)]
    table = table.groupby(keys, dropna=False)[["calls", "device_self_ns"]].sum()
    work = [_work(*key) for key in table.index]
    frame = pd.DataFrame(work, table.index, ["flops", "size_bytes", "dtype"]).join(table).dropna(subset=["flops"])
    frame["mean_ns"] = frame["device_self_ns"].astype("float64") / frame["calls"]
    frame["flops_per_s"] = frame["flops"] / frame["mean_ns"] * 1e9
    rates = frame["dtype"].map(sheet.rate_flops_per_s if sheet else {}).astype("float64")
    reading_ns = frame["size_bytes"] / (sheet.bandwidth_bytes_per_s if sheet else math.nan) * 1e9
    arithmetic_ns = frame["flops"] / rates * 1e9
    frame["rate_flops_per_s"], frame["floor_ns"] = rates, reading_ns.where(reading_ns > arithmetic_ns, arithmetic_ns)
    frame["reached_frac"] = frame["floor_ns"] / frame["mean_ns"]
    return frame.sort_values("device_self_ns", ascending=False, kind="stable")[_COLUMNS]


def _work(operator: str, shapes: str, dtypes: Any) -> tuple[int | None, float, str | None]:
    """FLOPs of one product, the bytes that it reads and writes at least, and the datasheet's word for its dtype; None
    for what is no product's."""
    first = _FIRST[operator]
    left, right = [*json.loads(shapes), [], []][first : first + 2]
    if len(left) not in (2, 3) or len(right) != len(left) or left[-1] != right[-2]:
        return None, math.nan, None
    kind = "" if pd.isna(dtypes) else str([*json.loads(dtypes), "", ""][first])
    outer = math.prod(left[:-1]) * right[-1]
    size_bytes = (math.prod(left) + math.prod(right) + outer) * ITEM_BYTES.get(kind, math.nan)
    return 2 * outer * left[-1], size_bytes, _PUBLISHED.get(kind.removeprefix("c10::"))
