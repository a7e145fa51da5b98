"""ceilings(): the table of published figures beside one's own accounts: how much each could give at most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from effkit.claims.table import Claim, rows

if TYPE_CHECKING:
    from effkit.account import Account

STEPS, UNSEEN, NOTHING = "not told by one step", "not seen here", "nothing here for you"
_COLUMNS = ["paper", "at_most", "share_frac", "bounded_by", "applies_if", "theirs", "lever", "price", "verdict", "link"]
_LEAST_FRAC = 0.01  # of an account: what less than this can give, no measurement would show


def ceilings(accounts: Sequence[Account]) -> pd.DataFrame:
    """How much each paper's idea could give at most, to whom these accounts belong.

    An idea that makes a part of a step cheaper gives no more than that part: of time, 1 / (1 - share) times the speed
    (Amdahl's law); of memory, the share. An idea that changes how many steps, tokens or devices a training takes
    (``bounded_by`` is empty) has no such bound: only runs to equal quality can tell.

    Returns
    -------
    DataFrame
        Indexed by ``paper``, the largest share first: ``at_most`` (in words), ``share_frac`` (missing where no account
        has such a row), ``bounded_by`` (the rows), ``applies_if``, ``theirs`` (their figure, on their models),
        ``lever`` (what does it here, empty where nothing does), ``price``, ``verdict``, ``link``.
    """
    cells = []
    for claim in rows().values():
        items = claim.bounded_by.split("; ")
        held = [(float(part.sum()), each.unit) for each in accounts
                if len(part := each.share[each.share.index.isin(items)])]  # fmt: skip
        share, unit = max(held, default=(None, ""))
        cells.append(vars(claim) | {"at_most": _at_most(claim, share, unit), "share_frac": share,
                                    "theirs": claim.theirs_in_words, "link": claim.link})  # fmt: skip
    frame = pd.DataFrame(cells)[_COLUMNS].set_index("paper").astype({"share_frac": "Float64"})
    order = frame["share_frac"].fillna(-1.0) - frame["bounded_by"].eq("").astype(float)  # what has no bound comes last
    return frame.loc[order.sort_values(ascending=False, kind="stable").index]


def _at_most(claim: Claim, share: float | None, unit: str) -> str:
    if share is None:
        return UNSEEN if claim.bounded_by else STEPS
    if share < _LEAST_FRAC:
        return NOTHING
    return f"{share:.0%} less memory" if unit == "bytes" else f"{1 / max(1 - share, 1e-9):.3g} times the speed"
