"""Which batches a measurement runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from effkit.padding.buckets import Ints
from effkit.padding.plans import Plan


@dataclass(frozen=True, eq=False)
class Probe:
    """One batch to run: the example indices of each row, and its number where it is one of the plan as it stands."""

    rows: list[Ints]
    batch: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is a batch of the plan as it stands."""
        return self.batch is not None

    def shape(self, plan: Plan) -> dict[str, Any]:
        """``num_rows``, padded ``input_length`` and, where known, ``output_length`` [cells]; ``whole``, and the
        number of the ``batch``, -1 for none."""
        lengths = plan.lengths
        padded = {name: max(int(lengths[name].to_numpy()[row].sum()) for row in self.rows) for name in lengths}
        padded["input_length"] = plan.padded(padded["input_length"])
        number = -1 if self.batch is None else self.batch
        return {"num_rows": len(self.rows), **padded, "whole": self.whole, "batch": number}


def choose(plan: Plan, num_batches: int | None, *, cut_down: bool) -> list[Probe]:
    """Batches of the plan, evenly spread in order of their padded cells, the largest first.

    With ``cut_down``, half of them (and four beside all of them) are not whole: the longest rows of the largest
    batch, a batch of the plan's shortest rows, half a batch with the fewest outputs for their inputs, a few of the
    shortest rows. Without the third, inputs and outputs grow together, and what each costs cannot be told.
    """
    frame = plan.frame
    order = np.argsort((frame["num_rows"] * frame["input_length"]).to_numpy(), kind="stable")[::-1]
    num_cut = 0 if not cut_down else 4 if num_batches is None else num_batches // 2
    num_whole = len(order) if num_batches is None else min(len(order), num_batches - num_cut)
    chosen = order[np.rint(np.linspace(0, len(order) - 1, num_whole)).astype(int)]
    probes = [Probe(plan.rows(int(batch)), int(batch)) for batch in chosen]
    return probes + [Probe(rows) for rows in _cut_down(plan, order)[:num_cut]]


def _cut_down(plan: Plan, order: Ints) -> list[list[Ints]]:
    lengths = plan.lengths["input_length"].to_numpy()

    def by_length(rows: list[Ints]) -> list[Ints]:
        return sorted(rows, key=lambda row: int(lengths[row].sum()))

    usual = max(1, int(np.median(plan.frame["num_rows"])))
    few = max(1, usual // 4)
    # the shortest batches hold the shortest rows of a bucketed plan, and a fair sample of a shuffled one
    pool = by_length([row for batch in order[-16:] for row in plan.rows(int(batch))])
    if "output_length" in plan.lengths:
        outputs = plan.lengths["output_length"].to_numpy()
        large = by_length([row for batch in order[:16] for row in plan.rows(int(batch))])
        terse = sorted(large[len(large) // 2 :], key=lambda row: int(outputs[row].sum()) / int(lengths[row].sum()))
    else:
        terse = by_length(plan.rows(int(order[len(order) // 2])))
    return [by_length(plan.rows(int(order[0])))[-few:], pool[:usual], terse[: max(1, usual // 2)], pool[:few]]
