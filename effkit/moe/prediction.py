"""predict(): the step at another setting, without running it; whatif(): the same with sliders; the best degrees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from effkit.account import Account
from effkit.arguments import checked_number, checked_whole
from effkit.lab import Progress, banded, calibration_of, interval
from effkit.moe import breakdown, live, routing
from effkit.moe.calibration import Calibration, total_ns
from effkit.moe.recorded import Step
from effkit.moe.setting import COMPRESSIONS, MESSAGE_DTYPES, PLACEMENTS, Setting
from effkit.moe.simulating import simulate

if TYPE_CHECKING:
    from effkit.whatif import WhatIf

_OF_THE_RANKS = ("num_ranks", "ranks_per_node", "link_bytes_per_s")
_MOST_CHUNKS = 8


def predict(base: Account, **setting: Any) -> Account:
    """The step at another setting, without running anything.

    Every rank's phases and exchanges are played through, with the costs that were fitted; bytes and token copies are
    counted exactly. ValueError for an unknown knob, a base without calibration, ranks that cannot share the experts, or
    a lever whose time was not measured.

    Parameters
    ----------
    base
        What :func:`measure` returned.
    setting
        Any field of :class:`Setting`; ``num_ranks``, ``ranks_per_node``; ``link_bytes_per_s``, the rate of the link
        between nodes, which is then assumed and not measured. The rest stays as it was measured.

    Returns
    -------
    Account
        In ns, with a band; communication, bytes and token copies are companions. ``in_range`` is False for more than
        the calibration has seen, levers or overlaps that it did not run, other ranks or another link: the band is
        wider there. At the measured setting: ``base`` itself.
    """
    calibration = calibration_of(base, Calibration, "moe")
    on = {name: setting.pop(name) for name in _OF_THE_RANKS if setting.get(name) is not None}
    wanted = calibration.setting.change(**setting)
    num_ranks = checked_whole("num_ranks", on.get("num_ranks", calibration.num_ranks), 1)
    as_measured = calibration.ranks_per_node if num_ranks == calibration.num_ranks else num_ranks
    per_node = checked_whole("ranks_per_node", on.get("ranks_per_node", as_measured), 1)
    link = float(checked_number("link_bytes_per_s", on.get("link_bytes_per_s", calibration.link_bytes_per_s)))
    if link and per_node == num_ranks and "ranks_per_node" not in on:
        per_node = 1  # a link between nodes: each rank is one, unless they are said to share
    full = live.full_setting(wanted, num_ranks, per_node, link)
    if full == dict(base.setting):
        return base
    calibration.knows(wanted)
    steps = simulated(calibration, wanted, num_ranks, per_node, link)
    anchor = calibration.anchor(wanted)
    total = round(anchor * total_ns(steps))
    same_link = link == calibration.link_bytes_per_s and per_node == calibration.ranks_per_node
    on = {"num_ranks": num_ranks, "ranks_per_node": per_node, "link_bytes_per_s": link}
    band_frac, in_range = calibration.band_at(wanted, on)
    traffic = [routing.traffic(wanted, num_ranks, n) for n in range(calibration.num_steps)]
    kept, dropped = zip(*((step.kept, step.dropped) for step in traffic), strict=True)
    copies = live.copies_account(wanted, num_ranks, kept, dropped, basis="derived")
    rows = live.scaled(breakdown.typical(steps, breakdown.rows_ns), anchor)
    basis = {name: "derived" if same_link or "moving" not in name else "assumed" for name in rows}
    return Account.of(
        live.TIME, "ns", rows, total=total, basis=basis,
        source=f"the costs of {len(calibration.settings)} measured settings",
        **interval(total, band_frac * total), in_range=in_range,
        setting=full, calibration=calibration,
        companions=(
            banded(live.communication_account(steps, anchor, basis="derived"), band_frac),
            banded(live.bytes_account(steps, "the routing", basis="derived"), 0.0),
            banded(copies, 0.0),
        ),
    )  # fmt: skip


def simulated(
    calibration: Calibration, setting: Setting, num_ranks: int, ranks_per_node: int, link_bytes_per_s: float,
    traffic: Sequence[routing.Traffic] | None = None,
) -> list[Step]:  # fmt: skip
    """Every step of a setting, played through; with other traffic than its own, if given."""
    fitted = calibration.costs
    if link_bytes_per_s and link_bytes_per_s != calibration.link_bytes_per_s:
        moving = fitted.moving.copy()
        moving[1] = 1e9 / link_bytes_per_s
        fitted = replace(fitted, moving=moving)
    of_steps = traffic if traffic is not None else [None] * calibration.num_steps
    return [simulate(setting, n, num_ranks, ranks_per_node, fitted, own) for n, own in enumerate(of_steps)]


def best_degrees(base: Account, most: int = _MOST_CHUNKS, **setting: Any) -> tuple[int, int]:
    """Into how many pieces to cut the exchange, forward and backward: the pair that :func:`predict` finds quickest.

    Each direction has a best degree of its own, for backward computes twice as much (FSMoE, 2501.10714, section 4); but
    where they differ, what forward has kept must be cut anew. So all pairs up to ``most`` are played through. Closed
    forms, for costs without waiting, are in the lesson on pipelining degrees.
    """
    degrees = range(1, most + 1)
    return min(
        itertools.product(degrees, degrees),
        key=lambda pair: predict(base, **setting, num_chunks=pair[0], num_chunks_backward=pair[1]).total,
    )


def whatif(base: Account, *, num_rounds: int = 3, timeout_s: float = 180.0) -> WhatIf:
    """Sliders over :func:`predict`; the button runs the setting on ranks of its own and shows the receipt.

    Levers appear when their time was measured.
    """
    from effkit.whatif import Choice, Slider, WhatIf

    calibration = calibration_of(base, Calibration, "moe")
    at = calibration.setting
    knobs: list[Slider | Choice] = [
        Slider("num_tokens", "Tokens per rank [count]", max(1, at.num_tokens // 4), 2 * at.num_tokens,
               max(1, at.num_tokens // 16), "Tokens of each rank in a step"),
        Slider("top_k", "Choices per token [count]", 1, min(4, at.num_experts // at.num_modalities), 1,
               "Experts that each token goes to"),
        Slider("capacity_factor", "Capacity [tenths]", 0, 30, 1,
               "What an expert takes of each rank, over its fair share; the rest is dropped. 0 drops none", scale=0.1),
        Slider("skew", "Skew of loads [tenths]", 0, 20, 1, "Zipf exponent of the experts' popularity", scale=0.1),
        Slider("num_chunks", "Pieces forward [count]", 1, _MOST_CHUNKS, 1, "The exchange is cut into, and overlaps"),
        Slider("num_chunks_backward", "Pieces backward [count]", 0, _MOST_CHUNKS, 1, "0: as many as forward"),
        Choice("placement", "Placement", PLACEMENTS, "Which rank holds which expert"),
        Slider("num_replicas", "Replicas [experts]", 0, at.num_experts, calibration.num_ranks,
               "The most popular ones, held by every rank"),
    ]  # fmt: skip
    if isinstance(at.placement, tuple):
        knobs = [knob for knob in knobs if knob.name != "placement"]
    if any(setting.compress == "lsh" for setting in calibration.settings):
        knobs.append(Choice("compress", "Compression", COMPRESSIONS, "One centroid travels for tokens that are alike"))
    measured = {setting.message_dtype for setting in calibration.settings}
    dtypes = [name for name in MESSAGE_DTYPES if name in measured]
    if len(dtypes) > 1:
        knobs.append(Choice("message_dtype", "Messages", dtypes, "What rows are written in while they travel"))

    def run(progress: Progress, **setting: Any) -> Account:
        changes = {name: value for name, value in setting.items() if name not in _OF_THE_RANKS}
        return live.beside(ranks, base, at.change(**changes), num_rounds=num_rounds, timeout_s=timeout_s,
                           progress=progress)  # fmt: skip

    ranks = live.ranks_of(calibration)  # they stay up from one press of the button to the next
    panel = WhatIf(base, predict, knobs, run)
    panel.observe(lambda _: ranks.close(), "comm")  # as it is closed
    return panel
