"""The summary panes, each in two parts: what one rank's events say, and what the parts of all ranks say together.

The first part runs where the events are (another process, another machine); only its small frames travel.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from effkit.panes import breakdown, collectives, families, tables

OF_RANK: Mapping[str, Callable[[pd.DataFrame], Any]] = {
    "overview": breakdown.breakdown,
    "operators": tables.operators_of,
    "kernels": tables.kernels_of,
    "families": families.families_of,
    "collectives": collectives.collectives_of,
}
