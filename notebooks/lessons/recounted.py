"""The table that every recount ends in: a published figure beside the one that is counted here."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd


def beside(rows: Iterable[tuple[str, str, float | None, float]]) -> pd.DataFrame:
    """(item, unit, published or None, recomputed) -> ``unit``, ``published``, ``recomputed``, ``gap_frac`` by item."""
    table = pd.DataFrame(rows, columns=["item", "unit", "published", "recomputed"]).set_index("item")
    table = table.astype({"published": "Float64", "recomputed": "Float64"})
    return table.assign(gap_frac=table["recomputed"] / table["published"] - 1)
